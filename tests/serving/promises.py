"""What a server promises whichever backend merges for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_server import Server


def assert_together_as_alone(server: Server) -> None:
    """More merges at a time than the server has slots are all served, each as if it were alone."""
    specs = [f"linear({weight}*sql, chat)" for weight in (0.1, 0.2, 0.3, 0.4, 0.5)]
    alone = [server.logprobs(spec) for spec in specs]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(server.logprobs, specs))
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=1e-4)  # another batch, another order of float32 sums
