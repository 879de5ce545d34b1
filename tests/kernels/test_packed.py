"""Sources on the device: packed without change, uploaded once, evicted in order, within the budget."""

from __future__ import annotations

import pytest
import torch

from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.errors import PlanError
from merged_lora.factors import Factors
from merged_lora.triton_kernels.packed import ALIGNMENT, DeviceSources, Resident, pack

CPU = torch.device("cpu")
SHAPES = {"x.q": (64, 32), "x.down": (32, 64), "y.q": (64, 32), "z.q": (64, 32)}


def adapter(seed: int, rank: int = 4) -> Adapter:
    return random_adapter(SHAPES, rank, torch.bfloat16, seed)


def size() -> int:
    """Bytes of one adapter, packed."""
    return int(pack(adapter(0), CPU).host.numel())


def budget_for(count: int) -> DeviceSources:
    sources = DeviceSources(CPU)
    sources.reserve(count * size())
    return sources


def stored(resident: Resident, names: list[str], side: int) -> list[torch.Tensor]:
    return list(resident.stack(names, side))


def test_packing_changes_neither_content_nor_identity() -> None:
    mixed = Adapter(
        {
            "b": Factors(torch.randn(3, 5), torch.randn(7, 3).half(), 0.5),
            "a": Factors(torch.randn(2, 9).bfloat16(), torch.randn(4, 2).bfloat16(), 2.0, True),
        }
    )
    twin = DeviceSources(CPU).adopt(mixed)
    assert twin.digest == mixed.digest
    assert list(twin.modules) == list(mixed.modules)
    for name, f in mixed.modules.items():
        assert torch.equal(twin.modules[name].a, f.a)
        assert torch.equal(twin.modules[name].b, f.b)


def test_every_tensor_begins_at_an_aligned_place_and_is_filled_up_with_zeros() -> None:
    packed = pack(random_adapter({"m": (3, 5), "n": (7, 11)}, 1), CPU)
    assert (packed.offsets % ALIGNMENT == 0).all()
    used = torch.zeros_like(packed.host, dtype=torch.bool)
    for name, i in packed.index.items():
        f = packed.modules[name]
        for start, tensor in zip(packed.offsets[i], (f.a, f.b), strict=True):
            used[start : start + tensor.nbytes] = True
    assert not packed.host[~used].any()


def test_what_is_uploaded_is_what_was_packed() -> None:
    source = adapter(0)
    (resident,) = budget_for(1).load([source])
    for name, f in source.modules.items():
        assert torch.equal(stored(resident, [name], 0)[0], f.a)
        assert torch.equal(stored(resident, [name], 1)[0], f.b)


def test_modules_of_one_kind_are_one_view_of_the_buffer() -> None:
    source = adapter(0)
    (resident,) = budget_for(1).load([source])
    names = ["x.q", "y.q", "z.q"]
    stack = resident.stack(names, 1)
    assert stack.untyped_storage().data_ptr() == resident.buffer.untyped_storage().data_ptr()
    assert torch.equal(stack, torch.stack([source.modules[name].b for name in names]))


def test_any_choice_of_modules_can_be_stacked() -> None:
    source = random_adapter({f"m{i}": (8, 8) for i in range(6)}, 2)
    (resident,) = DeviceSources(CPU).load([source])
    names = ["m0", "m1", "m4"]
    assert torch.equal(resident.stack(names, 0), torch.stack([source.modules[name].a for name in names]))


def test_the_least_recently_used_adapter_is_evicted() -> None:
    sources = budget_for(2)
    first, second, third = adapter(1), adapter(2), adapter(3)
    (kept, _) = sources.load([first, second])
    sources.load([first])
    (newest,) = sources.load([third])
    assert sources.load([first, third]) == [kept, newest]


def test_an_adapter_that_is_there_is_not_uploaded_again() -> None:
    sources = budget_for(2)
    first = adapter(1)
    (before,) = sources.load([first])
    (after,) = sources.load([adapter(1)])  # another object of the same content
    assert after is before


def test_an_adapter_under_other_names_is_another_one_on_the_device() -> None:
    sources, first = budget_for(2), adapter(0)
    names = {"x.q": ("y.q",), "y.q": ("x.q",)}
    swapped = {new: first.modules[old] for old, (new,) in names.items()}
    other = first.renamed({**first.modules, **swapped}, names)
    assert other.digest == first.digest
    (plain,), (renamed,) = sources.load([first]), sources.load([other])
    assert torch.equal(stored(plain, ["x.q"], 0)[0], stored(renamed, ["y.q"], 0)[0])
    assert not torch.equal(stored(plain, ["x.q"], 0)[0], stored(renamed, ["x.q"], 0)[0])


def test_the_sources_of_one_merge_never_evict_each_other() -> None:
    sources = budget_for(2)
    for pair in ([adapter(1), adapter(2)], [adapter(2), adapter(3)], [adapter(4), adapter(5)]):
        residents = sources.load(pair)
        for source, resident in zip(pair, residents, strict=True):
            assert torch.equal(stored(resident, ["x.q"], 0)[0], source.modules["x.q"].a)


def test_room_in_pieces_is_room() -> None:
    sources = budget_for(3)
    sources.load([adapter(1), adapter(2), adapter(3)])
    sources.load([adapter(1), adapter(3)])  # so that 2, in the middle, is the one to go
    large = adapter(9, rank=8)
    # Beside the third, which is wanted too, there is room for it only if the third moves.
    third, other = sources.load([adapter(3), large])
    assert torch.equal(stored(third, ["x.q"], 0)[0], adapter(3).modules["x.q"].a)
    assert torch.equal(stored(other, ["x.q"], 0)[0], large.modules["x.q"].a)


def test_more_than_the_reserved_memory_is_refused_and_nothing_is_evicted() -> None:
    sources = budget_for(2)
    kept = sources.load([adapter(1)])
    with pytest.raises(PlanError, match=r"sources of this merge take .* reserved; merge fewer sources"):
        sources.load([adapter(2), adapter(3), adapter(4)])
    assert sources.load([adapter(1)]) == kept


def test_without_a_reservation_the_budget_grows() -> None:
    sources = DeviceSources(CPU)
    sources._arena = torch.empty(10, dtype=torch.uint8)
    (resident,) = sources.load([adapter(1)])
    assert torch.equal(stored(resident, ["x.q"], 0)[0], adapter(1).modules["x.q"].a)


def test_adapters_nobody_holds_are_forgotten_on_the_host() -> None:
    sources = budget_for(1)
    twin = sources.adopt(adapter(1))
    sources.load([twin])
    del twin
    assert len(sources._packed) == 0
