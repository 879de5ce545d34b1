"""Factors of experts: taken apart and put together as PEFT's ``ParamWrapper`` multiplies them."""

import json
from pathlib import Path

import pytest
import torch

from making import peft_tensors, write_by_hand
from merged_lora import merge
from merged_lora.adapters import Adapter
from merged_lora.errors import AdapterError, PlanError
from merged_lora.factors import Factors
from merged_lora.files.experts import put_together, take_apart
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
