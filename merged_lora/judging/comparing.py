"""How deltas relate: their lengths and angles, the spaces they share, their signs, and their outputs.

All but the signs is exact and follows from Gram matrices ``[R, R]`` in float64, R the sum of ranks: no delta
``[out, in]`` is formed.  Signs are counted on rows of the deltas that are drawn at random.  Knows nothing of
strategies or of files.

Shape comments: M modules, N sources, ranks r_i with sum R, deltas ``[out, in]``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from merged_lora.adapters import Adapter
from merged_lora.bases import joined, normalized
from merged_lora.calibration import Calibration
from merged_lora.factors import Factors
from merged_lora.lowrank import basis_of, inner_products, singular_values

STACK_BYTES = 1 << 28
"""Largest number of bytes that the factors of modules take in float64 which are compared together."""
SAMPLED = 1 << 15
"""Entries of each delta on which signs are counted; a delta with fewer is counted whole."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Numbers of every module and source; zeros if a source lacks the module.

    modules:     names of the M modules.
    sources:     names of the N sources.
    shapes:      ``(out, in)`` of every module.
    present:     which source has which module, bool ``[M, N]``.
    inner:       Frobenius inner products of the deltas, float64 ``[M, N, N]``.
    rows:        share of the row spaces that two deltas have in common, from 0 to 1, float64 ``[M, N, N]``.
    columns:     the same of their column spaces.
    both:        how many sampled entries both sources keep at the density, int64 ``[M, N, N]``.
    opposite:    in how many of these their signs differ, int64 ``[M, N, N]``.
    squares:     squared singular values of the sum of all deltas, largest first, float64 ``[M, R]``.
    outputs:     for source i with a calibration, the mean squared norm of what delta j adds to the outputs
                 on the inputs of i, float64 ``[M, N, N]``; NaN for a source without one.
    """

    modules: tuple[str, ...]
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    present: torch.Tensor
    inner: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    both: torch.Tensor
    opposite: torch.Tensor
    squares: torch.Tensor
    outputs: torch.Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: the products of factors are small, and threads wait for each other.

    With two on a machine whose two cores were busy, the same comparison took 16 times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(
    sources: Mapping[str, Adapter], density: float, progress: Callable[[int], object] = lambda _: None
) -> Comparison:
    """Compare adapters whose modules agree in name and shape.

    sources:  by name.
    density:  share of the entries of each delta, the largest ones, whose signs are compared.
    progress: called with the number of modules that were compared since the last call.
    """
    modules = list(dict.fromkeys(name for adapter in sources.values() for name in adapter.modules))
    index = {name: i for i, name in enumerate(modules)}
    m, n = len(modules), len(sources)
    most = max(sum(a.modules[name].rank for a in sources.values() if name in a.modules) for name in modules)
    found = Comparison(
        modules=tuple(modules),
        sources=tuple(sources),
        shapes=tuple(next(a.modules[x].shape for a in sources.values() if x in a.modules) for x in modules),
        present=torch.tensor([[name in a.modules for a in sources.values()] for name in modules]),
        inner=torch.zeros(m, n, n, dtype=torch.float64),
        rows=torch.zeros(m, n, n, dtype=torch.float64),
        columns=torch.zeros(m, n, n, dtype=torch.float64),
        both=torch.zeros(m, n, n, dtype=torch.int64),
        opposite=torch.zeros(m, n, n, dtype=torch.int64),
        squares=torch.zeros(m, most, dtype=torch.float64),
        outputs=torch.zeros(m, n, n, dtype=torch.float64),
    )
    calibrations = [a.calibration for a in sources.values()]
    for i, calibration in enumerate(calibrations):
        if not isinstance(calibration, Calibration):
            found.outputs[:, i] = torch.nan
    for names, present in _stacks(list(sources.values()), modules):
        stack = [[list(sources.values())[i].modules[name] for name in names] for i in present]
        _compare_stack(found, torch.tensor([index[x] for x in names]), present, stack, calibrations)
        for k, name in enumerate(names):
            both, opposite = _signs([own[k] for own in stack], density)
            at = index[name], torch.tensor(present)[:, None], torch.tensor(present)
            found.both[at], found.opposite[at] = both, opposite
        progress(len(names))
    return found


def _stacks(
    sources: Sequence[Adapter], modules: Sequence[str]
) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Modules that the same sources have in the same shapes and ranks, a bounded number at a time."""
    alike: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]], list[str]] = defaultdict(list)
    for name in modules:
        present = tuple(i for i, adapter in enumerate(sources) if name in adapter.modules)
        ranks = tuple(sources[i].modules[name].rank for i in present)
        alike[present, ranks, sources[present[0]].modules[name].shape].append(name)
    for (present, ranks, shape), names in alike.items():
        count = max(1, STACK_BYTES // (8 * sum(ranks) * sum(shape)))
        for start in range(0, len(names), count):
            yield names[start : start + count], present


def _compare_stack(
    found: Comparison,
    at: torch.Tensor,
    present: Sequence[int],
    stack: Sequence[Sequence[Factors]],
    calibrations: Sequence[Calibration | str | None],
) -> None:
    """Write down all but the signs of some modules.

    at:      their indices.
    present: indices of the sources that have them.
    stack:   the factors, of each of these sources.
    """
    ranks = [own[0].rank for own in stack]
    a = joined([torch.stack([f.a for f in own]) for own in stack], 1)  # [M, R, in]
    b = joined([torch.stack([f.b for f in own]) for own in stack], 2)  # [M, out, R]
    scalings = torch.tensor([[f.scaling for f in own] for own in stack], dtype=torch.float64).T  # [M, n]
    gram_a, gram_b = a @ a.mT, b.mT @ b  # [M, R, R]
    both = at[:, None, None], torch.tensor(present)[:, None], torch.tensor(present)
    found.inner[both] = inner_products(gram_a, gram_b, ranks, scalings)
    found.rows[both] = _overlaps(gram_a, ranks)
    found.columns[both] = _overlaps(gram_b, ranks)
    squares = singular_values(gram_a, gram_b, ranks, scalings).square()
    found.squares[at, : squares.shape[1]] = squares
    for i, calibration in enumerate(calibrations):
        if isinstance(calibration, Calibration):
            for k, module in enumerate(at.tolist()):
                inputs = calibration.inputs.get(found.modules[module])
                if inputs is None:  # measured on a model without this module
                    found.outputs[module, i] = torch.nan
                    continue
                seen = a[k] @ inputs.vectors.double().T  # [R, k]
                gram = (seen * inputs.values.double()) @ seen.T + (a[k] * inputs.rest.double()) @ a[k].T
                outputs = inner_products(gram[None], gram_b[k : k + 1], ranks, scalings[k : k + 1])[0]
                found.outputs[module, i, torch.tensor(present)] = outputs.diagonal().clamp(min=0.0)


def _overlaps(gram: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Mean squared cosine of the principal angles between the spans of each source's vectors.

    Two spaces of different dimensions are compared within the smaller one (Å. Björck and G. H. Golub,
    "Numerical Methods for Computing Angles Between Linear Subspaces", Math. Comp. 27, 1973).

    gram: of all vectors, float64 ``[modules, R, R]``.

    Returns float64 ``[modules, n, n]``; 0 for a source without any vector but zero.
    """
    unit = normalized(gram)[0]
    blocks = [torch.split(row, list(ranks), dim=2) for row in torch.split(unit, list(ranks), dim=1)]
    lengths = torch.split(gram.diagonal(dim1=1, dim2=2), list(ranks), dim=1)
    bases, counts = [], []
    for i, own in enumerate(lengths):
        basis = basis_of(torch.where(own[:, :, None] * own[:, None, :] > 0, blocks[i][i], 0.0))[0]
        bases.append(basis)  # [M, r_i, r_i]
        counts.append((basis.square().sum(1) > 0).sum(1))  # [M]
    overlaps = gram.new_zeros(gram.shape[0], len(ranks), len(ranks))
    for i, basis in enumerate(bases):
        for j, other in enumerate(bases):
            cosines = basis.mT @ blocks[i][j] @ other
            common = torch.minimum(counts[i], counts[j]).clamp(min=1)
            overlaps[:, i, j] = (cosines.square().sum((1, 2)) / common).clamp(max=1.0)
    return overlaps


def _signs(factors: Sequence[Factors], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How many entries two sources both keep, and how many of these have opposite signs.

    Entries are those of rows that are drawn at random, always the same ones for the same shape.

    Returns int64 ``[n, n]`` twice.
    """
    out, width = factors[0].shape
    count = min(out, max(1, SAMPLED // width))
    rows = torch.randperm(out, generator=torch.Generator().manual_seed(0))[:count]
    votes = []  # -1, 0 or 1 for every entry
    for f in factors:
        values = (f.b[rows].float() @ f.a.float()).flatten().mul_(f.scaling)
        kept = max(1, round(density * values.numel()))
        least = values.abs().kthvalue(values.numel() - kept + 1).values
        votes.append(torch.where(values.abs() >= least, values.sign(), 0.0))
    signs = torch.stack(votes)
    agreeing = signs @ signs.T  # agreements less conflicts
    both = signs.abs() @ signs.abs().T
    return both.long(), ((both - agreeing) / 2).long()
