"""LoRAX's ``merged_adapters``: from the JSON object in a request to the parts of a merge.

LoRAX's own client sends ``density`` with every strategy, so its fields are taken with each of its strategies,
as LoRAX takes them, whether the strategy uses them or not.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import SpecError
from .recipe import Parts
from .strategies import TABLE

USED_BY = {
    "linear": (),
    "ties": ("density", "majority_sign_method"),
    "dare_linear": ("density",),
    "dare_ties": ("density", "majority_sign_method"),
}
"""LoRAX's strategies, with those of its fields that each uses."""

METHODS = ("total", "frequency")


def parts_of(body: object) -> Parts:
    """The parts of a merge in a JSON object; raises SpecError.

    ``ids`` and ``weights`` are lists of the same length (weights default to 1, and may be ``"auto"``).
    ``merge_strategy`` defaults to ``linear``.  Every other field is an option of the strategy; null means its
    default.
    """
    if not isinstance(body, Mapping):
        raise SpecError('a merge in JSON must be an object like {"ids": ["a", "b"], "weights": [0.7, 0.3]}')
    ids, weights = body.get("ids"), body.get("weights")
    automatic = weights == "auto"
    if (
        not isinstance(ids, Sequence)
        or isinstance(ids, str)
        or not all(isinstance(name, str) for name in ids)
    ):
        raise SpecError('"ids" must be a list of adapter names')
    if weights is None or automatic or (isinstance(weights, Sequence) and not weights):
        weights = [1.0] * len(ids)
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise SpecError('"weights" must be a list of numbers, one per id, or "auto"')
    if len(weights) != len(ids):
        raise SpecError(f'"weights" has {len(weights)} values for {len(ids)} ids')
    if any(isinstance(w, bool) or not isinstance(w, int | float) for w in weights):
        raise SpecError('"weights" must hold numbers only')
    strategy = body.get("merge_strategy")
    if strategy is None:
        strategy = "linear"
    if not isinstance(strategy, str):
        raise SpecError(f'"merge_strategy" must be one of {", ".join(TABLE)}')
    given = {k: v for k, v in body.items() if k not in ("ids", "weights", "merge_strategy") and v is not None}
    if automatic:
        given["weights"] = "auto"
    if strategy.lower() in USED_BY:  # LoRAX takes words in any case
        strategy = strategy.lower()
        given = _as_lorax(strategy, given)
    options = [(str(k), tuple(v) if isinstance(v, list) else v) for k, v in given.items()]
    return strategy, list(zip(ids, weights, strict=True)), options


def _as_lorax(strategy: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of one of LoRAX's strategies, without its fields that the strategy does not use."""
    given = dict(given)
    method = given.get("majority_sign_method")
    if isinstance(method, str) and method.lower() in METHODS:
        given["majority_sign_method"] = method.lower()
    unused = {name for name in ("density", "majority_sign_method") if name not in USED_BY[strategy]}
    for name in unused & given.keys():
        value = given.pop(name)
        if name == "density" and (not _is_number(value) or not 0 <= value <= 1):
            raise SpecError(f'"density" must be a number from 0 to 1, got {reprlib.repr(value)}')
        if name != "density" and value not in METHODS:
            raise SpecError(f'"{name}" must be "total" or "frequency", got {reprlib.repr(value)}')
    if _is_number(given.get("density")) and given["density"] == 0:
        # LoRAX keeps no entry then and merges to nothing; with us, a density is over 0.
        del given["density"]
        given["scale"] = 0.0
    return given


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
