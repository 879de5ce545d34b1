"""A worker of a GPU's first day: it works off a list of items, and tells of each in a line of JSON.

    python -m merged_lora.bench.first_day_worker ROLE ARGUMENTS

Knows nothing of other workers, nor of time but its own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .recording import LOST


@dataclass(frozen=True)
class Item:
    """What a worker does at a time.

    keys: a strategy and a dtype each: what a check vouches for, what a row stands on.  run: what it tells.
    """

    name: str
    keys: tuple[str, ...]
    run: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Work off a role's items and tell of each in a line of JSON on standard output; the exit code."""
    role, given = arguments[0], json.loads(arguments[1])
    tell = _telling()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if role == "sanitized":
        return _merge_small(tell)
    import torch

    from merged_lora.errors import BackendError

    from . import gpu

    try:
        backend, timer = gpu.on_a_gpu()
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    if role == "checks":
        items = check_items(backend, given["part"], given["parts"])
    else:
        bench = gpu.Bench(gpu.first_day_work(given["layers"]), timer)
        tell({"device": bench.facts()})
        items = row_items(bench, given["withheld"], given["vouched"])

    def lost() -> bool:
        # A fault on a CUDA device is told again by every call behind it.
        try:
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)
        except RuntimeError:
            return True
        return False

    return work_off(items, given["skip"], given["seconds"], tell, lost)


def work_off(
    items: Sequence[Item],
    skip: int,
    seconds: float,
    tell: Callable[[dict[str, Any]], None],
    lost: Callable[[], bool],
) -> int:
    """Do all items but the first ``skip`` until the seconds are over; the exit code.

    An item that raises has failed, and the next one is done; where the device is lost by it, this ends.
    """
    end = time.monotonic() + seconds
    tell({"planned": [{"name": item.name, "keys": item.keys} for item in items]})
    for item in items[skip:]:
        if time.monotonic() > end:
            return 0
        tell({"begin": item.name})
        try:
            told = item.run()
        except Exception:  # whatever it is, it is told, and it is this item's
            told = {"failed": traceback.format_exc()}
        tell({"end": item.name, **told})
        if "failed" in told and lost():
            return LOST
    return 0


def check_items(backend: Any, part: int, parts: int) -> list[Item]:
    """Every ``parts``-th check, from ``part`` on."""
    from . import device_agreement

    items = [
        Item(
            f"{about}: {check.what}",
            tuple(f"{strategy} {dtype}" for strategy in check.strategies for dtype in check.dtypes),
            lambda check=check: {"wrong": check.find()},  # type: ignore[misc]
        )
        for about, checks in device_agreement.groups(backend)
        for check in checks
    ]
    return items[part::parts]


def row_items(bench: Any, withheld: Collection[str], vouched: Collection[str]) -> list[Item]:
    """Every row; those that stand on what was found wrong, or on what no check vouches for, tell why not."""
    from . import gpu

    def measure(case: gpu.Case) -> dict[str, Any]:
        key = f"{case.strategy} {case.dtype}"
        if key in withheld:
            return {"withheld": f"a check of {key} failed"}
        if key not in vouched:
            return {"withheld": f"no check of {key} was made"}
        try:
            return {"row": asdict(case.measure())}
        except gpu.LeftOutError as why:
            return {"left out": str(why)}

    return [
        Item(case.name, (f"{case.strategy} {case.dtype}",), lambda case=case: measure(case))  # type: ignore[misc]
        for case in bench.cases()
    ]


def _merge_small(tell: Callable[[dict[str, Any]], None]) -> int:
    """One search for thresholds, one merge of factors and one of a streamed delta, to be watched."""
    from merged_lora.backends import load_backend
    from merged_lora.planning import make_plan
    from merged_lora.spec import parse

    from . import cases
    from .agreement import DTYPES

    backend = load_backend("triton")
    sources = cases.random_sources(cases.SMALL, 2, 8, DTYPES[0])
    for spec in ("ties(a, 0.5*b)", "ties_svd(a, 0.5*b)"):
        backend.merge(make_plan(parse(spec), sources), lambda _: None)
        tell({"merged": [spec]})
    return 0


def _telling() -> Callable[[dict[str, Any]], None]:
    """Keeps standard output for messages; what else prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return tell


def _end_with_parent() -> None:
    """Standard input ends when the process that started this one has ended, however it did."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would abort the interpreter's own end
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
