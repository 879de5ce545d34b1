"""Products and eigenvectors of many matrices at once, by calls that suit a GPU inside vLLM."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

SMALL = 32
"""Largest number of rows of float64 matrices that every torch decomposes together on a GPU.  Before torch
2.12 (pytorch#175403 and pytorch#175585), it decomposes larger matrices one after the other."""
SWEEPS = 30
"""In tests of up to 160 rows, including graded and repeated eigenvalues, 12 were enough."""


def multiplied(*factors: torch.Tensor) -> torch.Tensor:
    """The product of stacks of matrices ``[modules, .., ..]`` of one dtype, from left to right.

    Every product that may run on a GPU goes through ``baddbmm``.  With ``VLLM_BATCH_INVARIANT=1``, vLLM
    replaces the operators behind ``@``, ``torch.mm`` and ``torch.bmm`` by kernels without float64.
    """
    return functools.reduce(_product, factors)


def eigenvectors(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.linalg.eigh`` of symmetric float64 matrices ``[modules, n, n]``, with no loop over modules."""
    if matrices.shape[0] > 1 and matrices.shape[1] > SMALL and loops(torch.__version__, matrices.device):
        return block_jacobi(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def loops(version: str, device: torch.device) -> bool:
    """Whether this version of torch loops over matrices of more than SMALL rows; it never does on ROCm."""
    major, minor = version.split(".")[:2]
    return device.type == "cuda" and torch.version.hip is None and (int(major), int(minor)) < (2, 12)


def block_jacobi(matrices: torch.Tensor, small: int = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of symmetric matrices.

    Parallel cyclic block Jacobi (G. H. Golub and C. F. Van Loan, "Matrix Computations", section 8.5): rows
    are divided into blocks of ``small / 2``.  A sweep is a tournament of the blocks, and each of its rounds
    pairs all blocks and diagonalizes the matrices ``[small, small]`` of the pairs together.

    matrices: float64 ``[modules, n, n]``.
    small: rows of the matrices that torch decomposes.

    Returns ``[modules, n]`` and ``[modules, n, n]``.  Raises RuntimeError if SWEEPS sweeps are not enough.
    """
    modules, n, _ = matrices.shape
    blocks = -(-n // small) * 2
    size = blocks * small // 2
    scale = matrices.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    a = torch.nn.functional.pad(matrices / scale, (0, size - n, 0, size - n))
    a.diagonal(dim1=1, dim2=2)[:, n:] = 2.0 * n  # above all eigenvalues, so that the padding comes last
    v = torch.eye(size, dtype=a.dtype, device=a.device).expand(modules, -1, -1)
    orders = [torch.tensor(order, device=a.device) for order in _tournament(blocks, small // 2)]
    rounding = 8 * n * torch.finfo(a.dtype).eps
    for _ in range(SWEEPS):
        # Convergence is quadratic: a sweep that begins close to the rounding error ends within it.
        last = bool((torch.linalg.vector_norm(a.tril(-1), dim=(1, 2)) <= rounding * n**0.5).all())
        for order in orders:
            a, v = _turned(a, v, order, small)
        if last:
            break
    else:
        raise RuntimeError(f"a matrix of {n} rows is not diagonal after {SWEEPS} sweeps")
    ascending = a.diagonal(dim1=1, dim2=2).argsort(dim=1)[:, None, :n]
    v = v.gather(2, ascending.expand(-1, size, -1))[:, :n]
    # Dozens of products accumulate a few rounding errors, which one step of Newton's iteration to the polar
    # factor removes.
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    v = multiplied(v, 1.5 * identity - 0.5 * multiplied(v.mT, v))
    return (v * multiplied(matrices, v)).sum(1), v


def _tournament(blocks: int, rows: int) -> Iterator[list[int]]:
    """For each round of a tournament, the order of all rows that brings paired blocks together.

    Every two blocks meet once.
    """
    last = blocks - 1
    for i in range(last):
        pairs = [(i, last), *(((i + k) % last, (i - k) % last) for k in range(1, blocks // 2))]
        # The lower block comes first and takes the smaller eigenvalues; otherwise no order would ever settle.
        yield [b * rows + row for pair in pairs for b in sorted(pair) for row in range(rows)]


def _turned(
    a: torch.Tensor, v: torch.Tensor, order: torch.Tensor, small: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``U^T a U`` and ``v U``, where U diagonalizes the diagonal blocks of ``a`` with its rows reordered.

    a, v: float64 ``[modules, size, size]``.
    order: the order of the rows ``[size]``.
    small: rows of a block.
    """
    modules, size, _ = a.shape
    back = order.argsort()
    square = a[:, order][:, :, order].view(modules, size // small, small, size // small, small)
    square = square.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, small, small)
    # Blocks that are diagonal up to rounding are left alone: among equal eigenvalues any rotation would do,
    # and a large one would undo the work on other blocks.
    done = torch.linalg.vector_norm(square.tril(-1), dim=(1, 2)) <= size * torch.finfo(a.dtype).eps
    identity = torch.eye(small, dtype=a.dtype, device=a.device)
    u = torch.where(done[:, None, None], identity, torch.linalg.eigh(square)[1])

    def times_u(x: torch.Tensor) -> torch.Tensor:
        columns = x[:, :, order].view(modules, size, -1, small).transpose(1, 2).reshape(-1, size, small)
        return multiplied(columns, u).view(modules, -1, size, small).transpose(1, 2).flatten(2)[:, :, back]

    return times_u(times_u(a).mT).mT, times_u(v)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # With beta = 0 the previous content of the result is never read, not even if it is NaN.
    return x.new_empty(x.shape[0], x.shape[1], y.shape[2]).baddbmm_(x, y, beta=0)
