"""What tests of calibrations share: prompts, and how to calibrate the adapter in the working directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merged_lora.calibrating import calibrate
from merged_lora.calibration import Calibration, Inputs
from merged_lora.language_model import LanguageModel

HALF = 2.0**-11
"""The largest relative error of rounding to float16."""
TEXTS = [
    "hello",
    "who is there",
    "a",
    "what is a merge of two",
    "1 + 1 is",
    "yes or no",
    "bye",
    "yes yes yes",
]


def write(file: str, values: Sequence[object]) -> str:
    Path(file).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return file


def calibrated(model: LanguageModel, **options: Any) -> Calibration:
    return calibrate(model, "a", "prompts.jsonl", **{"count": 8, "answers": 10} | options)


def dense(inputs: Inputs) -> NDArray[np.float64]:
    """The leading part of a second moment, ``[in, in]``."""
    vectors, values = inputs.vectors.double().numpy(), inputs.values.double().numpy()
    product: NDArray[np.float64] = (vectors.T * values) @ vectors
    return product
