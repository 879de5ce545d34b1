"""The backend ``cpu``: the compiled loops on every core, and torch's linear algebra between them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from merged_lora import bases
from merged_lora.backends import Energy, Progress, Result, no_progress
from merged_lora.factors import Factors
from merged_lora.lowrank import Each, in_turn, merge_modules
from merged_lora.plan import (
    DeltaModule,
    EntryModule,
    FactorJob,
    FactorModule,
    MergePlan,
    OutputModule,
    SumModule,
)
from merged_lora.regression import Moments, fitted
from merged_lora.streaming import starting_columns, truncate_tiles

from .combine import combine
from .pool import Integers, Pool, batches
from .thresholds import Visit, find_thresholds
from .tiles import NumbaTiles
from .warm_up import warm_up

AT_A_TIME = 64 << 20  # bytes of coordinates and their bases, or of float64 factors, that are merged


@dataclass(frozen=True, eq=False)
class Coordinated:
    """A module on its coordinates in a shared basis."""

    module: EntryModule
    coordinates: bases.Coordinates


class CpuBackend:
    """Merges in compiled loops over tensors or tiles of them, on a pool of threads."""

    name = "cpu"

    def __init__(self) -> None:
        self._pool = Pool()

    def warm_up(self, dtype: torch.dtype) -> None:
        """See :class:`merged_lora.backends.Backend`."""
        warm_up(self)

    def merge(self, plan: MergePlan, progress: Progress = no_progress) -> Result:
        """See :class:`merged_lora.backends.Backend`."""
        modules: dict[str, Factors] = {}
        energy: dict[str, Energy] = {}
        repeated: list[str] = []
        factors = {name: m for name, m in plan.modules.items() if isinstance(m, FactorModule)}
        jobs = [job for m in factors.values() for job in (m.a, m.b)]
        merged = combine(self._pool, jobs, _halved(progress))
        for i, (name, module) in enumerate(factors.items()):
            modules[name] = Factors(merged[2 * i], merged[2 * i + 1], 1.0, module.embedding)
        deltas = [(name, m) for name, m in plan.modules.items() if isinstance(m, SumModule)]
        for part in batches(deltas, lambda item: _vector_bytes(item[1]), AT_A_TIME):
            members = [module for _, module in part]
            done = merge_modules(members, self._each(members))
            for (name, _), merged_module in zip(part, done, strict=True):
                modules[name] = merged_module.factors
                if merged_module.energy is not None:
                    energy[name] = merged_module.energy
            progress(len(part))
        outputs = [(name, m) for name, m in plan.modules.items() if isinstance(m, OutputModule)]
        for fits in batches(outputs, lambda item: _fit_bytes(item[1]), AT_A_TIME):
            fitting = [module for _, module in fits]
            for (name, _), (result, kept) in zip(fits, self._each(fitting)(_fitted, fitting), strict=True):
                modules[name] = result
                if kept is not None:
                    energy[name] = kept
            progress(len(fits))
        for name, other in plan.modules.items():
            if isinstance(other, EntryModule) and other.basis is None:
                modules[name], energy[name] = self._merge_tiles(other)
                progress(1)
        thresholds = self._model_thresholds(plan)
        for batch in self._batches(plan):
            for name, (result, kept) in self._merge_coordinates(batch, thresholds).items():
                modules[name] = result
                if kept is not None:
                    energy[name] = kept
            repeated += [name for name, member in batch.items() if bool(member.coordinates.repeated)]
            progress(len(batch))
        return Result(modules, energy, tuple(repeated))

    def _merge_tiles(self, module: EntryModule) -> tuple[Factors, Energy]:
        """A module whose deltas are merged entry by entry."""
        start = starting_columns(*_stacked(module), module.rank)
        a, b, energy = truncate_tiles(NumbaTiles(module, self._pool), start, module.rank)
        kept, asked = energy[0].tolist()
        return _factors(a[0], b[0], module), (kept, asked)

    def _merge_coordinates(
        self, batch: Mapping[str, Coordinated], thresholds: Mapping[str, Integers]
    ) -> dict[str, tuple[Factors, Energy | None]]:
        """Modules merged on their coordinates, by name.

        thresholds: by module, if entries are counted over the whole model; else empty.
        """
        jobs = [
            FactorJob(tuple([x[0] for x in member.coordinates.values]), member.module.rule, torch.float32)
            for member in batch.values()
        ]
        found = [thresholds[name] for name in batch] if thresholds else ()
        merged = combine(self._pool, jobs, lambda _: None, found)
        each = self._each([member.module for member in batch.values()])
        done = each(_placed, list(zip(batch.values(), merged, strict=True)))
        return dict(zip(batch, done, strict=True))

    def _batches(self, plan: MergePlan) -> Iterator[dict[str, Coordinated]]:
        """The modules that are merged on coordinates, AT_A_TIME bytes of those at most, or one module."""
        modules = [
            (name, module)
            for name, module in plan.modules.items()
            if isinstance(module, EntryModule) and module.basis is not None
        ]
        for part in batches(modules, lambda item: _coordinate_bytes(item[1]), AT_A_TIME):
            names, members = zip(*part, strict=True)
            yield dict(zip(names, self._each(members)(_coordinated, members), strict=True))

    def _each(self, modules: Sequence[DeltaModule]) -> Each:
        """How modules are gone through: each on one core, or in turn, with torch on all of them."""
        # The large products of an output basis, and those of few large modules, torch spreads better itself.
        output = any(isinstance(module, EntryModule) and module.basis == "output" for module in modules)
        return in_turn if output or len(modules) < self._pool.cores else self._pool.each

    def _model_thresholds(self, plan: MergePlan) -> dict[str, Integers]:
        """Thresholds by module if entries are counted over the whole model: ``[sources, 2]`` each."""
        if plan.counts is None:
            return {}
        sizes = [0] * len(plan.counts)
        starts: dict[str, list[int]] = {}
        for name, module in plan.modules.items():
            assert isinstance(module, EntryModule)
            starts[name] = [sizes[i] for i in module.present]
            for i in module.present:
                sizes[i] += module.entries[0] * module.entries[1]

        def scan(visit: Visit, begins: Collection[int] | None) -> None:
            for batch in self._batches(plan):
                for name, member in batch.items():
                    places = zip(member.module.present, member.coordinates.values, starts[name], strict=True)
                    for i, x, begin in places:
                        if begins is None or begin in begins:
                            visit(0, i, x.data_ptr(), x.numel(), begin)

        found = find_thresholds(scan, 1, list(enumerate(plan.counts)), sizes)
        return {
            name: np.array(
                [
                    (found[i].value, found[i].cut - begin)
                    for i, begin in zip(m.present, starts[name], strict=True)
                ]
            )
            for name, m in plan.modules.items()
        }


def load() -> CpuBackend:
    """The backend; numba keeps its compiled loops on disk, so only the first use ever waits for them."""
    return CpuBackend()


def _coordinated(module: EntryModule) -> Coordinated:
    assert module.basis is not None
    return Coordinated(module, bases.coordinates_in(module.basis, *_stacked(module), module.rank))


def _placed(pair: tuple[Coordinated, torch.Tensor]) -> tuple[Factors, Energy | None]:
    """The factors of merged coordinates and, if the rank was cut, their energy."""
    member, values = pair
    module = member.module
    weights = torch.tensor([module.rule.weights])
    return _first(module, *bases.placed(member.coordinates, values[None], weights, module.rank))


def _fitted(module: OutputModule) -> tuple[Factors, Energy | None]:
    """The factors of a module merged by its outputs and, if the rank was cut, their energy."""
    moments = [Moments(i.values[None], i.vectors[None], i.rest[None]) for i in module.inputs]
    weights = torch.tensor([module.weights], dtype=torch.float64)
    return _first(module, *fitted(*_stacked(module), moments, weights, module.shrink, module.rank))


def _first(
    module: EntryModule | OutputModule, a: torch.Tensor, b: torch.Tensor, cut: torch.Tensor | None
) -> tuple[Factors, Energy | None]:
    """The factors and the energy of a module that was merged as a stack of one."""
    return _factors(a[0], b[0], module), None if cut is None else (float(cut[0, 0]), float(cut[0, 1]))


def _fit_bytes(module: OutputModule) -> int:
    """Bytes of float64 copies of the factors and of the inputs' eigenvectors."""
    return _vector_bytes(module) + 8 * sum(inputs.vectors.numel() for inputs in module.inputs)


def _vector_bytes(module: SumModule | OutputModule) -> int:
    """Bytes of two float64 copies of the factors."""
    return 16 * sum(x.numel() for f in module.sources for x in (f.a, f.b))


def _coordinate_bytes(module: EntryModule) -> int:
    (rows, columns), (out, in_) = module.entries, module.sources[0].shape
    return 4 * rows * columns * len(module.sources) + 8 * (rows * out + columns * in_)


def _stacked(
    module: EntryModule | OutputModule,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The factors and scalings of a module as a stack of one."""
    a, b = [f.a[None] for f in module.sources], [f.b[None] for f in module.sources]
    return a, b, torch.tensor([module.scalings], dtype=torch.float64)


def _factors(a: torch.Tensor, b: torch.Tensor, module: EntryModule | OutputModule) -> Factors:
    new_a, new_b = (x.to(module.dtype).contiguous() for x in (a, b))
    return Factors(new_a, new_b, 1.0, module.embedding)


def _halved(progress: Progress) -> Progress:
    """Progress in modules, from progress in tensors: two make a module."""
    done = 0

    def report(tensors: int) -> None:
        nonlocal done
        before, done = done, done + tensors
        progress(done // 2 - before // 2)

    return report
