"""The settings of the engine that this process configured last.

Two hooks need them but get no argument from which to reach them: the wait of the process that started the
API servers, and the models of an API server, because an engine's configuration holds only what workers need.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from merged_lora.vllm_plugin.settings import Settings


@dataclass
class Current:
    """State of this process; the hook of ``create_engine_config`` writes it."""

    settings: Settings = field(default_factory=Settings)


current = Current()
