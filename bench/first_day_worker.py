"""Work off a list of checks or rows, and print a line of JSON for everything that begins or ends.

    python -m merged_lora.bench.first_day_worker ROLE ARGUMENTS

It knows nothing of other workers, nor of time but its own.
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
from functools import partial
from typing import Any

from .first_day import DEVICE_LOST

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Item:
    """One check or one row.

    keys: a strategy and a dtype each, in one string: what a check is about, or what a row needs a check of.
    run: does it and returns the message about it.
    """

    name: str
    keys: tuple[str, ...]
    run: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Work off a role's items and return the exit code.

    arguments: the role, which is ``sanitized``, ``checks`` or ``rows``, and its arguments as JSON.
    """
    role, given = arguments[0], json.loads(arguments[1])
    send = _reserve_stdout()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if role == "sanitized":
        return _merge_small(send)
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
        send({"device": bench.facts()})
        items = row_items(bench, given["wrong"], given["right"])

    def is_lost() -> bool:
        # After a fault on a CUDA device every call raises it again.
        try:
            if backend.device.type == "cuda":
                torch.cuda.synchronize(backend.device)
        except RuntimeError:
            return True
        return False

    return work_off(items, given["skip"], given["seconds"], send, is_lost)


def work_off(
    items: Sequence[Item], skip: int, seconds: float, send: Send, is_lost: Callable[[], bool]
) -> int:
    """Do all items but the first ``skip`` until the seconds are over, and return the exit code.

    An item that raises has failed, and the next one is done, unless the device is lost.
    """
    end = time.monotonic() + seconds
    send({"planned": [{"name": item.name, "keys": item.keys} for item in items]})
    for item in items[skip:]:
        if time.monotonic() > end:
            return 0
        send({"begin": item.name})
        try:
            result = item.run()
        except Exception:  # whatever it is, it is reported, and it is this item's
            result = {"failed": traceback.format_exc()}
        send({"end": item.name, **result})
        if "failed" in result and is_lost():
            return DEVICE_LOST
    return 0


def check_items(backend: Any, part: int, parts: int) -> list[Item]:
    """Every ``parts``-th check, beginning with number ``part``."""
    from . import device_agreement

    items = [
        Item(f"{about}: {check.what}", check.keys, lambda check=check: {"wrong": check.find()})  # type: ignore[misc]
        for about, checks in device_agreement.groups(backend)
        for check in checks
    ]
    return items[part::parts]


def row_items(bench: Any, wrong: Collection[str], right: Collection[str]) -> list[Item]:
    """Every row; a row is not measured if a check found its key wrong, or if none found it right."""
    from . import gpu

    def measure(key: str, case: gpu.Case) -> dict[str, Any]:
        if key in wrong:
            return {"withheld": f"a check of {key} failed"}
        if key not in right:
            return {"withheld": f"no check of {key} was made"}
        try:
            return {"row": asdict(case.measure())}
        except gpu.LeftOutError as why:
            return {"left_out": str(why)}

    keyed = ((f"{case.strategy} {case.dtype}", case) for case in bench.cases())
    return [Item(case.name, (key,), partial(measure, key, case)) for key, case in keyed]


def _merge_small(send: Send) -> int:
    """Search for thresholds once, and merge factors and a streamed delta, to be watched by the sanitizer."""
    from merged_lora.backends import load_backend
    from merged_lora.planning import make_plan
    from merged_lora.spec import parse

    from . import cases
    from .agreement import DTYPES

    backend = load_backend("triton")
    sources = cases.random_sources(cases.SMALL, 2, 8, DTYPES[0])
    for spec in ("ties(a, 0.5*b)", "ties_svd(a, 0.5*b)"):
        backend.merge(make_plan(parse(spec), sources))
        send({"merged": [spec]})
    return 0


def _reserve_stdout() -> Send:
    """Keep standard output for messages and redirect other prints to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return send


def _end_with_parent() -> None:
    """Exit when standard input ends, which it does when the parent process has ended, however it did."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would abort the interpreter's own end
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
