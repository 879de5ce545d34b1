"""Faults on demand in real workers: ``--worker-extension-cls faults.Faults`` makes them heed some seeds."""

from __future__ import annotations

import time
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from merged_lora.vllm_plugin.worker.makers import HostMaker

SLOW, LAST_RANK_FAILS, ALL_FAIL = 700_001, 700_002, 700_003
SECONDS = 2.0

_make = HostMaker.make


def _faulty(self: Any, number: int, plan: Any, *progress: Any) -> Any:
    seed = plan.spec.option("seed")
    if seed == SLOW:
        time.sleep(SECONDS)
    if seed == ALL_FAIL or (seed == LAST_RANK_FAILS and get_tensor_model_parallel_rank() == 1):
        raise ZeroDivisionError("a fault on demand")
    return _make(self, number, plan, *progress)


HostMaker.make = _faulty  # type: ignore[method-assign,assignment]


class Faults:
    """What vLLM mixes into its workers: nothing; importing this file is what counts."""
