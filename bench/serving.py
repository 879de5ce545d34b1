"""What the measurements of servers share: the example model and adapters, flags, and requests.

It knows nothing of merges.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from openai import OpenAI, Stream
from openai.types import Completion

from merged_lora.cores import usable_cores
from merged_lora.errors import MergeError

from .launcher import VllmServer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
ADAPTERS = ROOT / "examples" / "adapters"
NAMES = ("sql", "json", "tone")
PROMPT = "Write SQL:"
"""Short, so that the cost of everything beside the step itself is visible."""

FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8"),
    *("--max-lora-rank", "32", "--no-enable-prefix-caching"),
)
"""Flags of every server of the examples.  Rank 32 has room for three of the example adapters side by side.
With the prefix cache, a repeated request would skip what the first one had to do."""

PATIENCE = 300.0
"""Seconds without a token after which a request has failed: several times the slowest merge."""


def threads() -> dict[str, str]:
    """The environment in which a server leaves one core to its API server and to the client.

    Without it the threads of a step wait at every barrier for one that lost its core, and times vary widely.
    """
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() - 1))}


def check() -> None:
    """Raise MergeError if the model, the adapters or vLLM is missing."""
    if not Path(sys.executable).with_name("vllm").exists():
        raise MergeError("vLLM is not installed; `make install` brings it")
    if not (MODEL / "config.json").is_file():
        raise MergeError(f"no model in {MODEL}; `make model` makes it")
    missing = [name for name in NAMES if not (ADAPTERS / name / "adapter_config.json").is_file()]
    if missing:
        raise MergeError(f"no adapter in {ADAPTERS / missing[0]}; this is run from a checkout")


def modules(folders: Mapping[str, Path]) -> list[str]:
    """The flag with which vLLM serves the adapters in these folders."""
    return ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]


def example_folders() -> dict[str, Path]:
    """The folders of the example adapters, by name."""
    return {name: ADAPTERS / name for name in NAMES}


def connect(server: VllmServer) -> OpenAI:
    """A client of a server that never retries; its requests raise ``openai.APIError``."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)


def complete(client: OpenAI, model: str, tokens: int = 1) -> Completion:
    """A completion of exactly that many tokens."""
    return client.completions.create(
        model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
    )


def stream(client: OpenAI, model: str, tokens: int) -> Stream[Completion]:
    """A stream of exactly that many tokens; each chunk says how many there are so far."""
    return client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    )


def tokens_of(chunk: Completion) -> int:
    """The tokens of a stream up to a chunk."""
    return chunk.usage.completion_tokens if chunk.usage is not None else 0


def logprobs(client: OpenAI, model: str, tokens: int = 8) -> list[float]:
    """Log-probabilities of greedy tokens."""
    reply = client.completions.create(
        model=model,
        prompt="The quick brown fox",
        max_tokens=tokens,
        temperature=0,
        logprobs=1,
        extra_body={"ignore_eos": True},
    )
    found = reply.choices[0].logprobs
    assert found is not None
    return cast(list[float], found.token_logprobs)
