"""The committed adapters are what the README says: specialists, far better than the base on their task."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from evaluate import load_adapted, score
from merged_lora.adapters import Adapter
from smollm2 import MODEL_DIR
from tasks import TASKS
from train import ADAPTERS_DIR

COUNT = 24


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_specialist_beats_the_base_on_its_own_task(task: str) -> None:
    base = score(*load_adapted(MODEL_DIR, None), task, COUNT)
    specialist = score(*load_adapted(MODEL_DIR, ADAPTERS_DIR / task), task, COUNT)
    assert specialist >= base + 0.75


@pytest.mark.parametrize("task", TASKS)
def test_an_example_adapter_is_small_and_names_its_base(task: str) -> None:
    adapter = Adapter.load(ADAPTERS_DIR / task)
    assert adapter.rank == 8
    assert sum(factors.nbytes for factors in adapter.modules.values()) < 6e6
    assert adapter.header.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_row_spaces_of_two_adapters_have_nothing_in_common() -> None:
    """The A factors of people who do not know each other are independent; one seed for all gave 0.8."""
    adapters = [Adapter.load(ADAPTERS_DIR / task) for task in TASKS]
    for one, other in combinations(adapters, 2):
        shares = []
        for name in one.modules:
            bases = [torch.linalg.qr(a.modules[name].a.float().T).Q for a in (one, other)]  # [in, 8]
            shares.append((bases[0].T @ bases[1]).square().sum().item() / 8)
        chance = sum(8 / factors.a.shape[1] for factors in one.modules.values()) / len(shares)
        assert sum(shares) / len(shares) < 2 * chance
