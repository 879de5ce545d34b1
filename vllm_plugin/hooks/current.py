"""What hooks need to know of their process but get no argument from which to reach it.

The settings of the engine that this process configured last are for the wait of the process that started the
API servers, and for the models of an API server, because an engine's configuration holds only what workers
need.  The cores are for a worker, whose main thread vLLM may have bound to one of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from merged_lora.vllm_plugin.settings import Settings


@dataclass
class Current:
    """State of this process.

    settings: written by the hook of ``create_engine_config``.
    cores:    numbers of the cores that it could use when vLLM loaded the plugin.
    """

    settings: Settings = field(default_factory=Settings)
    cores: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))


current = Current()
