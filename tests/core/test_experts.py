"""Factors of experts: taken apart and put together, as PEFT's ``ParamWrapper`` has them and as stacks."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from making import peft_tensors, write_by_hand
from merged_lora import merge
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError, PlanError
from merged_lora.factors import Factors
from merged_lora.files.experts import KEEPING, put_together, take_apart
from merged_lora.files.parts import Choice
from merged_lora.files.reading import read_adapter

HOLDER = "model.layers.0.mlp.experts"
E, R, IN, OUT = 3, 2, 5, 7
GATE_UP, DOWN = f"{HOLDER}.base_layer", HOLDER
"""PEFT wraps the parameter that the model defines first before the other, so that it lies inside."""


def pair(seed: int, experts: int = E) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of all experts of one parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (experts * R, IN), (OUT, R * experts)
    a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return a, b


def deltas(a: torch.Tensor, b: torch.Tensor, experts: int = E) -> torch.Tensor:
    """What PEFT adds to ``[experts, out, in]``: "o r e, e r i -> e o i"."""
    return torch.einsum(
        "ujn,njv->nuv", b.double().reshape(OUT, -1, experts), a.double().reshape(experts, -1, IN)
    )


def stored(name: str, seed: int) -> dict[str, torch.Tensor]:
    a, b = pair(seed)
    return {f"base_model.model.{name}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}


def write(folder: Path, seed: int, targets: object = None) -> Path:
    names = targets or ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tensors = stored(GATE_UP, seed) | stored(DOWN, seed + 1) | peft_tensors("model.layers.0.q_proj", rank=R)
    return write_by_hand(folder, tensors, r=R, lora_alpha=2 * R, target_parameters=names)


@pytest.mark.parametrize(
    "targets",
    [None, ["down_proj", "gate_up_proj"], [f"{HOLDER}.down_proj", f"{HOLDER}.gate_up_proj"]],
    ids=["holder", "short", "full"],
)
def test_every_expert_of_a_file_is_a_module_with_its_own_delta(tmp_path: Path, targets: object) -> None:
    modules = Adapter.load(write(tmp_path / "a", 1, targets)).modules
    names = {f"{HOLDER}.{name}[{i}]" for name in ("gate_up_proj", "down_proj") for i in range(E)}
    assert modules.keys() == names | {"model.layers.0.q_proj"}
    for name, seed in (("gate_up_proj", 1), ("down_proj", 2)):
        for i, delta in enumerate(deltas(*pair(seed))):
            assert torch.equal(modules[f"{HOLDER}.{name}[{i}]"].delta(), 2 * delta)


def test_a_saved_adapter_of_experts_has_the_tensors_that_it_was_read_from(tmp_path: Path) -> None:
    source = write(tmp_path / "a", 1)
    adapter = Adapter.load(source)
    adapter.save(tmp_path / "b")
    again = Adapter.load(tmp_path / "b")
    assert again.digest == adapter.digest
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"{HOLDER}.down_proj", f"{HOLDER}.gate_up_proj"]
    assert (config["r"], config["target_modules"]) == (R, ["model.layers.0.q_proj"])


def test_a_merge_adds_experts_one_by_one(tmp_path: Path) -> None:
    sources = {name: write(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 11))}
    merged = merge("sum(0.5*a, 2*b)", sources)
    for i in range(E):
        found = merged.modules[f"{HOLDER}.down_proj[{i}]"].delta()
        expected = deltas(*pair(2))[i] + 4 * deltas(*pair(12))[i]
        assert torch.allclose(found, expected, rtol=0, atol=2**-20 * float(expected.abs().max()))


def test_experts_of_unequal_ranks_are_filled_up_with_zeros() -> None:
    a, b = pair(1)
    experts = take_apart(Path("x"), "m.w", R, a, b)
    modules = {name: Factors(x, y) for name, (x, y) in experts.items()}
    modules["m.w[1]"] = Factors(modules["m.w[1]"].a[:1].clone(), modules["m.w[1]"].b[:, :1].clone())
    joined = put_together(modules)["m"]
    expected = [modules[f"m.w[{i}]"].delta() for i in range(E)]
    assert torch.equal(deltas(joined.a, joined.b), torch.stack(expected))


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_factor_that_all_experts_share_is_that_of_each(side: str) -> None:
    a, b = pair(1)
    a, b = (a[:R], b) if side == "a" else (a, b[:, :R])
    experts = take_apart(Path("x"), "m.w", R, a, b)
    assert len(experts) == E
    whole = a.repeat(E, 1) if side == "a" else a, b.repeat_interleave(E, 1) if side == "b" else b
    for (x, y), delta in zip(experts.values(), deltas(*whole), strict=True):
        assert torch.equal(y.double() @ x.double(), delta)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5, 4), (4, 6), "which rank 2 does not divide into experts"),
        ((6, 4), (4, 5), "which rank 2 does not divide into experts"),
        ((6, 4), (4, 4), "has 3 experts in lora_A and 2 in lora_B"),
    ],
)
def test_shapes_that_are_of_no_number_of_experts_are_refused(
    a: tuple[int, int], b: tuple[int, int], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        take_apart(Path("x"), "m.w", 2, torch.ones(a), torch.ones(b))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["mlp.experts.gate_up_proj"],
            "which of the parameters mlp.experts.gate_up_proj the",
        ),
        (
            ["mlp.experts.w1", "mlp.experts.w2"],
            "which of the parameters mlp.experts.w1, mlp.experts.w2 the",
        ),
    ],
)
def test_parameters_whose_order_is_unknown_are_refused(
    tmp_path: Path, targets: list[str], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter.load(write(tmp_path / "a", 1, targets))


def test_what_is_not_whole_cannot_be_stored() -> None:
    one = Factors(torch.ones(R, IN), torch.ones(OUT, R))
    with pytest.raises(AdapterError, match=r"m.w: the factors of expert 0 are missing"):
        put_together({"m.w[1]": one})
    other = Factors(one.a, one.b, 2.0)
    with pytest.raises(AdapterError, match=r"m.w: the experts have different scalings"):
        put_together({"m.w[0]": one, "m.w[1]": other})
    with pytest.raises(AdapterError, match=r"m: the order of the parameters v, w is not known"):
        put_together({"m.w[0]": one, "m.v[0]": one})


def test_experts_of_one_parameter_are_chosen_together(tmp_path: Path) -> None:
    sources = {"a": write(tmp_path / "a", 1), "b": write(tmp_path / "b", 2)}
    with pytest.raises(PlanError, match="gate_up_proj is chosen for some experts alone"):
        merge('sum(a, b, without="gate_up_proj[2]")', sources)
    kept = merge("sum(a, b, without=gate_up_proj)", sources).modules
    assert kept.keys() == {"model.layers.0.q_proj", *(f"{HOLDER}.down_proj[{i}]" for i in range(E))}


def test_sources_of_unequal_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    a, b = pair(1, experts=E + 1)
    tensors = {f"base_model.model.{HOLDER}.lora_{side}.weight": x for side, x in (("A", a), ("B", b))}
    more = write_by_hand(tmp_path / "b", tensors, r=R, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(PlanError, match=r"down_proj has different numbers of experts: 3 in a, 4 in b"):
        merge("sum(a, b)", {"a": write(tmp_path / "a", 1), "b": more})


def test_a_module_is_never_overwritten_by_a_parameter() -> None:
    one = Factors(torch.ones(R, IN), torch.ones(OUT, R))
    with pytest.raises(AdapterError, match=f"{HOLDER} would be both a module and the parameter"):
        put_together({f"{HOLDER}.down_proj[0]": one, HOLDER: one})


def test_experts_that_are_modules_of_the_base_model_stay_as_they_are(tmp_path: Path) -> None:
    names = [f"{HOLDER}.{i}.{name}" for i in range(E) for name in ("gate_proj", "up_proj")]
    folder = write_by_hand(tmp_path / "a", peft_tensors(*names))
    adapter = Adapter.load(folder)
    assert adapter.modules.keys() == set(names)
    adapter.save(tmp_path / "b")
    assert read_adapter(tmp_path / "b", Choice()).modules.keys() == set(names)


# Stacks, of which all experts share a factor

STACKS = {"w1": ((1, R, IN), (E, OUT, R)), "w2": ((E, R, OUT), (1, IN, R)), "w3": ((1, R, IN), (E, OUT, R))}
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def stacks(seed: int, shapes: Shapes = STACKS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{HOLDER}.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name, pair in shapes.items()
        for side, shape in zip("AB", pair, strict=True)
    }


def write_stacks(folder: Path, seed: int = 1, shapes: Shapes = STACKS, **config: object) -> Path:
    return write_by_hand(folder, stacks(seed, shapes), **{"r": R, "lora_alpha": 2 * R, **config})


def test_every_expert_of_a_stack_is_a_module_with_its_own_delta(tmp_path: Path) -> None:
    modules = Adapter.load(write_stacks(tmp_path / "a", alpha_pattern={"w3": R})).modules
    assert modules.keys() == {f"{HOLDER}.{name}[{i}]" for name in STACKS for i in range(E)}
    found = stacks(1)
    for name in STACKS:
        a, b = (found[f"base_model.model.{HOLDER}.{name}.lora_{side}.weight"].double() for side in "AB")
        expected = (1 if name == "w3" else 2) * (b @ a)
        for i in range(E):
            assert torch.equal(modules[f"{HOLDER}.{name}[{i}]"].delta(), expected[i])


def test_a_shared_factor_is_in_memory_once(tmp_path: Path) -> None:
    modules = Adapter.load(write_stacks(tmp_path / "a")).modules
    assert len({modules[f"{HOLDER}.w1[{i}]"].a.data_ptr() for i in range(E)}) == 1
    assert len({modules[f"{HOLDER}.w2[{i}]"].b.data_ptr() for i in range(E)}) == 1


def test_a_saved_adapter_of_stacks_is_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    shapes = {**STACKS, "w2": ((E, R + 1, OUT), (1, IN, R + 1))}
    patterns = {"rank_pattern": {"w2": R + 1}, "alpha_pattern": {"w2": 7}}
    adapter = Adapter.load(write_stacks(tmp_path / "a", 1, shapes, **patterns))
    for keep_ranks in (True, False):
        adapter.save(tmp_path / "b", overwrite=True, keep_ranks=keep_ranks)
        assert Adapter.load(tmp_path / "b").digest == adapter.digest
    adapter.save(tmp_path / "b", overwrite=True, keep_ranks=True)
    written = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    read = stacks(1, shapes)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"{HOLDER}.{name}" for name in STACKS]
    assert "target_parameters" not in config


def test_only_the_factors_that_vllm_shares_are_written_once(tmp_path: Path) -> None:
    """It takes one A of w1 and w3 and one B of w2, and all others by expert, also if they are equal."""
    equal = {name: tensor[:1].expand(E, -1, -1).contiguous() for name, tensor in stacks(1).items()}
    Adapter.load(write_by_hand(tmp_path / "a", equal, r=R)).save(tmp_path / "b")
    written = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert {name: t.shape for name, t in written.items()} == {n: t.shape for n, t in stacks(1).items()}


@pytest.mark.parametrize("strategy", ["sum", *KEEPING])
def test_a_merge_of_sources_that_share_factors_shares_them(tmp_path: Path, strategy: str) -> None:
    sources = {name: write_stacks(tmp_path / name, seed) for seed, name in enumerate("ab")}
    merged = merge(f"{strategy}(0.5*a, -2*b)", sources, backend="cpu")
    merged.save(tmp_path / "merged")
    assert Adapter.load(tmp_path / "merged").digest == merged.digest
    written = safetensors.torch.load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert [len(written[name]) for name in sorted(written)] == [1, E, E, 1, 1, E]


def test_experts_that_share_nothing_cannot_be_stored_as_stacks(tmp_path: Path) -> None:
    """vLLM takes the factor of the first expert for all."""
    shapes = {**STACKS, "w1": ((E, R, IN), (E, OUT, R))}
    adapter = Adapter.load(write_stacks(tmp_path / "a", 1, shapes))
    with pytest.raises(AdapterError, match=r"experts\.w1: each expert has its own lora_A.*of cat, linear"):
        adapter.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_experts_in_two_forms_cannot_be_stored_together(tmp_path: Path) -> None:
    both = Adapter(
        {
            **Adapter.load(write(tmp_path / "a", 1)).modules,
            **Adapter.load(write_stacks(tmp_path / "b")).modules,
        }
    )
    with pytest.raises(AdapterError, match=r"w1, w2, w3 are experts in two forms"):
        both.save(tmp_path / "c")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w1": ((1, R + 1, IN), (E, OUT, R + 1))}, "but adapter_config.json says rank 2"),
        ({"w1": ((1, R, IN), (E, OUT, R + 1))}, "but adapter_config.json says rank 2"),
        ({"w1": ((2, R, IN), (E, OUT, R))}, "has 2 experts in lora_A and 3 in lora_B"),
        ({"w2": ((1, R, OUT), (1, IN, R))}, r"w1 has 3 experts, and .*w2 has 1"),
        ({"w3": ((R, IN), (E, OUT, R))}, r"w3 lora_B has shape \(3, 7, 2\), not a matrix"),
        ({"w3": ((1, R, IN), (0, OUT, R))}, r"w3 lora_B has shape \(0, 7, 2\), not a matrix"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(tmp_path: Path, shapes: Shapes, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter.load(write_stacks(tmp_path / "a", 1, {**STACKS, **shapes}))


def test_an_expert_that_is_in_a_file_twice_is_refused(tmp_path: Path) -> None:
    tensors = stored(HOLDER, 1) | stacks(1, {"down_proj": ((E, R, IN), (E, OUT, R))})
    folder = write_by_hand(tmp_path / "a", tensors, r=R, target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterError, match=r"down_proj\[0\] is in two pairs"):
        Adapter.load(folder)
