"""Faults on demand in real workers: ``--worker-extension-cls faults.Faults`` makes them heed some seeds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from merged_lora.backends import no_progress
from merged_lora.vllm_plugin.worker.makers import HostMaker

HELD, LAST_RANK_FAILS, ALL_FAIL, THREAD_ENDS = 700_001, 700_002, 700_003, 700_004
HOLD = "MERGED_LORA_TESTS_HOLD"
"""Environment variable with a file: as long as it is there, merges with the seed ``HELD`` are held up."""
STEADY = 710_000
"""With this seed plus a number of seconds, a merge takes that long, in many steps."""
STEP = 0.02
"""Seconds of one of them."""

_make = HostMaker.make


def _faulty(self: Any, number: int, plan: Any, progress: Any = no_progress) -> Any:
    seed = plan.spec.option("seed") or 0
    while seed == HELD and Path(os.environ[HOLD]).exists():
        time.sleep(STEP)
    if seed == THREAD_ENDS:
        raise SystemExit("a fault that ends a thread")
    if seed == ALL_FAIL or (seed == LAST_RANK_FAILS and get_tensor_model_parallel_rank() == 1):
        raise ZeroDivisionError("a fault on demand")
    end = time.monotonic() + (seed - STEADY if STEADY <= seed < STEADY + 1000 else 0)
    while time.monotonic() < end:
        time.sleep(STEP)
        progress(0)
    return _make(self, number, plan, progress)


HostMaker.make = _faulty  # type: ignore[method-assign]


class Faults:
    """What vLLM mixes into its workers: nothing; importing this file is what counts."""
