"""What a merge costs, from the shapes in its plan alone: operations and bytes.  Knows nothing of machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .factors import Factors
from .plan import (
    All,
    EntryModule,
    FactorJob,
    FactorModule,
    Graded,
    Important,
    Keep,
    MergePlan,
    Middle,
    Module,
    OutputModule,
    Random,
    Rule,
    SumModule,
    Varied,
)
from .streaming import OVERSAMPLING

DECOMPOSED = 10
"""Operations for each cube of a matrix's rows that finding its eigenvectors takes: reduction, iteration and
back-transformation (G. H. Golub and C. F. Van Loan, "Matrix Computations", section 8.3)."""
PASSES = 3
"""Products with the merged deltas that find their best approximation, see ``streaming.py``."""
BLENDED = 8
"""Operations for each entry of an input that is weighted, voted on and added up."""
KEPT: dict[type[Keep], int] = {All: 0, Random: 12, Middle: 16, Varied: 16, Important: 40, Graded: 40}
"""Operations for each entry that a keep rule takes; :data:`COUNTED` for rules that are not listed."""
COUNTED = 10
"""Operations for each entry that is counted towards a threshold and then compared with it."""


@dataclass(frozen=True)
class Cost:
    """The size of a merge.

    operations: floating-point operations, and those on entries that take as long.
    nbytes:     bytes of the sources that are read and of the result that is written.
    """

    operations: float
    nbytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.operations + other.operations, self.nbytes + other.nbytes)


def cost_of(plan: MergePlan) -> Cost:
    """The cost of a whole merge."""
    return sum((cost_of_module(module) for module in plan.modules.values()), Cost(0.0, 0.0))


def cost_of_module(module: Module) -> Cost:
    """The cost of one module of a merge."""
    match module:
        case FactorModule(a, b):
            return _jobs(a) + _jobs(b)
        case SumModule(sources, mean=None) if module.is_concatenated:
            cost = _on_factors(sources, module, 0.0)
            return Cost(2.0 * sum(x.numel() for f in sources for x in (f.a, f.b)), cost.nbytes)  # copied
        case SumModule(sources):
            return _on_factors(sources, module, 3 * DECOMPOSED * _rows(sources) ** 3)
        case OutputModule(sources, inputs=inputs):
            seen = sum(len(each.values) for each in inputs)
            decomposed = DECOMPOSED * (seen**3 + 2 * _rows(sources) ** 3)
            width = sources[0].shape[1]
            joint = 2 * width * seen * (seen + 2 * _rows(sources))
            cost = _on_factors(sources, module, decomposed + joint)
            return cost + Cost(0.0, sum(each.vectors.nbytes for each in inputs))
        case EntryModule(basis=None):
            return _on_deltas(module)
        case EntryModule():
            return _on_coordinates(module)


def _rows(sources: Sequence[Factors]) -> int:
    """The sum of ranks."""
    return sum(f.rank for f in sources)


def _jobs(job: FactorJob) -> Cost:
    size = job.inputs[0].numel()
    read = sum(x.nbytes for x in job.inputs)
    return Cost(size * _operations(job.rule), read + size * job.dtype.itemsize)


def _operations(rule: Rule) -> float:
    """Operations for each entry of a result."""
    return sum(BLENDED + KEPT.get(type(keep), COUNTED) for keep in rule.keeps)


def _on_factors(sources: Sequence[Factors], module: Module, more: float) -> Cost:
    """Gram matrices of both sides of all factors, the factors of the result, and ``more`` operations."""
    total = _rows(sources)
    (rank, columns), (rows, _) = (shape for shape, _ in module.results)
    operations = 2.0 * total * (total + rank) * (rows + columns) + more
    read = sum(x.nbytes for f in sources for x in (f.a, f.b))
    written = sum(math.prod(shape) * dtype.itemsize for shape, dtype in module.results)
    return Cost(operations, read + written)


def _on_deltas(module: EntryModule) -> Cost:
    """Every delta formed and kept, the merged one multiplied by a few columns, several times."""
    rows, columns = module.entries
    size = rows * columns
    formed = 2.0 * size * _rows(module.sources)
    chosen = min(module.rank + OVERSAMPLING, rows, columns)
    found = 2.0 * PASSES * size * chosen + 4.0 * DECOMPOSED * chosen**3
    return _on_factors(module.sources, module, PASSES * (formed + size * _operations(module.rule)) + found)


def _on_coordinates(module: EntryModule) -> Cost:
    """Bases from Gram matrices, the coordinates of every delta in them, and those merged."""
    total, (rows, columns) = _rows(module.sources), module.entries
    decompositions = 4 if module.basis == "output" else 6
    projected = 2.0 * rows * columns * total
    more = decompositions * DECOMPOSED * total**3 + rows * columns * _operations(module.rule) + projected
    return _on_factors(module.sources, module, more)
