"""Limits that protect all clients of a server: long specs, many sources, extreme factors."""

from __future__ import annotations

from merged_lora.errors import SpecError
from merged_lora.planning import amplification
from merged_lora.spec import MergeSpec, check_length
from merged_lora.vllm_plugin.settings import Settings

ROUNDING = 1e-9
"""Relative error that rounding may add to the factor of a spec that is exactly at the limit."""


def check_limits(spec: MergeSpec, settings: Settings) -> None:
    """Raise SpecError if a merge is beyond what the operator allows."""
    if len(spec.sources) > settings.max_sources:
        raise SpecError(f"{len(spec.sources)} sources; this server merges at most {settings.max_sources}")
    check_length(str(spec), settings.max_spec_length)
    factor = amplification(spec)
    if factor > settings.max_strength * (1 + ROUNDING):
        raise SpecError(
            f"the merge multiplies a source by {factor:.7g}; this server multiplies by at most "
            f"{settings.max_strength:.7g}, use smaller weights or a smaller scale"
        )
