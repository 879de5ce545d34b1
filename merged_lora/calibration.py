"""What the inputs of an adapter's modules look like, and how the adapter answers: a file beside the adapter.

The file is made by ``calibrating.py`` and used by ``regmean`` and by replays.  Knows nothing of models or of
merging.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch

from .errors import CalibrationError, listed
from .factors import Factors
from .scratch import in_place_of
from .tensor_files import read_tensors

CALIBRATION_NAME = "merged_lora_calibration.safetensors"
VERSION = "1"
PARTS = ("values", "vectors", "rest")
"""The tensors of :class:`Inputs`, in the order of the file."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The second moment ``s E[x x^T]`` of a module's inputs, which is ``V^T diag(values) V + diag(rest)``.

    The factor s says how much the adapter's answers depend on what the module makes of these inputs.

    values:  the largest eigenvalues, float32 ``[k]``.
    vectors: their eigenvectors V, float16 ``[k, in]``.
    rest:    what the diagonal has besides, float32 ``[in]``.

    All of it is zero if no token ever reached the module, or if no answer depends on it.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    rest: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.values.nbytes + self.vectors.nbytes + self.rest.nbytes


@dataclass(frozen=True)
class Exchange:
    """A prompt and what the adapter alone answers to it, greedily, as token ids.

    prompt: with everything that the chat template adds.
    answer: with the token that ends it, unless it was cut.
    fitted: whether the inputs were measured on it; one that was not is a fair test of a merge fitted to them.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    fitted: bool


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured of one adapter.

    inputs:     by module name; modules that have the same inputs share one object.  Modules that the adapter
                lacks are among them, because other adapters may disturb it there.
    adapter:    digest of the adapter's weights.
    base_model: name of the model that it was measured on, as the adapter names it.
    prompts:    number of prompts that the inputs were measured on.
    tokens:     number of tokens of these prompts and of their answers.
    exchanges:  for replays; may be empty.
    """

    inputs: Mapping[str, Inputs]
    adapter: str
    base_model: str | None
    prompts: int
    tokens: tuple[int, int]
    exchanges: tuple[Exchange, ...] = field(default=())

    @cached_property
    def digest(self) -> str:
        """blake2b of everything that a merge or its replay can depend on."""
        h = hashlib.blake2b(f"{self.adapter}\0{self.exchanges}".encode(), digest_size=16)
        known: dict[int, str] = {}
        for name, inputs in sorted(self.inputs.items()):
            first = known.setdefault(id(inputs), name)
            h.update(f"{name}\0{first}\0".encode())
            if first == name:
                for tensor in _tensors(inputs).values():
                    h.update(f"{tuple(tensor.shape)}\0".encode())
                    h.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return h.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once, and of the token ids."""
        ids = sum(len(exchange.prompt) + len(exchange.answer) for exchange in self.exchanges)
        return sum(inputs.nbytes for inputs in _distinct(self.inputs.values())) + 4 * ids

    def check(self, modules: Mapping[str, Factors], adapter: str, base_model: str | None) -> None:
        """Raise CalibrationError unless it was made for this adapter.

        modules:    of the adapter.
        adapter:    digest of its weights.
        base_model: the base model that its configuration names.
        """
        if self.adapter != adapter:
            raise CalibrationError(
                "it was made for other weights than the adapter has now, calibrate it again"
            )
        if self.base_model != base_model:
            raise CalibrationError(f"it was made on {self.base_model}, the adapter is for {base_model}")
        missing = sorted(modules.keys() - self.inputs.keys())
        if missing:
            raise CalibrationError(f"it lacks modules of the adapter: {listed(missing)}")
        for name, factors in modules.items():
            width, there = factors.shape[1], self.inputs[name].rest.shape[0]
            if there != width:
                raise CalibrationError(f"it has {there} inputs for {name}, which takes {width}")


def read_calibration(file: Path) -> Calibration:
    """The calibration in a file, read into memory and checked by itself; raises CalibrationError."""
    try:
        tensors, metadata = read_tensors(file)
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CalibrationError(f"{file}: {error}") from None
    version = metadata.get("version")
    if version != VERSION:
        raise CalibrationError(f"{file}: has format {str(version)[:16]!r}, this release reads {VERSION!r}")
    try:
        return _parsed(tensors, metadata)
    except CalibrationError as error:
        raise CalibrationError(f"{file}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise CalibrationError(f"{file}: its parts do not fit together") from None


def write_calibration(file: Path, calibration: Calibration) -> None:
    """Write a calibration, completely or not at all; raises CalibrationError."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    for name, inputs in sorted(calibration.inputs.items()):
        if names.setdefault(id(inputs), name) == name:
            # Copies, because safetensors refuses tensors that share memory with each other.
            tensors |= {f"{name}.{part}": t.clone() for part, t in _tensors(inputs).items()}
    texts = [exchange.prompt + exchange.answer for exchange in calibration.exchanges]
    tensors["exchanges"] = torch.tensor(list(itertools.chain.from_iterable(texts)), dtype=torch.int32)
    metadata = {
        "version": VERSION,
        "adapter": calibration.adapter,
        "base_model": json.dumps(calibration.base_model),
        "prompts": str(calibration.prompts),
        "tokens": json.dumps(calibration.tokens),
        "inputs": json.dumps({name: names[id(inputs)] for name, inputs in calibration.inputs.items()}),
        "lengths": json.dumps([(len(e.prompt), len(e.answer), e.fitted) for e in calibration.exchanges]),
    }
    try:
        with in_place_of(file) as scratch:
            scratch.write_bytes(safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise CalibrationError(f"cannot write {file}: {error.strerror or error}") from None


def _parsed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Calibration:
    names: dict[str, str] = json.loads(metadata["inputs"])
    inputs = {
        first: Inputs(*[tensors[f"{first}.{part}"] for part in PARTS])
        for first in sorted(set(names.values()))
    }
    for first, found in inputs.items():
        _check_inputs(first, found)
    exchanges = _exchanges(tensors["exchanges"], json.loads(metadata["lengths"]))
    prompt_tokens, answer_tokens = json.loads(metadata["tokens"])
    return Calibration(
        inputs={name: inputs[first] for name, first in names.items()},
        adapter=metadata["adapter"],
        base_model=json.loads(metadata["base_model"]),
        prompts=int(metadata["prompts"]),
        tokens=(int(prompt_tokens), int(answer_tokens)),
        exchanges=exchanges,
    )


def _exchanges(ids: torch.Tensor, lengths: list[tuple[int, int, bool]]) -> tuple[Exchange, ...]:
    """The exchanges whose prompts and answers lie in ``ids``, one after the other."""
    if ids.dtype != torch.int32 or ids.ndim != 1 or bool((ids < 0).any()):
        raise CalibrationError("its token ids are not whole numbers from 0")
    counts = [length for prompt, answer, _ in lengths for length in (prompt, answer)]
    if not all(type(count) is int and count > 0 for count in counts) or sum(counts) != len(ids):
        raise CalibrationError("its token ids do not have the lengths that it states")
    rest = iter(ids.tolist())
    texts = iter([tuple(itertools.islice(rest, count)) for count in counts])
    return tuple(Exchange(next(texts), next(texts), fitted is True) for _, _, fitted in lengths)


def _check_inputs(name: str, inputs: Inputs) -> None:
    values, vectors, rest = inputs.values, inputs.vectors, inputs.rest
    dtypes = (values.dtype, vectors.dtype, rest.dtype) == (torch.float32, torch.float16, torch.float32)
    if not dtypes or vectors.shape != (values.numel(), rest.numel()) or values.ndim != 1 or rest.ndim != 1:
        raise CalibrationError(f"the inputs of {name} have wrong shapes or dtypes")
    if not all(bool(tensor.isfinite().all()) for tensor in (values, vectors, rest)):
        raise CalibrationError(f"the inputs of {name} hold NaN or infinity")
    if bool((values < 0).any()) or bool((rest < 0).any()):
        raise CalibrationError(f"the inputs of {name} have negative squares")


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return dict(zip(PARTS, (inputs.values, inputs.vectors, inputs.rest), strict=True))


def _distinct(inputs: Iterable[Inputs]) -> Sequence[Inputs]:
    return list({id(each): each for each in inputs}.values())
