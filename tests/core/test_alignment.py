"""Sources whose classes name the same modules differently are merged module by module, or refused."""

import json
import logging
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from making import SMALL, random_adapter
from merged_lora import engine
from merged_lora.adapters import Adapter, load_sources
from merged_lora.alignment import BASES, SPELLINGS, Spelling, align
from merged_lora.calibration import Calibration
from merged_lora.errors import PlanError
from merged_lora.files.layout import Header
from merged_lora.files.parts import HEADS

INNER = {name.removeprefix("model."): shape for name, shape in SMALL.items()}
NEW, OLD, TEXT = SPELLINGS[:3]
TOWER = {"visual.blocks.0.mlp.fc1": (24, 40), "visual.blocks.1.mlp.fc1": (24, 40)}
Shapes = dict[str, tuple[int, int]]


def below(front: str, inner: Shapes = INNER) -> Shapes:
    return {front + name: shape for name, shape in inner.items()}


def in_class(spelling: Spelling, head: bool = False, tower: bool = False) -> Shapes:
    """Modules of a class; it must have the head and the tower that are asked for."""
    made = below(spelling.text)
    made |= {f"{spelling.head}lm_head": (64, 32)} if head else {}
    return made | (below(str(spelling.rest), TOWER) if tower else {})


def deltas(adapter: Adapter) -> list[torch.Tensor]:
    return [f.delta() for f in adapter.modules.values()]


def has_deltas_of(aligned: Adapter, original: Adapter) -> bool:
    """Whether they have the same deltas, bit for bit and in the same order."""
    return all(map(torch.equal, deltas(aligned), deltas(original)))


@pytest.mark.parametrize(("first", "second"), list(permutations(SPELLINGS, 2)))
def test_classes_that_name_layers_differently_get_the_first_ones_names(
    first: Spelling, second: Spelling
) -> None:
    a, b = random_adapter(in_class(first), seed=1), random_adapter(in_class(second), seed=2)
    aligned = align({"a": a, "b": b})
    assert aligned["a"] is a
    assert list(aligned["b"].modules) == list(a.modules)
    assert has_deltas_of(aligned["b"], b)


@pytest.mark.parametrize(("first", "second"), list(permutations([s for s in SPELLINGS if None not in s], 2)))
def test_heads_and_towers_follow_their_class(first: Spelling, second: Spelling) -> None:
    modules = [in_class(spelling, head=True, tower=True) for spelling in (first, second)]
    a, b = (random_adapter(each, seed=i) for i, each in enumerate(modules))
    aligned = align({"a": a, "b": b})
    assert list(aligned["b"].modules) == list(modules[0])
    assert has_deltas_of(aligned["b"], b)


@pytest.mark.parametrize(("kind", "old"), [("qwen2_audio", OLD), ("Qwen2VLForConditionalGeneration", TEXT)])
def test_old_names_become_those_that_transformers_gives_them(kind: str, old: Spelling) -> None:
    conversion = pytest.importorskip("transformers.conversion_mapping")
    names = list(in_class(old, head=True))
    names += [f"{tower}.blocks.0.mlp.fc1" for tower in (["visual"] if old is TEXT else ["audio_tower"])]
    expected = names
    for rule in conversion.get_checkpoint_conversion_mapping(kind):
        expected = [rule.rename_source_key(name)[0] for name in expected]
    shapes = dict.fromkeys(names, (8, 8))
    aligned = align({"new": random_adapter(dict.fromkeys(expected, (8, 8))), "old": random_adapter(shapes)})
    assert list(aligned["old"].modules) == expected != names


@pytest.mark.parametrize(
    ("config", "one", "two"),
    [
        ("Gemma3Config", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("Gemma3Config", "Gemma3ForConditionalGeneration", "Gemma3Model"),
        ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "Qwen2VLModel"),
        ("LlamaConfig", "LlamaForCausalLM", "LlamaModel"),
        ("LlamaConfig", "LlamaForSequenceClassification", "LlamaModel"),
        ("GPT2Config", "GPT2LMHeadModel", "GPT2Model"),
        ("OPTConfig", "OPTForCausalLM", "OPTModel"),
        ("BertConfig", "BertForSequenceClassification", "BertModel"),
        ("RobertaConfig", "RobertaForMaskedLM", "RobertaModel"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "WhisperModel"),
        ("ViTConfig", "ViTForImageClassification", "ViTModel"),
        ("MambaConfig", "MambaForCausalLM", "MambaModel"),
    ],
)
def test_classes_of_transformers_with_and_without_a_head_are_known(config: str, one: str, two: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, config)()
    inner = settings.text_config if two == "Gemma3ForCausalLM" else settings
    for part in (settings, getattr(settings, "text_config", settings)):
        part.num_hidden_layers = 2
    names = []
    for kind, own in ((one, settings), (two, inner)):
        with torch.device("meta"):
            model = getattr(transformers, kind)(own)
        found = [
            n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and ".1." in n
        ]
        names.append([name for name in found if "vision" not in name and "visual" not in name])
    assert names[0] != names[1] != []
    for first, second in permutations(names):
        a, b = (
            random_adapter(dict.fromkeys(each, (4, 4)), rank=1, seed=i)
            for i, each in enumerate((first, second))
        )
        assert set(align({"a": a, "b": b})["b"].modules) == set(first)


@pytest.mark.parametrize("base", sorted({*BASES} - {"vision_model"}))
@pytest.mark.parametrize("bare_first", [True, False])
def test_a_model_without_its_head_has_the_modules_of_the_one_with_it(base: str, bare_first: bool) -> None:
    inner = {
        "encoder.layer.0.self.query": (48, 32),
        "encoder.layer.1.self.query": (48, 32),
        "pooler": (32, 32),
    }
    bare, full = random_adapter(inner, seed=1), random_adapter(below(f"{base}.", inner), seed=2)
    pair = {"bare": bare, "full": full} if bare_first else {"full": full, "bare": bare}
    aligned = align(pair)
    assert (
        aligned["bare"].modules.keys()
        == aligned["full"].modules.keys()
        == next(iter(pair.values())).modules.keys()
    )


def test_a_tower_by_itself_has_the_modules_of_the_one_in_a_model() -> None:
    inner = {"encoder.layers.0.mlp.fc1": (48, 32)}
    alone, within = random_adapter(inner), random_adapter(below("vision_model.", inner))
    assert list(align({"alone": alone, "within": within})["alone"].modules) == list(within.modules)


def test_a_model_with_a_head_is_not_called_as_one_without() -> None:
    bare = random_adapter({"h.0.attn.c_attn": (96, 32)})
    full = random_adapter({"transformer.h.0.attn.c_attn": (96, 32), "lm_head": (64, 32)}, seed=1)
    aligned = align({"bare": bare, "full": full})
    assert list(aligned["bare"].modules) == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_never_put_below_the_model_that_it_is_beside(head: str) -> None:
    bare = random_adapter({"h.0.attn.c_attn": (96, 32), head: (64, 32)})
    full = random_adapter({"transformer.h.0.attn.c_attn": (96, 32)}, seed=1)
    assert list(align({"full": full, "bare": bare})["bare"].modules) == [
        "transformer.h.0.attn.c_attn",
        head,
    ]


def test_vision_transformers_have_one_name_before_and_since_transformers_5() -> None:
    conversion = pytest.importorskip("transformers.conversion_mapping")
    inner = ("attention.attention.query", "attention.attention.value", "attention.output.dense")
    old = [
        f"vit.encoder.layer.{i}.{name}"
        for i in range(2)
        for name in (*inner, "intermediate.dense", "output.dense")
    ]
    new = old
    for rule in conversion.get_checkpoint_conversion_mapping("ViTModel"):
        new = [rule.rename_source_key(name)[0] for name in new]
    adapters = [random_adapter(dict.fromkeys(names, (8, 8)), seed=i) for i, names in enumerate((new, old))]
    for one, two in permutations(adapters):
        aligned = align({"one": one, "two": two})
        assert list(aligned["two"].modules) == list(one.modules)
        assert has_deltas_of(aligned["two"], two)


def test_the_names_that_most_sources_have_are_taken() -> None:
    sources = {
        name: random_adapter(in_class(spelling), seed=i)
        for i, (name, spelling) in enumerate({"a": NEW, "b": OLD, "c": TEXT, "d": OLD}.items())
    }
    aligned = align(sources)
    assert {tuple(each.modules) for each in aligned.values()} == {tuple(in_class(OLD))}
    assert aligned["b"] is sources["b"]


def test_a_class_without_a_tower_is_not_taken_for_a_source_that_adapts_it() -> None:
    sources = {name: random_adapter(in_class(TEXT), seed=i) for i, name in enumerate("abc")}
    aligned = align(sources | {"d": random_adapter(in_class(NEW, tower=True), seed=4)})
    assert list(aligned["a"].modules) == list(in_class(NEW))


def test_sources_of_the_same_layers_agree_whatever_modules_they_adapt() -> None:
    attention = {name: shape for name, shape in in_class(NEW).items() if "attn" in name}
    mlp = {name: shape for name, shape in in_class(NEW).items() if "mlp" in name}
    sources = {"a": random_adapter(attention), "b": random_adapter(mlp)}
    assert align(sources) == sources


def test_layers_meet_where_two_classes_share_no_kind_of_module() -> None:
    attention = {name: shape for name, shape in in_class(NEW).items() if "attn" in name}
    mlp = {name: shape for name, shape in in_class(OLD).items() if "mlp" in name}
    aligned = align({"a": random_adapter(attention), "b": random_adapter(mlp)})
    assert list(aligned["b"].modules) == ["model.language_model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    "parts", [("encoder.", "decoder."), ("unet.", "text_encoder."), ("thinker.model.", "talker.model.")]
)
def test_parts_of_one_model_are_merged_beside_each_other(parts: tuple[str, str]) -> None:
    sources = {part: random_adapter(below(part)) for part in parts}
    assert align(sources) == sources


def test_a_source_with_both_names_shows_that_they_are_two_modules() -> None:
    both = random_adapter(in_class(NEW) | in_class(OLD))
    odd = random_adapter(below("left.") | below("right."))
    for sources in (
        {"a": random_adapter(in_class(NEW)), "b": random_adapter(in_class(OLD)), "both": both},
        {"a": random_adapter(below("left.")), "b": random_adapter(below("right.")), "both": odd},
    ):
        assert align(sources) == sources


def test_modules_of_other_shapes_are_not_taken_for_each_other() -> None:
    smaller = {name: (rows, columns // 2) for name, (rows, columns) in in_class(OLD).items()}
    sources = {"a": random_adapter(in_class(NEW)), "b": random_adapter(smaller)}
    assert align(sources) == sources


@pytest.mark.parametrize(
    ("one", "two", "old", "new"),
    [
        ("model.", "wrapped.model.", "wrapped.", ""),
        ("model.", "agent.", "agent.", "model."),
        ("agent.", "model.", "agent.", "model."),
        ("thinker.model.", "thinker.", "thinker.model.", "thinker."),
        ("thinker.", "thinker.model.", "thinker.model.", "thinker."),
        ("", "mine.", "mine.", ""),
        ("mine.", "", "mine.", ""),
        ("model.mine.", "model.", "model.mine.", "model."),
        ("model.encoder.", "mine.encoder.", "mine.", "model."),
        ("model.language_model.", "llm.base.", "llm.base.", "model.language_model."),
    ],
)
def test_an_unknown_prefix_is_refused_and_the_rename_in_the_message_helps(
    tmp_path: Path, one: str, two: str, old: str, new: str
) -> None:
    a, b = random_adapter(below(one), seed=1), random_adapter(below(two), seed=2)
    ways = f"merge with --rename {old}={new}, otherwise with --rename {old}={old}"
    sources = {"sql": a, "chat": b}
    with pytest.raises(PlanError, match=f"sql and chat share no layers, .* {ways}$") as refused:
        align(sources)
    example, owner = re.findall(r"such as (\S+) of (sql|chat), if", str(refused.value))[0]
    assert example.startswith(old)
    assert example in sources.pop(owner).modules
    assert new + example.removeprefix(old) in sources.popitem()[1].modules
    for name, adapter in (("a", a), ("b", b)):
        adapter.save(tmp_path / name)
    again = load_sources({name: tmp_path / name for name in "ab"}, rename={old: new})
    assert again["a"].modules.keys() == again["b"].modules.keys()
    align(again)
    meant = load_sources({name: tmp_path / name for name in "ab"}, rename={old: old})
    assert align(meant) == meant


def test_what_is_taken_for_what_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        align({"a": random_adapter(in_class(NEW)), "b": random_adapter(in_class(OLD))})
    (said,) = caplog.messages
    assert said.startswith(
        "b: language_model.model.layers.0.self_attn.q_proj is taken for "
        "model.language_model.layers.0.self_attn.q_proj, as in a"
    )


@pytest.mark.parametrize("spec", ["a + b", "ties(0.7*a, 0.3*b, density=0.5)", "regmean(a, b)"])
def test_a_merge_of_two_classes_is_that_of_one(spec: str) -> None:
    plain = {name: random_adapter(in_class(NEW), seed=i) for i, name in enumerate("ab")}
    mixed = plain | {"b": random_adapter(in_class(OLD), seed=1)}
    assert engine.merge(spec, mixed, "numpy").digest == engine.merge(spec, plain, "numpy").digest


@pytest.mark.parametrize("strategy", ["dare_linear", "della_linear"])
@pytest.mark.parametrize("steps", [(OLD,), (TEXT, OLD), (OLD, NEW)])
def test_a_renamed_source_draws_the_entries_that_it_draws_alone(
    strategy: str, steps: tuple[Spelling, ...]
) -> None:
    source = renamed = random_adapter(in_class(NEW))
    for spelling in steps:
        pairs = zip(renamed.modules, in_class(spelling), strict=True)
        names = {old: [new] for old, new in pairs}
        renamed = renamed.renamed(dict(zip(in_class(spelling), source.modules.values(), strict=True)), names)
    one, two = (
        engine.merge(f"{strategy}(a, density=0.5)", {"a": adapter}, "numpy") for adapter in (source, renamed)
    )
    assert two.modules.keys() == in_class(steps[-1]).keys()
    assert has_deltas_of(two, one)


def test_digests_in_a_result_are_those_of_the_files() -> None:
    a, b = random_adapter(in_class(NEW), seed=1), random_adapter(in_class(OLD), seed=2)
    merged = engine.merge("a+b", {"a": a, "b": b}, "numpy")
    assert json.loads(merged.metadata["merged_lora.sources"]) == {"a": a.digest, "b": b.digest}


def test_a_calibration_follows_the_names_of_its_adapter() -> None:
    plain = {name: random_adapter(in_class(NEW), seed=i) for i, name in enumerate("ab")}
    mixed = plain | {"b": random_adapter(in_class(OLD), seed=1)}
    calibration = align(mixed)["b"].calibration
    assert isinstance(calibration, Calibration)
    assert calibration.inputs.keys() == plain["b"].calibration.inputs.keys()  # type: ignore[union-attr]


def test_all_that_a_source_names_follows_its_modules() -> None:
    header = Header(
        base_model="org/base",
        task_type="CAUSAL_LM",
        base_copies={f"{OLD.text}embed_tokens.base_layer.weight": "digest"},
        parameters=(f"{OLD.text}layers.0.mlp.gate",),
    )
    score = {"score": {"language_model.score.weight": torch.ones(3, 32)}}
    b = replace(random_adapter(in_class(OLD), header=header), whole=score)
    aligned = align({"a": random_adapter(in_class(NEW)), "b": b})["b"]
    assert aligned.header == replace(
        header,
        base_copies={f"{NEW.text}embed_tokens.base_layer.weight": "digest"},
        parameters=(f"{NEW.text}layers.0.mlp.gate",),
    )
    assert list(aligned.whole["score"]) == ["score.weight"]


@pytest.mark.parametrize(
    ("one", "two", "head"), [("model.", "agent.", "lm_head"), ("transformer.", "mine.", "score")]
)
def test_a_shared_head_hides_no_unknown_prefix(one: str, two: str, head: str) -> None:
    a, b = (random_adapter(below(front) | {head: (64, 32)}) for front in (one, two))
    with pytest.raises(PlanError, match=f"share no layers, .* merge with --rename {two}={one}, otherwise"):
        align({"a": a, "b": b})


def test_a_shared_tower_hides_no_unknown_prefix() -> None:
    a, b = (random_adapter(below(front) | TOWER) for front in ("model.", "agent."))
    with pytest.raises(PlanError, match=r"--rename agent\.=model\., otherwise"):
        align({"a": a, "b": b})


def test_layers_become_no_tower_beside_other_layers() -> None:
    inner = {"encoder.layers.0.mlp.fc1": (48, 32)}
    full = random_adapter(below("vision_model.", inner) | in_class(TEXT))
    with pytest.raises(PlanError, match=r"--rename encoder\.layers\.=vision_model\.encoder\.layers\.$"):
        align({"bare": random_adapter(inner), "full": full})


def test_a_prefix_counts_only_where_modules_take_part() -> None:
    sources = {n: random_adapter(below(f"{n}.") | {"lm_head": (64, 32)}) for n in ("left", "right")}
    assert align(sources, lambda name: name == "lm_head") == sources


def test_heads_with_other_tokens_do_not_hide_that_layers_are_the_same() -> None:
    a, b = in_class(TEXT, head=True), in_class(NEW, head=True) | {"lm_head": (66, 32)}
    sources = {"a": random_adapter(a), "b": random_adapter(b, seed=1)}
    assert align(sources)["b"].modules.keys() == a.keys()
    with pytest.raises(PlanError, match="--without lm_head"):
        engine.merge("a + b", sources, "numpy")
    assert (
        engine.merge('sum(a, b, without="lm_head")', sources, "numpy").modules.keys()
        == below("model.").keys()
    )


def test_shapes_count_only_where_modules_take_part() -> None:
    a, b = in_class(TEXT), in_class(OLD)
    odd = "layers.0.mlp.down_proj"
    rows, columns = b[OLD.text + odd]
    b[OLD.text + odd] = (rows + 8, columns)
    sources = {"a": random_adapter(a), "b": random_adapter(b)}
    assert align(sources)["b"] is sources["b"]
    aligned = align(sources, lambda name: not name.endswith(odd))
    assert aligned["b"].modules.keys() == a.keys()


@pytest.mark.parametrize("tower_first", [True, False])
def test_a_tower_alone_gets_the_names_of_the_class_of_the_layers(tower_first: bool) -> None:
    tower, layers = random_adapter(TOWER), random_adapter(in_class(NEW))
    pair = {"tower": tower, "layers": layers} if tower_first else {"layers": layers, "tower": tower}
    aligned = align(pair)
    assert aligned["tower"].modules.keys() == below("model.", TOWER).keys()
    assert aligned["layers"] is layers


@pytest.mark.parametrize("rest", ["", "model."])
def test_a_tower_alone_stays_as_it_is_beside_layers_of_its_class(rest: str) -> None:
    tower = random_adapter(below(rest, TOWER))
    sources = {"tower": tower, "layers": random_adapter(in_class(NEW if rest else TEXT))}
    assert align(sources) == sources


def test_an_embedding_and_a_head_alone_follow_the_class_of_the_layers() -> None:
    tokens = random_adapter({"lm_head": (64, 32), "model.embed_tokens": (64, 32)})
    layers = random_adapter(in_class(NEW, head=True))
    aligned = align({"layers": layers, "tokens": tokens})
    assert list(aligned["tokens"].modules) == ["lm_head", "model.language_model.embed_tokens"]


def test_parts_of_two_classes_are_refused_if_several_classes_have_both() -> None:
    sources = {"tower": random_adapter(below("model.", TOWER)), "layers": random_adapter(in_class(TEXT))}
    with pytest.raises(
        PlanError, match=r"may be model\.language_model\.layers.* or model\.text_model\.layers"
    ) as error:
        align(sources)
    assert str(error.value).endswith("--rename model.layers.=model.language_model.layers.")


@pytest.mark.parametrize("sources", [("bare", "both"), ("both", "bare"), ("bare", "text", "vision")])
def test_what_may_be_a_tower_or_the_text_is_refused_whatever_the_order(sources: tuple[str, ...]) -> None:
    inner = {"encoder.layers.0.mlp.fc1": (48, 32)}
    text, vision = below("text_model.", inner), below("vision_model.", inner)
    known = {"bare": inner, "both": text | vision, "text": text, "vision": vision}
    adapters = {name: random_adapter(known[name], seed=i) for i, name in enumerate(sources)}
    with pytest.raises(PlanError, match=r"bare: .* may be text_model\..* or vision_model\.") as error:
        align(adapters)
    rename = "encoder.layers.=text_model.encoder.layers."
    assert str(error.value).endswith(f"--rename {rename}")
    old, new = rename.split("=")
    meant = {name.replace(old, new): shape for name, shape in inner.items()}
    renamed = adapters | {"bare": random_adapter(meant, seed=9)}
    assert align(renamed) == renamed


@pytest.mark.parametrize("name", ["x", "elsewhere", "mixer.in_proj"])
def test_a_module_of_no_known_class_keeps_its_name(name: str) -> None:
    sources = {"a": random_adapter(below("model.")), "b": random_adapter({name: (4, 32)})}
    assert align(sources) == sources
