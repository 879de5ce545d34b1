"""Reads an adapter: the factors of its modules, and what else of it a result may take over.

Everything besides plain factors is recognised by its tensors, and refused by name or left out on request.
Nothing is unpickled unless that is allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from merged_lora.errors import AdapterError, listed
from merged_lora.factors import DTYPES, Factors

from . import config as configuration
from .experts import check_counts, parameters_of, take_apart, unstack
from .keys import FACTORS, Key, check_outer, parse
from .layout import CONFIG_NAME, PREFIX, RANKS_KEY, Header
from .mlx import as_peft, is_mlx
from .opening import open_adapter
from .padding import unpadded
from .parts import KINDS, Choice, Parts, sort_out

HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks whose adapters PEFT loads only with a head."""

MAX_NAME = 256
"""Characters of the name of a module; patterns take a time that grows with it."""

Sides = dict[str, torch.Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Contents:
    """What was read of an adapter.

    folder:   where its files are.
    modules:  factors by module name.
    header:   what the configuration says besides ranks and scalings.
    metadata: pairs of text in the safetensors file.
    whole:    whole tensors to take over: by the name of what was saved as a whole, and by their own.
    used:     words of the choice that had an effect.
    """

    folder: Path
    modules: dict[str, Factors]
    header: Header
    metadata: dict[str, str]
    whole: dict[str, dict[str, torch.Tensor]]
    used: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Tensors:
    """The tensors of a file, sorted by their names.

    factors: by module, and whether it is an embedding.
    others:  all others.
    written: for each module with factors its name as the file writes it.
    outer:   texts in front of PEFT's own prefix; see :class:`Key`.
    """

    factors: dict[tuple[str, bool], Sides]
    others: dict[Key, torch.Tensor]
    written: dict[str, str]
    outer: set[str]


def read_adapter(path: Path, choice: Choice, allow_pickle: bool = False) -> Contents:
    """An adapter, read into memory and checked.

    path:         its folder, a folder that holds this folder alone, or one of its files.
    choice:       what to do with parts that no merge supports.
    allow_pickle: read pickled weights if there are no others, without running code.

    Raises AdapterError, which names the file and the problem.
    """
    opened = open_adapter(path, allow_pickle)
    folder, config, tensors = opened.folder, opened.config, opened.tensors
    if is_mlx(config):
        config, tensors = as_peft(folder, config, tensors)
    found = _sorted_keys(folder, tensors)
    biased = config.get("bias") not in (None, "none")
    parts = sort_out(found.others, configuration.names(folder, config, "modules_to_save"), biased, choice)
    _refuse(folder, config, parts, choice.drop - KINDS.keys() - parts.used)
    modules, parameters = _modules(folder, config, found, parts, choice)
    metadata = dict(opened.metadata)
    if (ranks := metadata.pop(RANKS_KEY, None)) is not None:
        try:
            modules = unpadded(modules, ranks)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {RANKS_KEY} in its metadata: {error}") from None
    task = config.get("task_type")
    header = Header(
        base_model=_text(config.get("base_model_name_or_path")),
        task_type=None if task in HEADED_TASKS and not parts.whole else _text(task),
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        base_copies=parts.copies,
        auto_mapping=_auto_mapping(config, parts),
        parameters=tuple(sorted(parameters)),
    )
    contents = _renamed(
        Contents(folder, modules, header, metadata, parts.whole, frozenset(parts.used)), choice.rename
    )
    check_outer(list(contents.modules), found.outer)
    return contents


def _renamed(contents: Contents, rename: Mapping[str, str]) -> Contents:
    """The same with new beginnings of names; raises AdapterError if two modules would have one name.

    The configuration speaks of the names in the file, so this comes after all that it says.
    """
    used = set(contents.used)

    def new(name: str) -> str:
        for old, beginning in rename.items():
            if name.startswith(old):
                used.add(old)
                return beginning + name[len(old) :]
        return name

    def under_new_names(named: Mapping[str, T]) -> dict[str, T]:
        made: dict[str, T] = {}
        for name, value in named.items():
            if new(name) in made or not new(name):
                raise AdapterError(
                    f"{contents.folder}: two modules would be called {new(name)!r}, or one nothing; choose "
                    "another beginning"
                )
            made[new(name)] = value
        return made

    if not rename:
        return contents
    header = contents.header
    return replace(
        contents,
        modules=dict(sorted(under_new_names(contents.modules).items())),
        header=replace(
            header,
            base_copies=under_new_names(header.base_copies),
            parameters=tuple(sorted(map(new, header.parameters))),
            named=any(old == rename[old] for old in used & rename.keys()),
        ),
        whole={name: under_new_names(tensors) for name, tensors in contents.whole.items()},
        used=frozenset(used),
    )


def _sorted_keys(folder: Path, tensors: Mapping[str, torch.Tensor]) -> _Tensors:
    found = _Tensors({}, {}, {}, set())
    origin: dict[tuple[str, str], str] = {}
    owners: set[str] = set()
    for name, tensor in tensors.items():
        key = parse(name)
        first = origin.setdefault((key.module, key.role), name)
        if first != name:
            both = " and ".join(sorted((first, name)))
            raise AdapterError(f"{folder}: {both} are both {key.role} of {key.module}")
        if key.role not in FACTORS or not key.module:
            found.others[key] = tensor
            continue
        if len(key.module) > MAX_NAME or not key.module.isprintable() or set("[]") & set(key.module):
            raise AdapterError(f"{folder}: {key.module[:64]!r} cannot be the name of a module")
        owners.add(key.owner)
        found.written[key.module] = name[: name.rindex(".lora_")].removeprefix(PREFIX)
        side, embedding = FACTORS[key.role]
        found.factors.setdefault((key.module, embedding), {})[side] = tensor
        found.outer.add(key.outer)
    if len(owners - {""}) > 1:
        raise AdapterError(
            f"{folder}: holds the adapters {listed(sorted(owners))} in one file; save each by itself"
        )
    return found


def _refuse(folder: Path, config: Mapping[str, Any], parts: Parts, unused: Collection[str]) -> None:
    """Raise AdapterError if the configuration or a tensor has what no merge supports."""
    found = configuration.refused_fields(folder, config)
    by_kind: dict[str, list[str]] = {}
    for name, kind in sorted(parts.refused.items(), key=lambda item: item[1] or ""):
        by_kind.setdefault(kind or "", []).append(name)
    strange = by_kind.pop("", [])
    for kind, names in by_kind.items():
        if kind not in found:
            found.append(
                f"{kind} ({KINDS[kind]}): {listed(sorted(names), 2)}" if kind in KINDS else listed(names)
            )
    configuration.refuse(folder, found, list(by_kind), unused)
    if strange:
        raise AdapterError(f"{folder}: these tensors are not LoRA factors: {listed(sorted(strange))}")


def _modules(
    folder: Path,
    config: Mapping[str, Any],
    tensors: _Tensors,
    parts: Parts,
    choice: Choice,
) -> tuple[dict[str, Factors], set[str]]:
    """The factors by module name, and the modules whose weight is a parameter."""
    stacks = _stacks(folder, tensors)
    targets = configuration.names(folder, config, "target_parameters")
    parameters = parameters_of({module for module, _ in tensors.factors} - stacks, targets)
    scales = configuration.Scales(folder, config)
    modules: dict[str, Factors] = {}
    single: set[str] = set()
    counts: dict[str, int] = {}
    for (module, embedding), sides in sorted(tensors.factors.items()):
        a, b = sides["A"], sides["B"]
        if module in parameters and "target_parameters" in choice.drop:
            parts.used.add("target_parameters")
            continue
        parameter = parameters.get(module)
        if module in parameters and parameter is None:
            raise AdapterError(
                f"{folder}: it is not known which of the parameters {listed(targets)} the factors of "
                f"{module} belong to; leave them out with --drop target_parameters of the command merged-lora"
            )
        names = (parameter,) if parameter is not None else (module, tensors.written[module])
        rank = scales.rank(names)
        scaling = scales.scaling(names, rank)
        if module in stacks:
            experts = unstack(folder, module, rank, a, b)
            counts[module] = len(experts)
        elif parameter is None:
            _check_module(folder, module, rank, a, b)
            experts = {module: (a, b)}
        else:
            experts = take_apart(folder, parameter, rank, a, b)
            if len(experts) == 1 and parameter == f"{module}.weight":
                experts = {module: (a, b)}
                single.add(module)
        new = {name: Factors(*pair, scaling, embedding) for name, pair in experts.items()}
        if twice := sorted(new.keys() & modules.keys()):
            raise AdapterError(f"{folder}: {twice[0]} is in two pairs of factors")
        modules |= new
    check_counts(folder, counts)
    if not modules:
        raise AdapterError(f"{folder}: holds no LoRA factors")
    return dict(sorted(modules.items())), single


def _stacks(folder: Path, tensors: _Tensors) -> set[str]:
    """The modules whose factors are stacks of matrices; raises AdapterError if some are not a pair."""
    seen: set[str] = set()
    stacks: set[str] = set()
    for (module, embedding), sides in sorted(tensors.factors.items()):
        if module in seen:
            raise AdapterError(f"{folder}: {module} has both linear and embedding factors")
        if len(sides) < 2:
            raise AdapterError(f"{folder}: {module} has no lora_{'B' if 'A' in sides else 'A'}")
        stacked = not embedding and all(tensor.ndim == 3 for tensor in sides.values())
        for side, tensor in sides.items():
            _check_tensor(folder, module, side, tensor, stacked)
        seen.add(module)
        if stacked:
            stacks.add(module)
    return stacks


def _check_module(folder: Path, module: str, rank: int, a: torch.Tensor, b: torch.Tensor) -> None:
    if module.endswith(".base_layer"):
        raise AdapterError(
            f"{folder}: {module} was wrapped by another LoRA adapter, so its factors are not all; "
            f"{CONFIG_NAME} does not name it in target_parameters"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdapterError(
            f"{folder}: {module} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}, "
            f"but {CONFIG_NAME} says rank {rank}"
        )


def _check_tensor(folder: Path, module: str, side: str, tensor: torch.Tensor, stacked: bool) -> None:
    if tensor.dtype not in DTYPES:
        raise AdapterError(
            f"{folder}: {module} lora_{side} is {tensor.dtype}, only fp32, fp16 and bf16 are merged; "
            "save it in one of them, as with tensor.float()"
        )
    if tensor.ndim != (3 if stacked else 2) or 0 in tensor.shape:
        raise AdapterError(f"{folder}: {module} lora_{side} has shape {tuple(tensor.shape)}, not a matrix")


def _auto_mapping(config: Mapping[str, Any], parts: Parts) -> dict[str, str] | None:
    """The class of the base model, unless it has a head that was left out."""
    found = config.get("auto_mapping")
    named = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    left_out = parts.used & {"heads", "modules_to_save"} and not parts.whole
    return found if named and not left_out else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
