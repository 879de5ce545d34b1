"""Writes the folders from which PEFT, vLLM and others read a LoRA adapter."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.errors import AdapterError, listed
from merged_lora.factors import Factors

from .experts import described, put_together
from .layout import CONFIG_NAME, INDEX_NAME, PREFIX, RANKS_KEY, WEIGHTS_NAME, Header
from .padding import padded, ranks_before
from .patterns import patterns_of


def write_folder(
    folder: Path,
    modules: Mapping[str, Factors],
    header: Header,
    metadata: Mapping[str, str],
    overwrite: bool = False,
    whole: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    keep_ranks: bool = False,
) -> None:
    """Write a PEFT folder: afterwards it is complete, or not there at all.

    folder:     the folder.
    modules:    factors by module name.
    header:     what the configuration says besides ranks and scalings.
    metadata:   pairs of text for the safetensors file.
    overwrite:  replace an adapter folder, and nothing else, that is there already.
    whole:      whole tensors, by the name of the module in ``modules_to_save`` and by their own.
    keep_ranks: write modules of several ranks as they are, instead of padding them with zeros to the largest.

    A process that is killed between the two renames of an overwrite leaves the old adapter in a hidden folder
    beside the new one.  Raises AdapterError.
    """
    folder = folder.absolute()
    check_target(folder, overwrite)
    if not keep_ranks and len({f.rank for f in modules.values()}) > 1:
        metadata = {**metadata, RANKS_KEY: ranks_before(modules)}
        modules = padded(modules)
    # Copies, because safetensors refuses tensors that share memory with each other.
    tensors = {name: tensor.clone() for name, tensor in tensors_of(modules).items()}
    for named in (whole or {}).values():
        tensors |= {PREFIX + name: tensor.contiguous().clone() for name, tensor in named.items()}
    config = json.dumps(config_of(modules, header, whole or ()), indent=2) + "\n"
    with _in_place_of(folder, overwrite) as new:
        safetensors.torch.save_file(tensors, new / WEIGHTS_NAME, {"format": "pt", **metadata})
        (new / CONFIG_NAME).write_text(config, encoding="utf-8")
        # safetensors makes its file readable for the owner only.
        shutil.copymode(new / CONFIG_NAME, new / WEIGHTS_NAME)


@contextmanager
def _in_place_of(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder, which takes the place of this one when the block ends; raises AdapterError."""
    try:
        if overwrite and folder.is_symlink():
            folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror}") from None
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir()
        yield new
        for file in new.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if overwrite and folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise AdapterError(f"cannot write {folder}: {error}") from None
    finally:
        if old.exists() and not folder.exists():  # interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise AdapterError if :func:`write_folder` would refuse this folder, or could not write it."""
    _check_writable(folder.absolute())
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise AdapterError(f"{folder} exists and is not a folder")
    try:
        entries = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror})") from None
    if entries and not overwrite:
        raise AdapterError(
            f"{folder} exists; choose another folder or overwrite it (overwrite=True, --overwrite)"
        )
    foreign = sorted(entries - {CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, CALIBRATION_NAME, "README.md"})
    if foreign:
        raise AdapterError(f"{folder} is not replaced: it also holds {listed(foreign)}")


def _check_writable(folder: Path) -> None:
    parent = next(parent for parent in folder.parents if parent.exists())
    try:
        Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror}") from None


def tensors_of(modules: Mapping[str, Factors]) -> dict[str, torch.Tensor]:
    """The tensors of ``adapter_model.safetensors`` for these modules, by PEFT's names."""
    named: dict[str, torch.Tensor] = {}
    for module, f in put_together(modules).items():
        suffixes = (
            ("lora_embedding_A", "lora_embedding_B") if f.embedding else ("lora_A.weight", "lora_B.weight")
        )
        named |= {
            f"{PREFIX}{module}.{suffix}": t.contiguous()
            for suffix, t in zip(suffixes, (f.a, f.b), strict=True)
        }
    return named


def config_of(modules: Mapping[str, Factors], header: Header, whole: Iterable[str] = ()) -> dict[str, object]:
    """The configuration from which PEFT and vLLM read these ranks and scalings.

    modules: factors by module name.
    header:  what else it says.
    whole:   names of the modules that are saved whole.
    """
    modules, parameters = described(modules)
    single = {name: f"{name}.weight" for name in header.parameters if name in modules}
    modules = {single.get(name, name): factors for name, factors in modules.items()}
    parameters |= set(single.values())
    ranks = {name: f.rank for name, f in modules.items()}
    alphas = {name: _alpha(f) for name, f in modules.items()}
    # What most modules have, so that a reader that knows no patterns scales most of them right.
    rank, alpha = Counter((ranks[name], alphas[name]) for name in modules).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": header.task_type,
        "auto_mapping": header.auto_mapping,
        "base_model_name_or_path": header.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules.keys() - parameters),
        "rank_pattern": patterns_of(ranks, rank),
        "alpha_pattern": patterns_of(alphas, alpha),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": header.fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": sorted(whole) or None,
        **({"target_parameters": sorted(parameters)} if parameters else {}),
    }


def _alpha(factors: Factors) -> float | int:
    alpha = factors.scaling * factors.rank
    return int(alpha) if alpha == int(alpha) else alpha
