"""Serves the demonstration's model and adapters with the playground, until Ctrl-C.

    python examples/playground.py

Prints the address of the page, on which weights are dragged and answers follow. ``make playground`` runs it.
"""

from __future__ import annotations

import os
import sys
import time
from urllib.parse import urlencode

import torch

from demo import LOG, calibrate_adapters, server_flags
from merged_lora.bench.launcher import ServerDiedError, VllmServer, print_dot
from merged_lora.commands.running import terminated_cleanly
from smollm2 import MODEL_DIR, make_model
from tasks import TASKS, examples

SLOTS = 4
"""As many as there are answers of adapters beside each other: three sources and their merge."""


def main() -> int:
    """Run the server; returns the exit code."""
    make_model(MODEL_DIR)
    calibrate_adapters()
    flags = [*server_flags(SLOTS), "--merged-lora-playground", "--merged-lora-runtime-aliases"]
    if not torch.cuda.is_available():  # nobody else asks here: a merge may have every core
        flags += ["--merged-lora-threads", str(len(os.sched_getaffinity(0)))]
    print(f"starting vllm serve (a minute or so; its log: {LOG}) ", end="", flush=True)
    try:
        with terminated_cleanly(), VllmServer(MODEL_DIR, *flags, log=LOG, waiting=print_dot) as server:
            prompt = urlencode({"prompt": examples(TASKS["sql"], "test", 1)[0].prompt})
            print(f"\n\nopen {server.url}/merged_lora/#{prompt}\nand end it here with Ctrl-C", flush=True)
            while server.running:
                time.sleep(0.5)
            raise ServerDiedError(f"the server ended; the end of its log:\n{server.tail()}")
    except KeyboardInterrupt:
        print("\nthe server has ended")
        return 0


if __name__ == "__main__":
    sys.exit(main())
