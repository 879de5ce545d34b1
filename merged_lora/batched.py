"""Products and eigenvectors of many matrices at once, by calls that serve a GPU inside vLLM."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

SMALL = 32
"""Rows up to which every torch decomposes float64 matrices on a GPU together; larger ones since 2.12
(pytorch#175403), one after the other before."""
SWEEPS = 30
"""Tried on up to 160 rows, graded and repeated eigenvalues too, 12 suffice."""


def multiplied(*factors: torch.Tensor) -> torch.Tensor:
    """The product of matrices ``[modules, .., ..]`` of one dtype, from left to right.

    By ``baddbmm``, and so is every product that a GPU may do.  ``VLLM_BATCH_INVARIANT=1`` makes vLLM replace
    what ``@``, ``torch.mm`` and ``torch.bmm`` call on a GPU, by kernels that know no float64.
    """
    return functools.reduce(_product, factors)


def eigenvectors(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.linalg.eigh`` of symmetric float64 matrices ``[modules, n, n]``, never one after the other."""
    if matrices.shape[0] > 1 and matrices.shape[1] > SMALL and loops(torch.__version__, matrices.device):
        return block_jacobi(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def loops(version: str, device: torch.device) -> bool:
    """Whether this torch goes through matrices of more than SMALL rows one by one; never so on ROCm."""
    major, minor = version.split(".")[:2]
    return device.type == "cuda" and torch.version.hip is None and (int(major), int(minor)) < (2, 12)


def block_jacobi(matrices: torch.Tensor, small: int = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``[modules, n]``, smallest first, and eigenvectors of symmetric matrices in float64.

    Parallel cyclic block Jacobi (Golub and Van Loan, "Matrix Computations", 8.5): rows fall into blocks of
    ``small / 2``, and every step makes all the matrices of two blocks diagonal that a round of a tournament
    pairs.  Raises RuntimeError where SWEEPS tournaments do not suffice.
    """
    modules, n, _ = matrices.shape
    blocks = -(-n // small) * 2
    size = blocks * small // 2
    scale = matrices.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    a = torch.nn.functional.pad(matrices / scale, (0, size - n, 0, size - n))
    a.diagonal(dim1=1, dim2=2)[:, n:] = 2.0 * n  # above all eigenvalues, so that what fills up comes last
    v = torch.eye(size, dtype=a.dtype, device=a.device).expand(modules, -1, -1)
    places = [torch.tensor(order, device=a.device) for order in _tournament(blocks, small // 2)]
    rounding = 8 * n * torch.finfo(a.dtype).eps
    for _ in range(SWEEPS):
        # Convergence is quadratic: a sweep that begins close to rounding ends there.
        last = bool((torch.linalg.vector_norm(a.tril(-1), dim=(1, 2)) <= rounding * n**0.5).all())
        for place in places:
            a, v = _turned(a, v, place, small)
        if last:
            break
    else:
        raise RuntimeError(f"a matrix of {n} rows is not diagonal after {SWEEPS} sweeps")
    order = a.diagonal(dim1=1, dim2=2).argsort(dim=1)[:, None, :n]
    v = v.gather(2, order.expand(-1, size, -1))[:, :n]
    # Dozens of products leave a few roundings; a step of Newton's iteration to the polar factor removes them.
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    v = multiplied(v, 1.5 * identity - 0.5 * multiplied(v.mT, v))
    return (v * multiplied(matrices, v)).sum(1), v


def _tournament(blocks: int, rows: int) -> Iterator[list[int]]:
    """Orders of all rows, in each the rows of paired blocks together; every two blocks meet once."""
    last = blocks - 1
    for i in range(last):
        pairs = [(i, last), *(((i + k) % last, (i - k) % last) for k in range(1, blocks // 2))]
        # The lower block first: it takes the smaller eigenvalues, or no order would ever settle.
        yield [b * rows + row for pair in pairs for b in sorted(pair) for row in range(rows)]


def _turned(
    a: torch.Tensor, v: torch.Tensor, place: torch.Tensor, small: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``U^T a U`` and ``v U``, where U makes the diagonal blocks of ``a`` diagonal, its rows so ordered."""
    modules, size, _ = a.shape
    back = place.argsort()
    square = a[:, place][:, :, place].view(modules, size // small, small, size // small, small)
    square = square.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, small, small)
    # What is diagonal but for rounding stays: among equal eigenvalues any turn would do, and a wide one would
    # undo what has been done elsewhere.
    done = torch.linalg.vector_norm(square.tril(-1), dim=(1, 2)) <= size * torch.finfo(a.dtype).eps
    identity = torch.eye(small, dtype=a.dtype, device=a.device)
    u = torch.where(done[:, None, None], identity, torch.linalg.eigh(square)[1])

    def times_u(x: torch.Tensor) -> torch.Tensor:
        columns = x[:, :, place].view(modules, size, -1, small).transpose(1, 2).reshape(-1, size, small)
        return multiplied(columns, u).view(modules, -1, size, small).transpose(1, 2).flatten(2)[:, :, back]

    return times_u(times_u(a).mT).mT, times_u(v)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # With beta = 0 what is in the result before is never read, NaN neither.
    return x.new_empty(x.shape[0], x.shape[1], y.shape[2]).baddbmm_(x, y, beta=0)
