"""A worker's side of the protocol: snapshots of adapters, and merges made from them for vLLM's slots.

``makers.py`` makes a merge, and ``hooks/worker.py`` reads and holds adapters as vLLM does.  The methods for
RPC never raise; see ``rpc.py``.  What an engine's step needs later is certain to succeed: it reads no disk,
and a merge that it may have to make again has succeeded before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from merged_lora.adapters import Adapter
from merged_lora.engine import plan
from merged_lora.errors import AdapterError, CalibrationError, PlanError, UnknownAdapterError
from merged_lora.lru import Lru
from merged_lora.plan import MergePlan
from merged_lora.replay import exchanges_of
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts, Reply, answer

from .makers import Maker
from .snapshots import Snapshots

Model = TypeVar("Model")

PREPARED_AHEAD = 4
"""Number of merges kept until vLLM loads them into a slot; an older one is made again."""
LIGHT_MERGES = 64
"""Number of merges without values that are kept, loaded or not: about 1 MB for 500 modules."""
OUTPUT_HEAD = "lm_head"
"""Last part of the name of the module that makes logits."""


class PlainAdapters(Protocol[Model]):
    """Plain adapters as vLLM reads and holds them."""

    def find(self, path: str) -> Path:
        """The folder of the adapter with this path or this name on the hub."""
        ...

    def read(self, path: str, options: Mapping[str, Any]) -> Model:
        """The adapter as vLLM reads it from disk; raises MergeError if vLLM refuses it."""
        ...

    def size(self, model: Model) -> int:
        """Bytes of the tensors of an adapter."""
        ...

    def scalings(self, model: Model) -> dict[str, float]:
        """The factor by which vLLM scales each module."""
        ...

    def build(self, number: int, adapter: Adapter, scalings: Mapping[str, float]) -> Model:
        """The adapter as :meth:`read` returns it, under another id; raises PlanError if it would differ."""
        ...

    def copy(self, model: Model, number: int) -> Model:
        """A copy under another id that shares no tensor."""
        ...


@dataclass(frozen=True)
class _Plain:
    """A plain adapter that vLLM serves.

    key:      key of its copy.
    scalings: vLLM's factor for each module, if the copy is an :class:`Adapter`; None if it is vLLM's own.
    """

    key: str
    scalings: Mapping[str, float] | None


@dataclass(frozen=True)
class _Prepared(Generic[Model]):
    model: Model
    contents: tuple[str, ...]


class MergeWorker(Generic[Model]):
    """The adapters that are served or may be merged, and the merges that wait for their slot.

    max_rank: the engine's ``--max-lora-rank``.
    limit:    bytes for copies of adapters.
    adapters: reads and holds plain adapters as vLLM does.
    maker:    makes what vLLM holds of a merge.
    """

    def __init__(
        self, max_rank: int, limit: int, adapters: PlainAdapters[Model], maker: Maker[Model]
    ) -> None:
        self._max_rank = max_rank
        self._adapters = adapters
        self.maker = maker
        self._snapshots: Snapshots[Adapter | Model] = Snapshots(limit)
        self._plain: dict[str, _Plain] = {}
        self._prepared: Lru[str, _Prepared[Model]] = Lru()
        self._made: dict[int, tuple[str, Facts | None]] = {}  # digest and facts of the merge with an id

    # RPC

    def capture(
        self, owner: str, needed: Collection[str] | None, path: str, options: Mapping[str, Any] | None = None
    ) -> Reply:
        """Copy an adapter into memory.

        owner:   the API server that asks.
        needed:  keys of the other copies that the owner needs; None for all that it ever captured.
        path:    folder of the adapter, or its name on the hub.
        options: how vLLM reads it, if vLLM is to serve it too; None for a source only.
        """

        def work() -> Reply:
            if needed is not None:
                self._keep_copies(owner, needed)
            read = self._adapters.read(path, options) if options is not None else None
            scalings = self._adapters.scalings(read) if read is not None else {}
            try:
                adapter = self._load(path)
                if read is not None:
                    self._adapters.build(1, adapter, scalings)  # as the step path will
            except (AdapterError, PlanError) as error:
                if read is None:
                    raise
                key = "own-" + blake2b(path.encode(), digest_size=16).hexdigest()
                nbytes, refusal = self._adapters.size(read), str(error)
                self._snapshots.add(owner, key, read, nbytes, replace=True)
                self._plain[path] = _Plain(key, None)
            else:
                key, nbytes, refusal = adapter.identity, adapter.nbytes, ""
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
        """Drop the copies that nobody needs, given the keys of those that this owner needs."""

        def work() -> Reply:
            self._keep_copies(owner, needed)
            return {"ok": True, "key": "", "held": self._snapshots.nbytes}

        return answer(work)

    def prepare(self, path: str, loaded: Collection[int]) -> Reply:
        """Make and check a merge, so that loading it cannot fail.

        path:   path of the merge.
        loaded: ids of the adapters that vLLM holds in this worker.
        """

        def work() -> Reply:
            identity = MergeIdentity.from_path(path)
            self._made = {
                number: (digest, facts)
                for number, (digest, facts) in self._made.items()
                if number in loaded or digest in self._prepared
            }
            digest, facts = self._made.get(identity.number, (identity.digest, None))
            if digest != identity.digest:
                raise PlanError(NUMBER_TAKEN)
            made = facts is None
            if facts is None:
                model, facts = self.maker.prepare(identity.number, self._plan(identity))
                self._made[identity.number] = identity.digest, facts
                self._keep_prepared(identity, model)
            held = self._snapshots.nbytes
            return {"ok": True, "key": identity.digest, "facts": asdict(facts), "made": made, "held": held}

        return answer(work)

    def replay(self, key: str, name: str, strategy: str) -> Reply:
        """Reply with the prompts and answers on which a merge shows what it keeps of a source.

        key:      key of the source's copy.
        name:     name of the source, for errors.
        strategy: of the merge.
        """

        def work() -> Reply:
            adapter = self._source(key, name)
            # vLLM adds an adapter's output head to the logits of sampled tokens, and not to those of prompts.
            if any(module.rpartition(".")[2] == OUTPUT_HEAD for module in adapter.modules):
                raise CalibrationError(
                    f"{name} has an output head, which vLLM leaves out when it rates a prompt; check it with "
                    "the command merged-lora check"
                )
            exchanges = [(e.prompt, e.answer) for e in exchanges_of(name, adapter, strategy)]
            return {"ok": True, "key": key, "exchanges": exchanges, "held": self._snapshots.nbytes}

        return answer(work)

    # In a step of the engine

    def load_merge(self, path: str) -> Model:
        """The merge with this path, for a slot: as it was prepared, or made again from the snapshots."""
        identity = MergeIdentity.from_path(path)
        self._made.setdefault(identity.number, (identity.digest, None))
        prepared = self._prepared.pop(identity.digest, None)
        model = prepared.model if prepared else self.maker.remake(identity.number, self._plan(identity))
        if self.maker.light:
            self._keep_prepared(identity, model)
        return model

    def load_plain(self, path: str, number: int) -> Model | None:
        """The adapter captured from this path to be served, from memory; None if there is none."""
        plain = self._plain.get(path)
        if plain is None:
            return None
        copy = self._snapshots[plain.key]
        if isinstance(copy, Adapter):
            return self._adapters.build(number, copy, plain.scalings or {})
        return self._adapters.copy(copy, number)

    def _load(self, path: str) -> Adapter:
        folder = self._adapters.find(path)
        try:  # the size, before anything is read
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
        self._snapshots.check_size(size)
        return Adapter.load(folder)

    def _keep_copies(self, owner: str, needed: Collection[str]) -> None:
        dropped = self._snapshots.keep(owner, needed)
        if dropped:
            self._plain = {path: plain for path, plain in self._plain.items() if plain.key not in dropped}
            for digest in [d for d, p in self._prepared.items() if not dropped.isdisjoint(p.contents)]:
                del self._prepared[digest]

    def _keep_prepared(self, identity: MergeIdentity, model: Model) -> None:
        limit = LIGHT_MERGES if self.maker.light else PREPARED_AHEAD
        self._prepared.add(identity.digest, _Prepared(model, identity.contents), limit)

    def _plan(self, identity: MergeIdentity) -> MergePlan:
        contents = zip(identity.spec.names, identity.contents, strict=True)
        sources = {name: self._source(key, name) for name, key in contents}
        return plan(identity.spec, sources, self._max_rank)

    def _source(self, key: str, name: str) -> Adapter:
        copy = self._snapshots.get(key)
        if not isinstance(copy, Adapter):
            raise UnknownAdapterError(f"no snapshot of {name!r} in this worker; register it again")
        return copy
