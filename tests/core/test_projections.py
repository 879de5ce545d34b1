"""Fused projections beside separate ones: split bit for bit if their rows are known, or refused by name."""

import logging

import pytest
import torch

from making import random_adapter
from merged_lora import engine
from merged_lora.adapters import Adapter
from merged_lora.alignment import align
from merged_lora.calibration import Calibration
from merged_lora.errors import PlanError
from merged_lora.factors import Factors
from merged_lora.files.layout import Header
from merged_lora.projections import FUSED, MIXED

Q, K, V, WIDTH, INNER = 48, 16, 16, 32, 80
ATTENTION = "model.layers.{}.self_attn."
QKV = "model.layers.0.self_attn.qkv_proj"
MLP = "model.layers.{}.mlp."
EXPERTS = "model.layers.0.mlp.experts."
OLD_EXPERTS = "model.layers.0.block_sparse_moe.experts."


def attention(parts: str, layer: int = 0, **rows: int) -> dict[str, tuple[int, int]]:
    """Shapes of some of qkv, q, k, v in a layer."""
    known = {"qkv": Q + K + V, "q": Q, "k": K, "v": V} | rows
    return {f"{ATTENTION.format(layer)}{part}_proj": (known[part], WIDTH) for part in parts.split()}


def assert_split(whole: Adapter, aligned: Adapter, fused: str, parts: list[str]) -> None:
    """The parts are in place of the fused module, with all its rows in order, bit for bit."""
    assert fused not in aligned.modules
    together = torch.cat([aligned.modules[part].delta() for part in parts])
    assert torch.equal(together, whole.modules[fused].delta())
    assert all(torch.equal(aligned.modules[part].a, whole.modules[fused].a) for part in parts)


@pytest.mark.parametrize("others", ["q k v", "q v", "q k", "k v"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_qkv_is_split_where_the_rows_are_known(others: str, fused_first: bool) -> None:
    a, b = random_adapter(attention("qkv"), seed=1), random_adapter(attention(others), seed=2)
    aligned = align({"a": a, "b": b} if fused_first else {"b": b, "a": a})
    assert aligned["b"] is b
    parts = list(attention("q k v"))
    assert list(aligned["a"].modules) == parts
    assert_split(a, aligned["a"], QKV, parts)
    assert [aligned["a"].modules[part].shape[0] for part in parts] == [Q, K, V]


@pytest.mark.parametrize(
    ("fused", "parts"),
    [(fused, parts) for fused, ways in FUSED.items() for parts in ways if len(parts) == 3],
)
def test_every_fused_name_is_split_into_whatever_its_parts_are_called(
    fused: str, parts: tuple[str, ...]
) -> None:
    front = "encoder.layers.0.attention."
    a = random_adapter({front + fused: (96, WIDTH)})
    b = random_adapter({front + part: (32, WIDTH) for part in parts})
    assert_split(a, align({"a": a, "b": b})["a"], front + fused, [front + part for part in parts])


@pytest.mark.parametrize("others", ["gate_proj up_proj", "gate_proj", "up_proj"])
def test_gate_and_up_are_halves(others: str) -> None:
    front = MLP.format(0)
    a = random_adapter({f"{front}gate_up_proj": (2 * INNER, WIDTH)})
    b = random_adapter({front + part: (INNER, WIDTH) for part in others.split()})
    aligned = align({"a": a, "b": b})["a"]
    assert_split(a, aligned, f"{front}gate_up_proj", [f"{front}gate_proj", f"{front}up_proj"])


def test_a_layer_that_the_others_lack_is_split_as_the_rest() -> None:
    a = random_adapter(attention("qkv", 0) | attention("qkv", 7))
    b = random_adapter(attention("q v", 0))
    aligned = align({"a": a, "b": b})["a"]
    for layer in (0, 7):
        assert_split(a, aligned, f"{ATTENTION.format(layer)}qkv_proj", list(attention("q k v", layer)))


def test_each_layer_has_its_own_sizes() -> None:
    a = random_adapter(attention("qkv", 0) | attention("qkv", 1, qkv=100))
    b = random_adapter(attention("q k v", 0) | attention("q k v", 1, q=60, k=20, v=20))
    aligned = align({"a": a, "b": b})["a"]
    assert [aligned.modules[name].shape[0] for name in attention("q k v", 1)] == [60, 20, 20]


def test_sizes_may_come_from_several_sources() -> None:
    sources = {
        "a": random_adapter(attention("qkv")),
        "b": random_adapter(attention("q")),
        "c": random_adapter(attention("v")),
        "d": random_adapter(attention("qkv"), seed=1),
    }
    aligned = align(sources)
    assert list(aligned["a"].modules) == list(aligned["d"].modules) == list(attention("q k v"))


def test_prefixes_and_projections_are_aligned_together() -> None:
    new = {
        name.replace("model.", "model.language_model."): shape for name, shape in attention("q k v").items()
    }
    a, b = random_adapter(new), random_adapter(attention("qkv"), seed=1)
    assert list(align({"a": a, "b": b})["b"].modules) == list(new)


def test_a_merge_with_a_fused_source_is_that_with_its_rows() -> None:
    a, b = random_adapter(attention("qkv"), seed=1), random_adapter(attention("q k v"), seed=2)
    whole = a.modules[QKV]
    rows = zip(attention("q k v"), torch.split(whole.b, [Q, K, V]), strict=True)
    by_hand = Adapter({name: Factors(whole.a, part, whole.scaling) for name, part in rows})
    expected, made = (engine.merge("a - b", {"a": each, "b": b}, "numpy") for each in (by_hand, a))
    assert made.digest == expected.digest


@pytest.mark.slow
def test_a_model_with_fused_projections_answers_as_the_one_with_their_parts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    split = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double().eval()
    fused = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).double().eval()
    weights = split.state_dict()
    for i in range(2):
        for front, whole, parts in (
            (ATTENTION.format(i), "qkv_proj", ("q_proj", "k_proj", "v_proj")),
            (MLP.format(i), "gate_up_proj", ("gate_proj", "up_proj")),
        ):
            weights[f"{front}{whole}.weight"] = torch.cat([weights.pop(f"{front}{p}.weight") for p in parts])
    fused.load_state_dict(weights)
    names = ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
    linear = {name: m for name, m in fused.named_modules() if name.endswith(names)}
    a = random_adapter({name: tuple(m.weight.shape) for name, m in linear.items()})
    other = {
        n: tuple(m.weight.shape)
        for n, m in split.named_modules()
        if n.endswith(("q_proj", "v_proj", "up_proj"))
    }
    aligned = align({"a": a, "b": random_adapter(other)})["a"]
    tokens = torch.arange(1, 20)[None]
    before = split(tokens).logits
    with torch.no_grad():
        for model, adapter in ((fused, a), (split, aligned)):
            for name, factors in adapter.modules.items():
                model.get_submodule(name).weight += factors.delta()
    assert torch.allclose(split(tokens).logits, fused(tokens).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(split(tokens).logits, before, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "parts"), [("qwen2_moe", ["gate_proj", "up_proj"]), ("mixtral", ["w1", "w3"])]
)
def test_transformers_joins_experts_in_the_order_of_these_rows(kind: str, parts: list[str]) -> None:
    conversion = pytest.importorskip("transformers.conversion_mapping")
    rules = conversion.get_checkpoint_conversion_mapping(kind)
    (rule,) = [rule for rule in rules if "gate_up_proj" in str(rule.target_patterns)]
    assert [
        str(pattern).removesuffix(".weight").rpartition(".")[2] for pattern in rule.source_patterns
    ] == parts
    assert rule.operations[-1].dim == 1  # of [experts, rows, columns]


def test_the_digest_stays_and_the_parts_have_the_inputs_that_were_measured() -> None:
    a, b = random_adapter(attention("qkv"), seed=1), random_adapter(attention("q k v"), seed=2)
    aligned = align({"a": a, "b": b})["a"]
    assert aligned.digest == a.digest
    assert isinstance(a.calibration, Calibration)
    assert isinstance(aligned.calibration, Calibration)
    assert {name: aligned.calibration.inputs[name] for name in attention("q k v")} == dict.fromkeys(
        attention("q k v"), a.calibration.inputs[QKV]
    )
    assert engine.merge("regmean(a, b)", {"a": a, "b": b}, "numpy").modules.keys() == aligned.modules.keys()


@pytest.mark.parametrize("options", ['without="qkv_proj"', 'modules="mlp"'])
def test_what_takes_no_part_need_not_be_split(options: str) -> None:
    mlp = {f"{MLP.format(0)}down_proj": (WIDTH, INNER)}
    sources = {"a": random_adapter(attention("qkv") | mlp), "b": random_adapter(attention("q") | mlp)}
    merged = engine.merge(f"sum(a, b, {options})", sources, "numpy")
    assert QKV not in merged.modules
    with pytest.raises(PlanError, match="do not show how many"):
        engine.merge("sum(a, b)", sources, "numpy")


def test_a_fused_projection_is_left_out_by_its_own_name(caplog: pytest.LogCaptureFixture) -> None:
    mlp = {f"{MLP.format(0)}down_proj": (WIDTH, INNER)}
    sources = {"a": random_adapter(attention("qkv") | mlp), "b": random_adapter(attention("q k v") | mlp)}
    with caplog.at_level(logging.WARNING):
        merged = engine.merge('sum(a, b, without="qkv_proj")', sources, "numpy")
    assert all(
        torch.equal(merged.modules[n].delta(), sources["b"].modules[n].delta()) for n in attention("q k v")
    )
    assert not any("is split" in said for said in caplog.messages)


def test_what_is_split_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        align({"a": random_adapter(attention("qkv")), "b": random_adapter(attention("q k v"))})
    (said,) = caplog.messages
    assert said.startswith(
        "a: model.layers.0.self_attn.qkv_proj is split into model.layers.0.self_attn.q_proj, "
    )


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (attention("q"), "do not show how many of its 80 rows are those of k_proj and v_proj"),
        (attention("v"), "do not show how many of its 80 rows are those of q_proj and k_proj"),
        (attention("q k v", v=20), "80 rows cannot be 48 of q_proj, 16 of k_proj, 20 of v_proj"),
        (attention("q k v", q=64), "80 rows cannot be 64 of q_proj, 16 of k_proj, 16 of v_proj"),
        (attention("q v", q=64, v=16), "cannot be 64 of q_proj, 0 of k_proj, 16 of v_proj"),
        (attention("k v", k=40, v=40), "cannot be 0 of q_proj, 40 of k_proj, 40 of v_proj"),
        (attention("q v", v=20), "cannot be 48 of q_proj, 12 of k_proj, 20 of v_proj"),
    ],
)
def test_rows_that_are_not_known_for_certain_are_refused(
    others: dict[str, tuple[int, int]], reason: str
) -> None:
    sources = {"sql": random_adapter(attention("qkv")), "chat": random_adapter(others)}
    with pytest.raises(
        PlanError, match=rf"sql has model\.layers\.0\.self_attn\.qkv_proj .* in chat, .*{reason}"
    ) as error:
        align(sources)
    assert "--without 'model.layers.*.self_attn.qkv_proj'" in str(error.value)


@pytest.mark.parametrize(
    ("fused", "others"),
    [
        (attention("qkv", 5, qkv=100), attention("q", 0) | attention("v", 5)),
        (attention("qkv", 5), attention("q k v", 0) | attention("q k v", 1, q=60)),
    ],
)
def test_rows_of_another_layer_are_no_proof_where_layers_differ(
    fused: dict[str, tuple[int, int]], others: dict[str, tuple[int, int]]
) -> None:
    a = random_adapter(attention("qkv", 0) | fused)
    with pytest.raises(PlanError, match="do not show how many"):
        align({"a": a, "b": random_adapter(others)})


@pytest.mark.parametrize("fused", ["qkv_proj", "c_attn"])
def test_what_holds_a_chosen_part_must_be_split(fused: str) -> None:
    front = ATTENTION.format(0)
    a = random_adapter({front + fused: (Q + K + V, WIDTH)})
    sources = {"a": a, "b": random_adapter(attention("q"))}
    with pytest.raises(PlanError, match=f"a has .*{fused} .* cannot be split"):
        engine.merge('sum(a, b, modules="q_proj")', sources, "numpy")


@pytest.mark.parametrize("rows", [2 * INNER - 1, 2 * INNER + 2])
def test_gate_and_up_of_other_sizes_are_refused(rows: int) -> None:
    a = random_adapter({f"{MLP.format(0)}gate_up_proj": (rows, WIDTH)})
    b = random_adapter({f"{MLP.format(0)}gate_proj": (INNER, WIDTH)})
    with pytest.raises(PlanError, match=f"its {rows} rows cannot be"):
        align({"a": a, "b": b})


@pytest.mark.parametrize(("fused", "parts"), [(fused, ways[0]) for fused, ways in MIXED.items()])
def test_projections_whose_rows_are_mixed_in_some_models_are_refused(
    fused: str, parts: tuple[str, ...]
) -> None:
    front = "transformer.h.0.attn."
    a = random_adapter({front + fused: (32 * len(parts), WIDTH)})
    b = random_adapter({front + part: (32, WIDTH) for part in parts})
    with pytest.raises(PlanError, match=f"{fused} .* the order of its rows is not the same in all models"):
        align({"a": a, "b": b})


def test_a_source_with_both_shows_that_the_model_has_both() -> None:
    sources = {
        "a": random_adapter(attention("qkv")),
        "b": random_adapter(attention("q k v")),
        "c": random_adapter(attention("qkv q")),
    }
    assert align(sources) == sources


def test_fused_projections_alone_stay_fused() -> None:
    sources = {name: random_adapter(attention("qkv"), seed=i) for i, name in enumerate("ab")}
    assert align(sources) == sources


def test_other_layers_of_the_same_names_are_no_parts() -> None:
    cross = {name.replace("self_attn", "cross_attn"): shape for name, shape in attention("q k v").items()}
    sources = {"a": random_adapter(attention("qkv")), "b": random_adapter(cross)}
    assert align(sources) == sources


def fused_experts(front: str = EXPERTS, count: int = 3) -> dict[str, tuple[int, int]]:
    gates = {f"{front}gate_up_proj[{i}]": (2 * INNER, WIDTH) for i in range(count)}
    return gates | {f"{front}down_proj[{i}]": (WIDTH, INNER) for i in range(count)}


@pytest.mark.parametrize(
    ("front", "names"),
    [(EXPERTS, ("gate_proj", "up_proj", "down_proj")), (OLD_EXPERTS, ("w1", "w3", "w2"))],
)
def test_fused_experts_become_those_of_the_other_source(front: str, names: tuple[str, str, str]) -> None:
    gate, up, down = names
    a = random_adapter(fused_experts(), seed=1)
    b = random_adapter({f"{front}2.{gate}": (INNER, WIDTH), f"{front}2.{down}": (WIDTH, INNER)}, seed=2)
    aligned = align({"a": a, "b": b})["a"]
    assert len(aligned.modules) == 9
    for i in range(3):
        assert_split(a, aligned, f"{EXPERTS}gate_up_proj[{i}]", [f"{front}{i}.{gate}", f"{front}{i}.{up}"])
        assert_split(a, aligned, f"{EXPERTS}down_proj[{i}]", [f"{front}{i}.{down}"])


def stacked_experts(count: int = 3) -> dict[str, tuple[int, int]]:
    shapes = {"w1": (INNER, WIDTH), "w2": (WIDTH, INNER), "w3": (INNER, WIDTH)}
    return {f"{EXPERTS}{name}[{i}]": shape for name, shape in shapes.items() for i in range(count)}


def test_fused_experts_become_stacks_beside_stacks() -> None:
    a, b = random_adapter(fused_experts(), seed=1), random_adapter(stacked_experts(), seed=2)
    aligned = align({"a": a, "b": b})
    assert aligned["a"].modules.keys() == b.modules.keys() == aligned["b"].modules.keys()
    for i in range(3):
        names = [f"{EXPERTS}{name}[{i}]" for name in ("w1", "w3")]
        assert_split(a, aligned["a"], f"{EXPERTS}gate_up_proj[{i}]", names)
        assert_split(a, aligned["a"], f"{EXPERTS}down_proj[{i}]", [f"{EXPERTS}w2[{i}]"])


@pytest.mark.parametrize(
    ("front", "names"),
    [(EXPERTS, ("gate_proj", "up_proj", "down_proj")), (OLD_EXPERTS, ("w1", "w3", "w2"))],
)
def test_stacks_become_the_modules_of_each_expert_beside_such(front: str, names: tuple[str, ...]) -> None:
    a = random_adapter(stacked_experts(), seed=1)
    b = random_adapter({f"{front}0.{names[0]}": (INNER, WIDTH)}, seed=2)
    aligned = align({"a": a, "b": b, "c": random_adapter(fused_experts(), seed=3)})
    assert aligned["a"].modules.keys() == {f"{front}{i}.{name}" for i in range(3) for name in names}
    assert aligned["c"].modules.keys() == aligned["a"].modules.keys()
    for i in range(3):
        for stack, name in zip(("w1", "w3", "w2"), names, strict=True):
            assert_split(a, aligned["a"], f"{EXPERTS}{stack}[{i}]", [f"{front}{i}.{name}"])


def test_mixtrals_router_follows_its_experts() -> None:
    a = random_adapter(fused_experts() | {"model.layers.0.mlp.gate": (3, WIDTH)})
    b = random_adapter(
        {f"{OLD_EXPERTS}0.w1": (INNER, WIDTH), "model.layers.0.block_sparse_moe.gate": (3, WIDTH)}
    )
    aligned = align({"a": a, "b": b})["a"]
    assert "model.layers.0.block_sparse_moe.gate" in aligned.modules
    assert not any(".mlp." in name for name in aligned.modules)


@pytest.mark.parametrize("base", ["openai/gpt-oss-20b", "unsloth/GPT_OSS-20b"])
def test_experts_with_gate_and_up_in_turn_are_refused(base: str) -> None:
    a = random_adapter(fused_experts(), header=Header(base_model=base))
    b = random_adapter({f"{EXPERTS}0.gate_proj": (INNER, WIDTH)})
    with pytest.raises(PlanError, match=r"a has \S+gate_up_proj\[0\] .* gate and up have its rows in turn"):
        align({"a": a, "b": b})


def test_two_modules_that_would_fall_together_are_refused() -> None:
    a = random_adapter(
        fused_experts()
        | {"model.layers.0.block_sparse_moe.gate": (3, WIDTH), "model.layers.0.mlp.gate": (3, WIDTH)}
    )
    b = random_adapter({f"{OLD_EXPERTS}0.w1": (INNER, WIDTH)})
    with pytest.raises(PlanError, match=r"a has two modules for model\.layers\.0\.block_sparse_moe\.gate"):
        align({"a": a, "b": b})
