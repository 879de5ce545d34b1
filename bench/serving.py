"""What the measurements of servers share: the example model and adapters, flags, and one request.

Knows nothing of merges.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from merged_lora.errors import MergeError

from . import machine
from .server import Server

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
ADAPTERS = ROOT / "examples" / "adapters"
NAMES = ("sql", "json", "tone")
PROMPT = "Write SQL:"
"""Short, so that what comes on top of a step is seen."""

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--max-lora-rank", "32", "--no-enable-prefix-caching"),
)
"""Of every server here.  Rank 32 takes three of the example adapters side by side.  With the prefix cache, a
request for the same again would skip what the first had to do."""

PATIENCE = 120.0
"""Seconds until a token that does not come is an error."""


def threads() -> dict[str, str]:
    """The environment in which a server leaves one core to its API server and to the client.

    Without, the threads of a step wait at every barrier for one that was put aside, and times vary widely.
    """
    return {"OMP_NUM_THREADS": str(max(1, machine.cores() - 1))}


def dot() -> None:
    """A sign of life while a server starts."""
    print(".", end="", flush=True)


def check() -> None:
    """Raise MergeError where the model, the adapters or vLLM is missing."""
    if not Path(sys.executable).with_name("vllm").exists():
        raise MergeError("vLLM is not installed; `make install` brings it")
    if not (MODEL / "config.json").is_file():
        raise MergeError(f"no model in {MODEL}; `make model` makes it")
    missing = [name for name in NAMES if not (ADAPTERS / name / "adapter_config.json").is_file()]
    if missing:
        raise MergeError(f"no adapter in {ADAPTERS / missing[0]}; this is run from a checkout")


def modules(folders: dict[str, Path]) -> list[str]:
    """The flag by which vLLM serves adapters."""
    return ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]


def example_folders() -> dict[str, Path]:
    """The example adapters, by name."""
    return {name: ADAPTERS / name for name in NAMES}


def body(model: str, tokens: int) -> dict[str, object]:
    """A request for exactly so many tokens."""
    return {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def complete(server: Server, model: str, tokens: int = 1) -> int:
    """The number of tokens that came; raises MergeError where the server refuses."""
    status, reply = server.post("/v1/completions", body(model, tokens))
    if status != 200:
        raise MergeError(f"{model!r} got status {status}: {reply}")
    return int(reply["usage"]["completion_tokens"])


class Stream:
    """A streaming request under way, whose tokens' times are noted; use it in a ``with`` statement.

    Leaving ends the request.  times: by ``time.perf_counter``, one per event that held text.
    """

    def __init__(self, server: Server, model: str, tokens: int) -> None:
        self.times: list[float] = []
        self._server = server
        self._body = body(model, tokens) | {"stream": True}
        self._came = threading.Condition()
        self._ended = False
        self._leaving = False
        self._failure = "it ended"
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        self._thread.join(PATIENCE)

    def wait(self, tokens: int) -> None:
        """Return when so many more have come; raises MergeError where they do not."""
        with self._came:
            wanted = len(self.times) + tokens
            came = self._came.wait_for(lambda: self._ended or len(self.times) >= wanted, PATIENCE)
            if not came or len(self.times) < wanted:
                reason = self._failure if self._ended else f"no token in {PATIENCE:.0f} s"
                raise MergeError(f"a stream of {self._body['model']!r} broke off: {reason}")

    def _read(self) -> None:
        try:
            with self._server.stream("/v1/completions", self._body, PATIENCE) as reply:
                for line in reply:
                    if line.startswith(b"data: {"):
                        with self._came:
                            self.times.append(time.perf_counter())
                            self._came.notify_all()
                    if self._leaving:
                        break
        except OSError as error:
            self._failure = str(error)
        finally:
            with self._came:
                self._ended = True
                self._came.notify_all()
