"""An adapter in memory: its modules, the digest of its content, and its way to and from PEFT's files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from .calibration import CALIBRATION_NAME, Calibration, read_calibration
from .errors import AdapterError, CalibrationError, listed
from .factors import DTYPES, Factors
from .fetching.opening import local_folder
from .files.layout import MAX_ALPHA, Header
from .files.parts import KINDS, Choice
from .files.reading import read_adapter
from .files.writing import write_folder
from .locations import Location, check_path, locate

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """A LoRA adapter, read or merged: the same type goes into a merge and comes out of it.

    modules:  factors by module name, as in the base model (``model.layers.0.self_attn.q_proj``).  Experts of
              one parameter are modules, too (``model.layers.0.mlp.experts.down_proj[3]``).
    header:   base model, task and layout, as far as known.
    metadata: pairs of text; a merge records here how it was made (``merged_lora.spec``, ...).
    calibration: what was measured of its inputs and answers; the text says why the one beside it is not used.
    whole:    whole tensors that replace those of the base model, such as a classifier's head: by the name of
              the module in PEFT's ``modules_to_save``, and by their own names.

    The tensors must not be changed in place, or the digest is wrong.  Raises AdapterError if the modules are
    malformed.
    """

    modules: Mapping[str, Factors]
    header: Header = field(default_factory=Header)
    metadata: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | str | None = None
    whole: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.modules, Mapping):
            kind = type(self.modules).__name__
            raise AdapterError(f"the modules of an adapter are a mapping from names to Factors, not {kind}")
        if not self.modules:
            raise AdapterError("an adapter needs at least one module")
        for name, f in self.modules.items():
            if not isinstance(f, Factors):
                raise AdapterError(f"{name}: a module of an adapter is Factors, not {type(f).__name__}")
            if f.a.ndim != 2 or f.b.ndim != 2 or f.a.shape[0] != f.b.shape[1]:
                raise AdapterError(
                    f"{name}: factors of shape {tuple(f.a.shape)} and {tuple(f.b.shape)} do not multiply"
                )
            if f.a.dtype not in DTYPES or f.b.dtype not in DTYPES:
                raise AdapterError(
                    f"{name}: factors are {f.a.dtype} and {f.b.dtype}, not fp32, fp16 or bf16; convert them, "
                    "as with tensor.float()"
                )
            if not abs(f.scaling) <= MAX_ALPHA:  # written this way round so that NaN is rejected too
                raise AdapterError(f"{name}: scaling {f.scaling} is not a number of size up to {MAX_ALPHA:g}")

    def __repr__(self) -> str:
        base = f" of {self.header.base_model}" if self.header.base_model else ""
        return f"<Adapter{base}: {len(self.modules)} modules, rank {self.rank}>"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        drop: Iterable[str] = (),
        calibration: bool = True,
        *,
        take: Iterable[str] = (),
        rename: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
    ) -> Adapter:
        """The adapter in a PEFT folder, read into memory as a whole and checked; raises MergeError.

        A calibration in the folder is read too.  One that does not fit the adapter is a warning here, and an
        error in every merge that needs it.

        path:         the folder, a folder that holds this folder alone, or one of its files; or a location
                      that it is fetched from, such as ``hf:org/repo`` or ``s3://bucket/folder``.
        drop:         parts to leave out instead of refusing the adapter: kinds (``files.parts.KINDS``, for
                      instance ``heads``), and names or patterns of modules that were saved whole.
        calibration:  whether to read it.
        take:         kinds of parts to keep whole, in ``whole``.
        rename:       new beginnings of module names, by those that they replace.
        allow_pickle: read pickled weights if there are no others, by ``torch.load`` with ``weights_only``.
        """
        choice = Choice.of(drop, take, rename)
        adapter, used = _load(path, choice, calibration, allow_pickle)
        _check_used(os.fspath(path), choice, used)
        return adapter

    def save(
        self, path: str | os.PathLike[str], overwrite: bool = False, *, keep_ranks: bool = False
    ) -> None:
        """Write a PEFT folder, completely or not at all, from which readers get the same deltas.

        If modules differ in rank, all are written with the largest, filled up with zeros: readers that know
        one rank and one alpha then scale every module right. :meth:`load` reads each with its own rank again.

        path:       the folder.
        overwrite:  replace an adapter folder that is there already.
        keep_ranks: write each module with its own rank, which makes a smaller file for PEFT and recent vLLM.

        Raises AdapterError.
        """
        check_path(path)
        write_folder(Path(path), self.modules, self.header, self.metadata, overwrite, self.whole, keep_ranks)

    def calibrated(self, file: Path) -> Adapter:
        """The same adapter with the calibration in a file, or with the reason why that does not fit."""
        calibration: Calibration | str
        try:
            calibration = read_calibration(file)
            calibration.check(self.modules, self.digest, self.header.base_model)
        except CalibrationError as error:
            where = "" if str(error).startswith(str(file)) else f"{file}: "
            calibration = f"{where}{error}"
            logger.warning("this calibration is not used: %s", calibration)
        return self._twin(self.modules, calibration)

    def moved(self, modules: Mapping[str, Factors]) -> Adapter:
        """The same adapter with its tensors in other memory; the digest is not computed again."""
        return self._twin(modules, self.calibration)

    def renamed(self, modules: Mapping[str, Factors], names: Mapping[str, Sequence[str]]) -> Adapter:
        """The same adapter under other names of its modules, or with parts of them in their place.

        modules: that it then has.
        names:   the new names of each old one, also of modules that its calibration alone knows and of whole
                 tensors; a name that is not among them stays.

        The calibration fits it as before, and the digest stays that of what was read.
        """

        def under_new_names(named: Mapping[str, T]) -> dict[str, T]:
            return {new: value for old, value in named.items() for new in names.get(old, (old,))}

        calibration = self.calibration
        if isinstance(calibration, Calibration):
            calibration = replace(calibration, inputs=under_new_names(calibration.inputs))
        header = replace(
            self.header,
            base_copies=under_new_names(self.header.base_copies),
            parameters=tuple(under_new_names(dict.fromkeys(self.header.parameters))),
        )
        whole = {module: under_new_names(tensors) for module, tensors in self.whole.items()}
        twin = Adapter(modules, header, self.metadata, calibration, whole)
        vars(twin)["digest"] = self.digest
        text = self.key + json.dumps([[name, *f.shape] for name, f in modules.items()])
        vars(twin)["key"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        vars(twin)["origins"] = {
            new[0]: self.origins.get(old, old)
            for old in self.modules
            if len(new := names.get(old, (old,))) == 1
        }
        return twin

    def _twin(self, modules: Mapping[str, Factors], calibration: Calibration | str | None) -> Adapter:
        twin = Adapter(modules, self.header, self.metadata, calibration, self.whole)
        known = ("digest", "key", "origins", "nonfinite")
        vars(twin).update({name: vars(self)[name] for name in known if name in vars(self)})
        return twin

    @cached_property
    def digest(self) -> str:
        """blake2b of all that determines the deltas: names, kinds, scalings, shapes, dtypes and values."""
        h = hashlib.blake2b(digest_size=16)
        for name, f in sorted(self.modules.items()):
            h.update(f"{name}\0{f.scaling!r}\0{f.embedding}\0".encode())
            for tensor in (f.a, f.b):
                h.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                h.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return h.hexdigest()

    @cached_property
    def key(self) -> str:
        """The digest of what was read, or another text if its modules were renamed since."""
        return self.digest

    @cached_property
    def origins(self) -> Mapping[str, str]:
        """The names under which modules were read, by those that they got since, unless they became parts.

        Random entries are drawn by these, and so are the same whatever the other sources call a module.
        """
        return {}

    @property
    def identity(self) -> str:
        """A digest of the deltas and of the calibration, or of the reason why that is not used.

        Equal to ``digest`` if there is no calibration.
        """
        if self.calibration is None:
            return self.digest
        known = self.calibration.digest if isinstance(self.calibration, Calibration) else self.calibration
        return hashlib.blake2b((self.digest + known).encode(), digest_size=16).hexdigest()

    @cached_property
    def nonfinite(self) -> str | None:
        """The first module that holds NaN or infinity; None if every entry is finite."""
        # Tensors that were made together are parts of one buffer, which is searched at once.
        if all(map(_is_finite, _joined(x for f in self.modules.values() for x in (f.a, f.b)))):
            return None
        return next(n for n, f in self.modules.items() if not (_is_finite(f.a) and _is_finite(f.b)))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(f.rank for f in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, and of the calibration."""
        calibration = self.calibration.nbytes if isinstance(self.calibration, Calibration) else 0
        return sum(f.nbytes for f in self.modules.values()) + calibration


def load_sources(
    paths: Mapping[str, str | os.PathLike[str]],
    drop: Iterable[str] = (),
    take: Mapping[str, str] | None = None,
    rename: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
) -> dict[str, Adapter]:
    """The adapters of a merge by name, read alike; raises MergeError.

    paths:        where each is, as :meth:`Adapter.load` takes it.
    drop:         parts to leave out of all of them.
    take:         for kinds of parts that a merge carries over, the name of the source that they come from;
                  they are left out of the others.
    rename:       new beginnings of module names, by those that they replace, in whichever sources have them.
    allow_pickle: read pickled weights if there are no others.

    What is named to be dropped, taken or renamed and is in no source is an error, because it is misspelt.
    """
    for what, given in (("the sources", paths), ("take", take or {})):
        if not isinstance(given, Mapping):
            raise AdapterError(f"{what} must be a mapping, not {type(given).__name__}")
    taken = dict(take or {})
    drop = Choice.of(drop, taken.keys(), rename).drop
    for kind, name in taken.items():
        if name not in paths:
            raise AdapterError(f"cannot take {kind} from {name!r}, which is no source of this merge")
    adapters, used = {}, set[str]()
    for name, path in paths.items():
        own = {kind for kind, source in taken.items() if source == name}
        choice = Choice.of(drop | (taken.keys() - own), own, rename)
        adapters[name], found = _load(path, choice, True, allow_pickle)
        used |= found
        for kind in sorted(own - found):
            raise AdapterError(f"cannot take {kind} from {name!r}: {path} has none")
    _check_used(listed(paths), Choice.of(drop, (), rename), used)
    return adapters


def _check_used(where: str, choice: Choice, used: AbstractSet[str]) -> None:
    """Raise AdapterError if a name that is to be dropped, or a beginning to replace, is in no adapter."""
    unused = sorted(choice.drop - KINDS.keys() - used)
    if unused:
        near = get_close_matches(unused[0], KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"parts are {', '.join(KINDS)}"
        raise AdapterError(f"{where}: no module that is called {listed(map(repr, unused))}; {hint}")
    unused = sorted(choice.rename.keys() - used)
    if unused:
        raise AdapterError(f"{where}: no module whose name begins with {listed(map(repr, unused))}")


def _load(
    path: str | os.PathLike[str], choice: Choice, calibration: bool, allow_pickle: bool
) -> tuple[Adapter, frozenset[str]]:
    """An adapter, and the words of the choice that had an effect."""
    fetched = isinstance(locate(path), Location)
    with local_folder(path) as folder:
        try:
            contents = read_adapter(folder, choice, allow_pickle)
        except AdapterError as error:
            if not fetched:
                raise
            # A folder of a cache says nothing to a user.
            raise AdapterError(str(error).replace(str(folder), str(path))) from None
        adapter = Adapter(contents.modules, contents.header, contents.metadata, None, contents.whole)
        if adapter.nonfinite:
            raise AdapterError(
                f"{path}: {adapter.nonfinite} holds NaN or infinity; train or export the adapter again"
            )
        file = contents.folder / CALIBRATION_NAME
        beside = calibration and os.path.lexists(file)
        return adapter.calibrated(file) if beside else adapter, contents.used


def _joined(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors, or instead of those that fill a buffer together the whole buffer as one tensor."""
    buffers: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        buffers.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    for parts in buffers.values():
        storage = parts[0].untyped_storage()
        if len(parts) > 1 and sum(part.nbytes for part in parts) == storage.nbytes():
            yield parts[0].new_empty(0).set_(storage)
        else:
            yield from parts


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    extremes = torch.aminmax(tensor)  # NaN if there is one; takes a quarter of the time of isfinite
    return math.isfinite(extremes.min) and math.isfinite(extremes.max)


def calibrations_of(adapters: Mapping[str, Adapter], what: str) -> tuple[Calibration, ...]:
    """The calibrations of adapters; raises CalibrationError, which says how to make those that are missing.

    adapters: by name.
    what:     what needs them, for the error.
    """
    found: list[Calibration] = []
    for name, adapter in adapters.items():
        try:
            if isinstance(adapter.calibration, str):
                raise CalibrationError(adapter.calibration)
            if adapter.calibration is not None:
                adapter.calibration.check(adapter.modules, adapter.digest, adapter.header.base_model)
                found.append(adapter.calibration)
        except CalibrationError as error:
            raise CalibrationError(f"{what} cannot use the calibration of {name}: {error}") from None
    missing = [name for name, adapter in adapters.items() if adapter.calibration is None]
    if missing:
        base = adapters[missing[0]].header.base_model or "MODEL"
        raise CalibrationError(
            f"{what} needs a calibration of every source, but {listed(missing)} "
            f"{'has' if len(missing) == 1 else 'have'} none; make one with: merged-lora calibrate "
            f"--model {base} --adapter {missing[0]}=PATH --prompts FILE.jsonl"
        )
    return tuple(found)
