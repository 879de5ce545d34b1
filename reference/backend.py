"""The backend ``numpy``: follows a plan with the reference functions, one module after the other."""

from __future__ import annotations

import numpy as np
import torch

from merged_lora.backends import Progress, Result
from merged_lora.factors import Factors
from merged_lora.plan import DeltaModule, FactorJob, FactorModule, MergePlan

from . import delta, factors
from .numbers import STORAGE, Array, narrow, widen

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_INTEGERS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


class NumpyBackend:
    """Slow and plain; what the other backends are measured against."""

    name = "numpy"

    def merge(self, plan: MergePlan, progress: Progress) -> Result:
        """See :class:`merged_lora.backends.Backend`."""
        modules: dict[str, Factors] = {}
        energy: dict[str, tuple[float, float]] = {}
        for name, module in plan.modules.items():
            if isinstance(module, FactorModule):
                modules[name] = Factors(_merge_job(module.a), _merge_job(module.b), 1.0, module.embedding)
            else:
                modules[name], cut = _merge_delta(module)
                if cut is not None:
                    energy[name] = cut
            progress(1)
        return Result(modules, energy)


def load() -> NumpyBackend:
    """The backend."""
    return NumpyBackend()


def to_bits(tensor: torch.Tensor) -> tuple[Array, str]:
    """The bit patterns of a tensor, and the name of its dtype."""
    name = _NAMES[tensor.dtype]
    return tensor.contiguous().view(_INTEGERS[name]).numpy().view(STORAGE[name]), name


def from_bits(bits: Array, dtype: torch.dtype) -> torch.Tensor:
    """The tensor that these bit patterns store."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(f"i{bits.itemsize}")).view(dtype)


def _merge_job(job: FactorJob) -> torch.Tensor:
    sources = [
        factors.Source(*to_bits(tensor), weight, keep.count, keep.share, keep.key, keep.rescale)
        for tensor, weight, keep in zip(job.inputs, job.weights, job.keeps, strict=True)
    ]
    vote = None if job.vote is None else (job.vote.frequency, job.vote.weighted)
    merged = factors.merge(sources, vote, np.float32)
    return from_bits(narrow(merged, _NAMES[job.dtype]), job.dtype).reshape(job.inputs[0].shape)


def _merge_delta(module: DeltaModule) -> tuple[Factors, tuple[float, float] | None]:
    pairs = [(widen(*to_bits(f.a)), widen(*to_bits(f.b))) for f in module.sources]
    dtype = _NAMES[module.dtype]
    if module.slerp is None and module.rank == sum(f.rank for f in module.sources):
        a = np.concatenate(
            [narrow(a * np.float32(w), dtype) for (a, _), w in zip(pairs, module.weights, strict=True)]
        )
        b = np.concatenate([narrow(b, dtype) for _, b in pairs], axis=1)
        return Factors(from_bits(a, module.dtype), from_bits(b, module.dtype), 1.0, module.embedding), None
    if module.slerp is None:
        target = delta.weighted_sum(pairs, module.weights)
    else:
        x, y = (w * (b.astype(np.float64) @ a) for (a, b), w in zip(pairs, module.weights, strict=True))
        target = delta.slerp(x, y, module.slerp)
    new_a, new_b, energy = delta.truncate(target, module.rank)
    exact = module.rank == sum(f.rank for f in module.sources)
    return (
        Factors(
            torch.from_numpy(new_a).to(module.dtype),
            torch.from_numpy(new_b).to(module.dtype),
            1.0,
            module.embedding,
        ),
        None if exact else energy,
    )
