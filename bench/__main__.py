"""``python -m merged_lora.bench cpu [--quick] [--json FILE]``."""

import argparse
import sys
from pathlib import Path

from . import cpu


def main(arguments: list[str]) -> int:
    """The exit code: 0, or 1 where ours and the peer's disagree; without arguments, every benchmark."""
    parser = argparse.ArgumentParser(prog="python -m merged_lora.bench", description="Benchmarks.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    on_cpu = benchmarks.add_parser("cpu", help="merges on CPU cores beside PEFT's")
    on_cpu.add_argument(
        "--quick", action="store_true", help="leave out PEFT's large SVDs, which take minutes"
    )
    on_cpu.add_argument("--json", type=Path, metavar="FILE", help="write every measured time there")
    options = parser.parse_args(arguments or ["cpu"])
    return cpu.run(options.quick, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
