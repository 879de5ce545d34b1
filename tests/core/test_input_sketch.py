"""The sketch of a stream of inputs keeps what matters of their second moment."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrations import HALF, dense
from merged_lora.sketch import Sketch, TokenCounts


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 80),
    rank=st.integers(1, 16),
    chunks=st.lists(st.integers(0, 400), min_size=1, max_size=5),
)
def test_a_sketch_of_inputs_of_low_rank_is_exact_however_many_there_are(
    seed: int, width: int, rank: int, chunks: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rank, width, generator=generator)
    rows = torch.randn(sum(chunks), rank, generator=generator) @ factor
    weights = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    sketch = Sketch(width, 16, torch.device("cpu"))
    for part, weight in zip(torch.split(rows, chunks), torch.split(weights, chunks), strict=True):
        sketch.add(part, weight)
        assert sketch.used <= len(sketch.rows) == 256
    inputs = sketch.result()
    expected = (rows.double().T * weights) @ rows.double()
    got = torch.tensor(dense(inputs)) + torch.diag(inputs.rest.double())
    # The rows are rounded to float32, and the vectors to float16. The trace bounds all entries.
    assert float((got - expected).abs().max()) <= (4 * HALF) * float(expected.trace()) + 1e-30


def test_a_sketch_keeps_the_leading_directions_of_a_long_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 0.95 ** torch.arange(400.0)  # a slow decay: much of the energy is beyond what is kept
    rows = torch.randn(6000, 400, generator=generator) * scales
    sketch = Sketch(400, 32, torch.device("cpu"))
    for part in torch.split(rows, 100):
        sketch.add(part, torch.full((len(part),), 1 / 6000, dtype=torch.float64))
    inputs = sketch.result()
    expected = rows.double().T @ rows.double() / 6000
    best = torch.linalg.eigvalsh(expected).flip(0)[:32]
    assert float(inputs.values.sum() / best.sum()) > 0.999
    vectors = inputs.vectors.double()
    captured = torch.einsum("kn,nm,km->k", vectors, expected, vectors)
    assert float(captured.sum() / best.sum()) > 0.999
    assert len(sketch.rows) == 256


def test_an_eigenvalue_of_zero_is_left_out() -> None:
    sketch = Sketch(6, 4, torch.device("cpu"))
    sketch.add(
        torch.eye(6)[[0, 0, 3, 3]] * torch.tensor([[2.0], [2.0], [1.0], [0.0]]),
        torch.ones(4, dtype=torch.float64),
    )
    inputs = sketch.result()
    assert inputs.values.tolist() == pytest.approx([8, 1])
    assert inputs.vectors.abs().tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert inputs.rest.tolist() == pytest.approx([0] * 6, abs=1e-6)
    sketch = Sketch(6, 4, torch.device("cpu"))
    sketch.add(torch.zeros(9, 6), torch.ones(9, dtype=torch.float64))
    assert (sketch.result().vectors.shape, float(sketch.result().rest.sum())) == ((0, 6), 0)


def test_inputs_whose_squares_differ_by_far_are_told_apart() -> None:
    rows = torch.zeros(300, 8)
    rows[:, 0] = 3e4  # as the first token of a text has them
    rows[:, 1] = torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0)
    sketch = Sketch(8, 4, torch.device("cpu"))
    sketch.add(rows, torch.full((300,), 1 / 300, dtype=torch.float64))
    inputs = sketch.result()
    assert inputs.values.tolist() == pytest.approx([9e8, 1], rel=1e-5)


def test_tokens_are_counted_by_their_weights() -> None:
    counts = TokenCounts(4, torch.device("cpu"))
    counts.add(torch.tensor([1, 1, 3]), torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    assert counts.result().rest.tolist() == pytest.approx([1 / 7, 2.5 / 7, 1 / 7, 2.5 / 7])
