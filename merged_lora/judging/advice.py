"""The merges that users are advised to ask for: those that an inspection lists and a search has to beat."""

from __future__ import annotations

from collections.abc import Mapping

from merged_lora.recipe import Value

ADVISED: tuple[tuple[str, Mapping[str, Value]], ...] = (
    ("regmean", {}),
    ("iso", {}),
    ("knots", {"weights": "auto"}),
    ("core_ties", {"weights": "auto"}),
    ("ties", {"density": 0.2}),
)
"""Strategies and their options, in the order of what they keep in docs/quality.md."""
