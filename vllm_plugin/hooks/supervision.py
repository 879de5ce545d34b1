"""How vLLM watches its API servers: one that dies does not take the others down.

Plain vLLM ends the whole server when one of its API servers dies, and with it all that the workers have in
memory.  No merge needs this hook.  It stays because docs/serving.md promises it, and because a server that
merges takes longer to come back: it reads its adapters again and makes every merge again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from .current import current

logger = logging.getLogger("vllm.merged_lora")


def wrap_wait_for_completion_or_failure(original: Callable[..., None]) -> Callable[..., None]:
    """Go on waiting for the API servers that are left; raise as vLLM does if none is, or if another dies."""

    @functools.wraps(original)
    def wait_for_completion_or_failure(api_server_manager: Any, *args: Any, **kwargs: Any) -> None:
        while True:
            try:
                original(api_server_manager, *args, **kwargs)
                return
            except RuntimeError:
                processes = api_server_manager.processes
                # By the sentinels, as vLLM does it: a process that ends may not have an exit code yet.
                ended = set(connection.wait([process.sentinel for process in processes], timeout=0))
                lost = [process for process in processes if process.sentinel in ended]
                living = [process for process in processes if process.sentinel not in ended]
                if not current.settings.enable or not living or not lost:
                    raise
                logger.error("%d API server(s) died; the other %d keep serving", len(lost), len(living))
                for process in lost:  # or /metrics would go on adding up their gauges
                    mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
                api_server_manager.processes = living

    return wait_for_completion_or_failure
