"""Which releases of vLLM the plugin is for.

Imports nothing that the hooks need, because other releases may lack it.
"""

from __future__ import annotations

import vllm

VERSIONS = ("0.30", "0.31", "0.32")
"""Releases that are claimed; the tests run on the oldest and on the newest of them."""


def untested() -> list[str]:
    """Why the vLLM that is installed is not one of them; empty where it is."""
    if vllm.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        return []
    return [f"vLLM {vllm.__version__} is not one of the tested releases ({', '.join(VERSIONS)})"]
