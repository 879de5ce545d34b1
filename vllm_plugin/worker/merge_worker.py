"""In each worker: snapshots of the adapters in memory, and merges made from them for vLLM's own slots.

How a merge is made is a maker's business (``makers.py``), and how vLLM reads and holds an adapter a shelf's
(``hooks/worker.py``).  Calls come in by RPC; none ever raises, on any rank, because vLLM does not survive a
failed RPC at tensor parallel sizes above 1.  What the step path needs later is then certain to succeed: it
reads no disk, and the merge it may have to repeat has succeeded before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from merged_lora.adapters import Adapter
from merged_lora.engine import plan
from merged_lora.errors import AdapterError, PlanError, UnknownAdapterError
from merged_lora.plan import MergePlan
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts, Reply, answer

from .makers import Maker
from .snapshots import Snapshots

Model = TypeVar("Model")

PREPARED_AHEAD = 4  # merges kept for a slot that vLLM has not asked for yet; an older one is made again
LIGHT_MERGES = 64  # merges without values that are kept, taken or not: about 1 MB for 500 modules


class Shelf(Protocol[Model]):
    """How vLLM reads and holds plain adapters."""

    def find(self, path: str) -> Path:
        """The folder that an adapter's path or hub name means."""
        ...

    def read(self, path: str, options: Mapping[str, Any]) -> Model:
        """The adapter as vLLM reads it from disk; raises whatever vLLM does where it would refuse it."""
        ...

    def size(self, model: Model) -> int:
        """Bytes of its tensors."""
        ...

    def scalings(self, model: Model) -> dict[str, float]:
        """What vLLM scales each module by."""
        ...

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> Model:
        """The same as ``read`` gave, under another id; raises PlanError where it would not be."""
        ...

    def copy(self, model: Model, number: int) -> Model:
        """A copy that shares nothing, under another id."""
        ...


@dataclass(frozen=True)
class _Plain:
    """A plain adapter's copy: its key, and the scalings where the copy is an adapter of ours."""

    key: str
    scalings: Mapping[str, float] | None


@dataclass(frozen=True)
class _Prepared(Generic[Model]):
    model: Model
    contents: tuple[str, ...]


class MergeWorker(Generic[Model]):
    """The adapters that are served or may be merged, and merges waiting for their slot.

    max_rank: the engine's ``--max-lora-rank``.  limit: bytes for copies of adapters.  shelf: vLLM's way with
    plain adapters.  maker: makes of a plan what vLLM holds.
    """

    def __init__(self, max_rank: int, limit: int, shelf: Shelf[Model], maker: Maker[Model]) -> None:
        self._max_rank = max_rank
        self._shelf = shelf
        self.maker = maker
        self._snapshots: Snapshots[Adapter | Model] = Snapshots(limit)
        self._plain: dict[str, _Plain] = {}
        self._prepared: OrderedDict[str, _Prepared[Model]] = OrderedDict()
        self._holders: dict[int, tuple[str, Facts | None]] = {}

    # RPC

    def capture(
        self, owner: str, needed: Collection[str] | None, path: str, options: Mapping[str, Any] | None = None
    ) -> Reply:
        """Copy the adapter at ``path`` into memory for its owner, who needs no other copies than those.

        needed: keys; None where the owner needs all it ever captured.  options: how vLLM reads it, where it
        is to be served too; without them it is a source alone.
        """

        def work() -> Reply:
            if needed is not None:
                self._keep(owner, needed)
            read = self._shelf.read(path, options) if options is not None else None
            scalings = self._shelf.scalings(read) if read is not None else {}
            try:
                adapter = self._load(path)
                if read is not None:
                    self._shelf.build(1, adapter, scalings)  # as the step path will
            except (AdapterError, PlanError) as error:
                if read is None:
                    raise
                key = "own-" + blake2b(path.encode(), digest_size=16).hexdigest()
                nbytes, refusal = self._shelf.size(read), str(error)
                self._snapshots.add(owner, key, read, nbytes, replace=True)
                self._plain[path] = _Plain(key, None)
            else:
                key, nbytes, refusal = adapter.digest, adapter.nbytes, ""
                if key not in self._snapshots:
                    self._snapshots.check_room(nbytes)
                    adapter = self.maker.adopt(adapter)
                self._snapshots.add(owner, key, adapter, nbytes)
                if read is not None:
                    self._plain[path] = _Plain(key, scalings)
            return {
                "ok": True,
                "key": key,
                "refusal": refusal,
                "nbytes": nbytes,
                "held": self._snapshots.nbytes,
            }

        return answer(work)

    def release(self, owner: str, needed: Collection[str]) -> Reply:
        """Drop the copies that nobody needs, now that this owner needs no more than those."""

        def work() -> Reply:
            self._keep(owner, needed)
            return {"ok": True, "key": "", "held": self._snapshots.nbytes}

        return answer(work)

    def prepare(self, path: str, loaded: Collection[int]) -> Reply:
        """Make and check the merge that ``path`` names, so that loading it cannot fail.

        loaded: ids of the adapters that vLLM holds in this worker.
        """

        def work() -> Reply:
            identity = MergeIdentity.from_path(path)
            self._holders = {
                number: (digest, facts)
                for number, (digest, facts) in self._holders.items()
                if number in loaded or digest in self._prepared
            }
            holder, facts = self._holders.get(identity.number, (identity.digest, None))
            if holder != identity.digest:
                raise PlanError(NUMBER_TAKEN)
            made = facts is None
            if facts is None:
                model, facts = self.maker.prepare(identity.number, self._plan(identity))
                self._holders[identity.number] = identity.digest, facts
                self._put(identity, model)
            held = self._snapshots.nbytes
            return {"ok": True, "key": identity.digest, "facts": asdict(facts), "made": made, "held": held}

        return answer(work)

    # The step path

    def take(self, path: str) -> Model:
        """The merge that ``path`` names, for a slot: the prepared one, or made again from the snapshots."""
        identity = MergeIdentity.from_path(path)
        self._holders.setdefault(identity.number, (identity.digest, None))
        prepared = self._prepared.pop(identity.digest, None)
        model = prepared.model if prepared else self.maker.again(identity.number, self._plan(identity))
        if self.maker.light:
            self._put(identity, model)
        return model

    def plain(self, path: str, number: int) -> Model | None:
        """The adapter that was captured from ``path`` to be served, from memory; None where none was."""
        plain = self._plain.get(path)
        if plain is None:
            return None
        copy = self._snapshots[plain.key]
        if isinstance(copy, Adapter):
            return self._shelf.build(number, copy, plain.scalings or {})
        return self._shelf.copy(copy, number)

    def _load(self, path: str) -> Adapter:
        folder = self._shelf.find(path)
        try:  # before a byte of it is in memory
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
        self._snapshots.check_size(size)
        return Adapter.load(folder)

    def _keep(self, owner: str, needed: Collection[str]) -> None:
        dropped = self._snapshots.keep(owner, needed)
        if dropped:
            self._plain = {path: plain for path, plain in self._plain.items() if plain.key not in dropped}
            for digest in [d for d, p in self._prepared.items() if not dropped.isdisjoint(p.contents)]:
                del self._prepared[digest]

    def _put(self, identity: MergeIdentity, model: Model) -> None:
        self._prepared.pop(identity.digest, None)
        self._prepared[identity.digest] = _Prepared(model, identity.contents)
        while len(self._prepared) > (LIGHT_MERGES if self.maker.light else PREPARED_AHEAD):
            self._prepared.popitem(last=False)

    def _plan(self, identity: MergeIdentity) -> MergePlan:
        sources: dict[str, Adapter] = {}
        for name, content in zip(identity.spec.names, identity.contents, strict=True):
            copy = self._snapshots.get(content)
            if not isinstance(copy, Adapter):
                raise UnknownAdapterError(f"no snapshot of {name!r} in this worker; register it again")
            sources[name] = copy
        return plan(identity.spec, sources, self._max_rank)
