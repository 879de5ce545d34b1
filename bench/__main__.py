"""``python -m merged_lora.bench cpu``, ``gpu``, ``host``, ``registers``, ``serve`` or ``soak``."""

import argparse
import math
import sys
from pathlib import Path

from merged_lora.errors import MergeError

from .server import ServerDiedError


def main(arguments: list[str]) -> int:
    """The exit code: 0, 1 where ours and the peer's disagree or a server under load failed, 2 where something
    is missing to measure.

    Without arguments, the benchmark of CPU cores.
    """
    parser = argparse.ArgumentParser(prog="python -m merged_lora.bench", description="Benchmarks.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    on_cpu = benchmarks.add_parser("cpu", help="merges on CPU cores beside PEFT's")
    on_cpu.add_argument(
        "--quick", action="store_true", help="leave out the large SVDs, which take PEFT minutes"
    )
    on_cpu.add_argument("--json", type=Path, metavar="FILE", help="write every measured time there")
    on_cpu.add_argument(
        "--space",
        type=_spaces,
        default=("factors",),
        metavar="SPACE[,SPACE]",
        help="factors (default), or of delta and core: one layer, four sources",
    )
    on_gpu = benchmarks.add_parser("gpu", help="merges on a GPU beside copies of the same bytes and PEFT's")
    on_gpu.add_argument(
        "--quick", action="store_true", help="what has an aim alone, without PEFT's large SVDs"
    )
    on_gpu.add_argument("--layers", type=int, default=32, metavar="N", help="of Llama-3-8B; 32 by default")
    on_gpu.add_argument(
        "--agreement-only", action="store_true", help="time nothing; runs under Triton's interpreter too"
    )
    on_gpu.add_argument(
        "--first-day", action="store_true", help="check and measure what some minutes allow, by worth"
    )
    on_gpu.add_argument("--minutes", type=float, default=9.5, metavar="M", help="of the first day; 9.5")
    on_gpu.add_argument(
        "--json", type=Path, metavar="FILE", help="write every measured time there; a folder with --first-day"
    )
    of_kernels = benchmarks.add_parser("registers", help="what the GPU kernels compile to; needs no GPU")
    of_kernels.add_argument("--target", action="append", help="sm_80, sm_90 or gfx942; all by default")
    of_kernels.add_argument(
        "--bounded", action="store_true", help="the usual merges of four bf16 sources and their trim alone"
    )
    of_kernels.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    on_host = benchmarks.add_parser("host", help="what the host does for a write into slots; needs no GPU")
    on_host.add_argument("--layers", type=int, default=32, metavar="N", help="of Llama-3-8B; 32 by default")
    on_host.add_argument("--rounds", type=int, default=30, metavar="N", help="of each write; 30 by default")
    on_host.add_argument("--json", type=Path, metavar="FILE", help="write every measured time there")
    of_serving = benchmarks.add_parser("serve", help="requests to real servers: merges beside plain adapters")
    of_serving.add_argument(
        "--requests", type=int, default=20, metavar="N", help="of each kind; 20 by default"
    )
    of_serving.add_argument("--json", type=Path, metavar="FILE", help="write every measured time there")
    soaking = benchmarks.add_parser("soak", help="random load on a real server, watched for errors")
    soaking.add_argument("--minutes", type=float, default=30, metavar="M", help="30 by default")
    soaking.add_argument("--json", type=Path, metavar="FILE", help="write what was counted there")
    options = parser.parse_args(arguments or ["cpu"])
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"{options.json.parent} is no folder")
    first_day = getattr(options, "first_day", False)
    if first_day and options.json is None:
        parser.error("--first-day needs --json FOLDER, which gets everything that it finds")
    if options.json is not None and options.json.exists() and options.json.is_dir() != first_day:
        parser.error(f"{options.json} is {'no' if first_day else 'a'} folder")
    if getattr(options, "layers", 1) < 1:
        parser.error("--layers must be at least 1")
    if getattr(options, "rounds", 1) < 1:
        parser.error("--rounds must be at least 1")
    if getattr(options, "requests", 2) < 2:
        parser.error("--requests must be at least 2")
    if not 0 < getattr(options, "minutes", 1) < math.inf:
        parser.error("--minutes must be above 0")
    try:
        if options.benchmark == "serve":
            from . import serve

            return serve.run(serve.Work(options.requests), options.json)
        if options.benchmark == "soak":
            from . import soak

            return soak.run(options.minutes, options.json)
        if options.benchmark == "registers":
            from . import registers

            return registers.run(options.target, options.json, options.bounded)
        if first_day:
            from . import first_day as day

            return day.run(options.json, options.minutes, options.layers)
        if options.benchmark == "host":
            from . import host

            return host.run(options.layers, options.rounds, options.json)
        if options.benchmark == "gpu":
            from . import gpu

            work = gpu.work(options.quick, options.layers)
            return gpu.run(work, options.json, options.agreement_only)
        if options.space != ("factors",):
            from . import spaces

            return spaces.run(options.space, options.json)
        from . import cpu

        return cpu.run(options.quick, options.json)
    except ImportError as error:
        parser.error(f"{error.name} is not installed; `make install` brings it")
    except (MergeError, ServerDiedError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _spaces(text: str) -> tuple[str, ...]:
    """The spaces to measure: ``factors`` alone, or one or both of the others."""
    chosen = tuple(text.split(","))
    if chosen != ("factors",) and not set(chosen) <= {"delta", "core"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not factors, delta, core or delta,core")
    return chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
