"""Projections that are one module in some classes of models and several in others, split exactly.

The rows of a fused module are those of its parts, one after the other.  So a part has some rows of its B, and
its A.  Knows nothing of strategies or of files.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from .adapters import Adapter
from .errors import PlanError, listed
from .factors import Factors

logger = logging.getLogger(__name__)

_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_GATE_UP = (("gate_proj", "up_proj"),)

FUSED = {"qkv_proj": _QKV, "qkv": _QKV, "Wqkv": _QKV, "W_pack": _QKV, "gate_up_proj": _GATE_UP}
"""Projections whose rows are those of others, one after the other, and what these may be called."""

MIXED = {"query_key_value": _QKV, "wqkv": _QKV, "c_attn": _QKV, "up_gate_proj": _GATE_UP}
"""Projections whose rows have another order in some models: GPT-NeoX has q, k and v of one head together."""

_ALL = FUSED | MIXED
_PLACES = {part: whole for whole, ways in reversed(_ALL.items()) for parts in ways for part in parts}
_PLACES |= {whole: _PLACES[ways[0][0]] for whole, ways in _ALL.items()}

_FUSED_EXPERT = re.compile(
    r"(?P<layer>.*)\.experts\.(?P<parameter>gate_up_proj|down_proj|w[123])\[(?P<number>\d+)\]"
)
_EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_EXPERT_PARTS |= {stack: (part,) for part, stack in _MIXTRAL.items()}
_OLD_LAYER, _NEW_LAYER = "block_sparse_moe", "mlp"
"""What Mixtral called the layer of its experts before and since transformers 5."""

_INTERLEAVED = re.compile(r"gpt[-_]?oss|privacy[-_]?filter", re.IGNORECASE)
"""Base models whose experts have a row of gate and a row of up in turn."""

Parts = dict[str, slice]
"""Names of the parts of a module, and which of its rows they are."""


class _Unsplit(NamedTuple):
    """Why a module cannot be split, and the names that its parts would have."""

    error: PlanError
    names: list[str]


def split_projections(
    sources: Mapping[str, Adapter],
    chosen: Callable[[str], bool],
    left_out: Callable[[str], bool] = lambda _: False,
) -> dict[str, Adapter]:
    """The sources with every fused projection split whose parts are modules of another source.

    The delta of a module is that of its parts, bit for bit.  What was split is logged as a warning.

    sources: by name.
    chosen:  whether a module takes part in the merge; one that does not, and whose parts do not, stays fused.
    left_out: whether a module is left out by its name; it stays fused, although its parts may be chosen.

    Raises PlanError if the rows of a part of a chosen module are not known for certain.
    """
    moves: dict[str, dict[str, Parts]] = defaultdict(dict)
    for name, module, parts in (*_of_layers(sources), *_of_experts(sources)):
        if left_out(module):
            continue
        if isinstance(parts, _Unsplit):
            if any(map(chosen, (module, *parts.names))):
                raise parts.error
        else:
            moves[name][module] = parts
    return {name: _split(name, a, moves[name]) if name in moves else a for name, a in sources.items()}


def place(name: str, shape: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
    """A name and dimensions that a module and the fused one that may hold it have in common.

    name:  of the module.
    shape: ``(out, in)`` of its delta.
    """
    if match := _EXPERT.fullmatch(name):
        parameter = "down_proj" if match["part"] in ("down_proj", "w2") else "gate_up_proj"
        return f"{_new_layer(match['layer'])}.experts.{parameter}[{match['number']}]", shape[1:]
    if match := _FUSED_EXPERT.fullmatch(name):
        parameter = "down_proj" if match["parameter"] in ("down_proj", "w2") else "gate_up_proj"
        return f"{match['layer']}.experts.{parameter}[{match['number']}]", shape[1:]
    parent, _, leaf = name.rpartition(".")
    return (f"{parent}.{_PLACES[leaf]}", shape[1:]) if leaf in _PLACES else (name, shape)


def _of_layers(sources: Mapping[str, Adapter]) -> Iterator[tuple[str, str, Parts | _Unsplit]]:
    """Source, module and parts of every fused projection whose parts are modules of another source.

    If parts are not known for certain, the error that says why is in their place.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, adapter in sources.items():
        for module in adapter.modules:
            parent, _, leaf = module.rpartition(".")
            if leaf in _PLACES:
                found[_unnumbered(parent), leaf][name].append(module)
    for (parents, leaf), whole in list(found.items()):
        for parts in _ALL.get(leaf, ()):
            apart = {part: found.get((parents, part), {}) for part in parts}
            others = sorted(set().union(*apart.values()))
            if not others or not whole.keys().isdisjoint(others):
                continue  # a source with both is of a model that has both
            sizes = {part: _sizes(sources, modules) for part, modules in apart.items()}
            fused = _sizes(sources, whole).values()
            alike = len(set().union(*fused)) == 1 and all(
                len(set().union(*each.values())) <= 1 for each in sizes.values()
            )
            for name, modules in whole.items():
                for module in modules:
                    rows = sources[name].modules[module].shape[0]
                    try:
                        yield name, module, _parts(module, rows, parts, sizes, alike)
                    except ValueError as error:
                        yield name, module, _unsplit(name, module, parts, others, error)


def _sizes(sources: Mapping[str, Adapter], modules: Mapping[str, Iterable[str]]) -> dict[str, set[int]]:
    """The rows that modules of some sources have, by the name of what holds them."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, each in modules.items():
        for module in each:
            found[module.rpartition(".")[0]].add(sources[name].modules[module].shape[0])
    return found


def _parts(
    module: str, rows: int, parts: tuple[str, ...], sizes: Mapping[str, Mapping[str, set[int]]], alike: bool
) -> Parts:
    """The rows of every part of a fused projection; raises ValueError if they are not known for certain.

    sizes: for every part what other sources know of its rows.
    alike: whether this projection has as many rows in all layers, so that those of a part may be known from
           another layer.
    """
    parent, _, leaf = module.rpartition(".")
    if leaf in MIXED:
        raise ValueError("the order of its rows is not the same in all models")
    known: dict[str, int] = {}
    for part in parts:
        found = sizes[part].get(parent) or (set().union(*sizes[part].values()) if alike else set())
        if len(found) == 1:
            known[part] = next(iter(found))
    missing = [part for part in parts if part not in known]
    if parts in _GATE_UP:
        known |= dict.fromkeys(missing, rows // 2)
    elif len(missing) == 1:
        known[missing[0]] = rows - sum(known.values())
    elif missing:
        raise ValueError(f"they do not show how many of its {rows} rows are those of {' and '.join(missing)}")
    numbers = [known[part] for part in parts]
    # k and v, or gate and up, have as many rows as each other wherever rows have the order of FUSED.
    if sum(numbers) != rows or min(numbers) < 1 or numbers[-1] != numbers[-2]:
        raise ValueError(
            f"its {rows} rows cannot be {', '.join(f'{known[part]} of {part}' for part in parts)}"
        )
    return _one_after_the_other([f"{parent}.{part}" for part in parts], numbers)


def _of_experts(sources: Mapping[str, Adapter]) -> Iterator[tuple[str, str, Parts | _Unsplit]]:
    """Source, module and parts of every expert in a parameter that is modules of another source.

    Experts of stacks (``experts.w1[3]``) become modules apart (``experts.3.w1``) if a source has such.
    If parts are not known for certain, the error that says why is in their place.
    """
    whole: dict[str, dict[str, list[re.Match[str]]]] = defaultdict(lambda: defaultdict(list))
    apart: dict[str, dict[str, re.Match[str]]] = defaultdict(dict)
    stacked: dict[str, dict[str, re.Match[str]]] = defaultdict(dict)
    for name, adapter in sources.items():
        for module in adapter.modules:
            if match := _FUSED_EXPERT.fullmatch(module):
                layers = _unnumbered(_new_layer(match["layer"]))
                whole[layers][name].append(match)
                if match["parameter"] in _MIXTRAL.values():
                    stacked[layers].setdefault(name, match)
            elif match := _EXPERT.fullmatch(module):
                apart[_unnumbered(_new_layer(match["layer"]))].setdefault(name, match)
    for layers, fused in whole.items():
        others = apart.get(layers, {})
        if not others:
            others = stacked.get(layers, {})
            fused = {name: matches for name, matches in fused.items() if name not in others}
        if not others or not fused.keys().isdisjoint(others):
            continue
        like = next(iter(others.values()))
        renames = like["layer"].endswith(_OLD_LAYER)
        for name, matches in fused.items():
            holders = set()
            for match in matches:
                layer = _new_layer(match["layer"])
                layer = layer.removesuffix(_NEW_LAYER) + _OLD_LAYER if renames else layer
                parts = _EXPERT_PARTS[match["parameter"]]
                rows, odd = divmod(sources[name].modules[match.string].shape[0], len(parts))
                bases = [sources[each].header.base_model or "" for each in (name, *others)]
                if odd or any(map(_INTERLEAVED.search, bases)):
                    reason = "it has an odd number of rows" if odd else "gate and up have its rows in turn"
                    yield name, match.string, _unsplit(name, match.string, parts, others, ValueError(reason))
                    continue
                names = [f"{layer}.experts.{_as_in(like, part, match['number'])}" for part in parts]
                yield name, match.string, _one_after_the_other(names, [rows] * len(parts))
                holders.add((match["layer"], layer))
            for old, new in holders:
                for module in sources[name].modules:  # the router, whose layer has another name too
                    if old != new and module.startswith(f"{old}.") and not _FUSED_EXPERT.fullmatch(module):
                        yield name, module, {new + module.removeprefix(old): slice(None)}


def _as_in(like: re.Match[str], part: str, number: str) -> str:
    """The end of a name for a part of an expert, in the form of a module of another source."""
    if like.re is _FUSED_EXPERT:
        return f"{_MIXTRAL[part]}[{number}]"
    return f"{number}.{_MIXTRAL[part] if like['part'] in _MIXTRAL.values() else part}"


def _one_after_the_other(names: Iterable[str], rows: Iterable[int]) -> Parts:
    ends = list(accumulate(rows, initial=0))
    return {name: slice(*ends[i : i + 2]) for i, name in enumerate(names)}


def _unsplit(
    name: str, module: str, parts: Iterable[str], others: Iterable[str], reason: ValueError
) -> _Unsplit:
    front = f"{module.rpartition('.')[0]}."
    error = PlanError(
        f"{name} has {module} for what is {', '.join(parts)} in {listed(others)}, and it cannot be split: "
        f"{reason}; merge adapters for one class of models, or leave it out with "
        f"--without '{_unnumbered(module, '*')}'"
    )
    return _Unsplit(error, [front + part for part in parts])


def _split(name: str, adapter: Adapter, moves: Mapping[str, Parts]) -> Adapter:
    """The adapter of that name with some modules as their parts."""
    modules: dict[str, Factors] = {}
    for module, factors in adapter.modules.items():
        parts = {part: replace(factors, b=factors.b[rows]) for part, rows in moves.get(module, {}).items()}
        for part, its in (parts or {module: factors}).items():
            if part in modules:
                raise PlanError(f"{name} has two modules for {part}, one of them in {module}")
            modules[part] = its
    module, first = next(iter(moves.items()))
    logger.warning("%s: %s is split into %s, and so are all like it", name, module, listed(first))
    return adapter.renamed(modules, {module: tuple(parts) for module, parts in moves.items()})


def _new_layer(layer: str) -> str:
    return layer.removesuffix(_OLD_LAYER) + _NEW_LAYER if layer.endswith(f".{_OLD_LAYER}") else layer


def _unnumbered(name: str, sign: str = "#") -> str:
    return re.sub(r"\d+", sign, name)
