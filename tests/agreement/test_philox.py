"""The random numbers behind DARE's masks are Philox4x32-10, the same in NumPy and compiled."""

from __future__ import annotations

import numpy as np
import pytest

from merged_lora.cpu_kernels import kernels
from merged_lora.reference.philox import draws, philox4x32

KNOWN_ANSWERS = {
    "zeros": (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
"""Counter, key and result, low words first: the lines ``philox4x32 10`` of Random123's kat_vectors."""


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers_of_random123(name: str) -> None:
    counter, key, result = (words(text) for text in KNOWN_ANSWERS[name])
    found = philox4x32(np.array([counter], dtype=np.uint64), key[0] | key[1] << 32)
    assert found.tolist() == [result]


def test_draws_are_the_halves_of_the_words_low_half_first() -> None:
    expected = [
        half for word in words("6627e8d5 e169c58d bc57ac4c 9b00dbd8") for half in (word & 0xFFFF, word >> 16)
    ]
    assert draws(8, key=0).tolist() == expected


def test_draw_i_is_lane_i_mod_8_of_counter_i_div_8() -> None:
    key = 0x0123456789ABCDEF
    for index in (0, 7, 8, 1000, 4095):
        (four,) = philox4x32(np.array([[index // 8, 0, 0, 0]], dtype=np.uint64), key).tolist()
        lane = index % 8
        assert draws(4096, key)[index] == (four[lane // 2] >> 16 * (lane % 2)) & 0xFFFF


@pytest.mark.parametrize("key", [0, 1, 0xFFFFFFFF, 1 << 32, 0x0123456789ABCDEF, 2**64 - 1])
def test_compiled_draws_are_the_same_wherever_a_block_begins(key: int) -> None:
    whole = draws(3 * kernels.BLOCK, key)
    for first in (0, 8, kernels.BLOCK, 2 * kernels.BLOCK - 8):
        block = np.empty(kernels.BLOCK, np.uint16)
        kernels._fill_draws(first, np.uint64(key), block)
        assert (block == whole[first : first + kernels.BLOCK]).all()
