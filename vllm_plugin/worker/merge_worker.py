"""A worker's side of the protocol: snapshots of adapters, and merges made from them for vLLM's slots.

``makers.py`` makes a merge, and ``hooks/worker.py`` reads and holds adapters as vLLM does.  The methods for
RPC never raise and never wait; see ``rpc.py``.  Disks are read and merges are made in threads of their own,
which change nothing of this object: they get what they need when they begin, and what they return is
stored by the thread that calls the methods.  What an engine's step needs later is in memory as long as any
API server says that it needs it.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Progress
from merged_lora.errors import AdapterError, CalibrationError, PlanError, UnknownAdapterError
from merged_lora.files.parts import TOKEN_HEADS
from merged_lora.planning import make_plan
from merged_lora.replay import exchanges_of
from merged_lora.vllm_plugin.identity import NUMBER_TAKEN, MergeIdentity
from merged_lora.vllm_plugin.rpc import Facts, Pending, Reply, answer

from .background import Background, Job, OverdueError, Task
from .makers import Made, Maker, warm_up
from .pace import Pace, too_long
from .plain import PlainAdapters
from .silence import SILENT, Silence
from .snapshots import Snapshots

logger = logging.getLogger("vllm.merged_lora")

Model = TypeVar("Model")

KEPT = 300.0
"""Seconds for which the reply about finished work is kept after it was last given.  API servers ask several
times a second, between two steps, and no step takes as long."""
GIVEN_UP: Reply = {
    "ok": False,
    "kind": "internal",
    "error": f"the API server did not ask for this for {SILENT:.0f} s, and it was given up; ask again",
}
"""The reply about work that a worker gave up, to an API server that was not killed but only held up."""


@dataclass(frozen=True)
class _Plain:
    """A plain adapter that vLLM serves.

    key:      key of its copy.
    scalings: vLLM's factor for each module, if the copy is an :class:`Adapter`; None if it is vLLM's own.
    """

    key: str
    scalings: Mapping[str, float] | None


@dataclass(frozen=True)
class _Read(Generic[Model]):
    """What was read of an adapter, beside the steps.

    model:   as vLLM reads it; None for a source only.
    adapter: as a source; None if it is none.
    refusal: why it is none; empty if it is one.
    """

    model: Model | None
    adapter: Adapter | None
    refusal: str


@dataclass
class _Work:
    """Work beside the steps, and who waits for it.

    job:     the work.
    store:   stores what it gave and replies, or raises what it raised; called once.
    owners:  the API server of each ticket.
    """

    job: Job[Any]
    store: Callable[[], Reply]
    owners: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready(Generic[Model]):
    model: Model
    facts: Facts


class MergeWorker(Generic[Model]):
    """The adapters that are served or may be merged, and the merges that are ready.

    max_rank: the engine's ``--max-lora-rank``.
    limit:    bytes for copies of adapters.
    adapters: reads and holds plain adapters as vLLM does.
    maker:    makes what vLLM holds of a merge.
    largest:  bytes of the largest merge that the model allows; 0 until that is known.
    pace:     how long merges take here.
    seconds:  longest merge that is made, ``--merged-lora-max-seconds``.
    enter:    called first in the thread that merges.
    enter_reading: called first in the thread that reads adapters.
    """

    def __init__(
        self,
        max_rank: int,
        limit: int,
        adapters: PlainAdapters[Model],
        maker: Maker[Model],
        *,
        largest: int = 0,
        pace: Pace | None = None,
        seconds: float = math.inf,
        enter: Callable[[], None] = lambda: None,
        enter_reading: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_rank = max_rank
        self._adapters = adapters
        self.maker = maker
        self.largest = largest
        self.pace = pace or Pace()
        self._seconds = seconds
        self._snapshots: Snapshots[Adapter | Model] = Snapshots(limit)
        self._plain: dict[str, _Plain] = {}
        self._ready: dict[str, _Ready[Model]] = {}  # by digest
        self._needs: dict[str, set[str]] = {}  # digests of the merges that an API server needs
        self._numbers: dict[int, str] = {}  # digest of the merge with an id
        self._making: dict[str, _Work] = {}  # by digest
        self._work: dict[str, _Work] = {}  # by ticket
        self._replies: dict[str, tuple[float, Reply]] = {}  # by ticket, of work that is done, with the time
        self._silence = Silence()
        self._reader = Background("merged-lora-read", enter_reading)
        self._merger = Background("merged-lora-merge", enter)
        self._room: Job[None] | None = None  # makes memory ready for the next merge

    def make_ready(self, dtype: torch.dtype) -> None:
        """Compile what the usual merges need and measure how long merges take, before anything is served.

        dtype: dtype of vLLM's slots.
        """

        def work(_: Progress) -> None:
            warm_up(self.maker.backend, dtype)
            self.pace.measure(self.maker.backend)

        self._merger.submit(lambda: Task(0.0, 1, work)).result()

    def stop(self) -> None:
        """End the threads; what they do is given up."""
        self._reader.stop()
        self._merger.stop()

    # RPC: nothing of it waits

    def capture(
        self,
        ticket: str,
        owner: str,
        needed: Collection[str] | None,
        path: str,
        options: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Begin to copy an adapter into memory.

        ticket:  names this call in :meth:`poll` and :meth:`cancel`.
        owner:   the API server that asks.
        needed:  keys of the other copies that the owner needs; None for all that it ever captured.
        path:    folder of the adapter, or its name on the hub.
        options: how vLLM reads it, if vLLM is to serve it too; None for a source only.
        """

        def begin() -> Reply:
            if needed is not None:
                self._keep_copies(owner, needed)
            job = self._reader.submit(lambda: Task(0.0, 1, lambda _: self._read(path, options)))
            store = functools.partial(self._store_copy, job, owner, path)
            self._begin(ticket, owner, _Work(job, store))
            return self._reply(ticket)

        return answer(begin)

    def release(self, owner: str, needed: Collection[str]) -> Reply:
        """Drop the copies that nobody needs.

        owner:  the API server that asks.
        needed: keys of the copies that it needs.
        """

        def work() -> Reply:
            self._keep_copies(owner, needed)
            return {"ok": True, "key": "", "held": self._snapshots.nbytes}

        return answer(work)

    def prepare(
        self, ticket: str, owner: str, needed: Collection[str], path: str, loaded: Collection[int]
    ) -> Reply:
        """Begin to make and check a merge, so that loading it cannot fail.

        ticket: names this call in :meth:`poll` and :meth:`cancel`.
        owner:  the API server that asks.
        needed: digests of the other merges that it needs.
        path:   path of the merge.
        loaded: ids of the adapters that vLLM holds in this worker.
        """

        def begin() -> Reply:
            identity = MergeIdentity.from_path(path)
            digest, number = identity.digest, identity.number
            self._store_finished()
            ready = digest in self._ready
            self._keep_merges(owner, [*needed, digest] if ready else needed)
            used = {*self._ready, *self._making}
            self._numbers = {n: d for n, d in self._numbers.items() if n in loaded or d in used}
            if self._numbers.setdefault(number, digest) != digest:
                raise PlanError(NUMBER_TAKEN)
            if ready:
                reply = self._made(digest, made=False)
                self._keep_reply(ticket, reply)
                return reply
            work = self._making.get(digest)
            if work is None:
                sources = self._sources(identity)
                job = self._merger.submit(lambda: self._task(identity, sources))
                work = self._making[digest] = _Work(job, lambda: self._store_merge(identity))
            self._begin(ticket, owner, work)
            return self._reply(ticket)

        return answer(begin)

    def poll(self, tickets: Collection[str]) -> Reply:
        """How the work under each ticket is getting on, or its reply when it is done.

        Work that its API server does not ask for any more is given up; see :class:`Silence`.  What that one
        needed stays, because the engine may still have requests of it, and because it may only be held up.
        """

        def work() -> Reply:
            self._store_finished()
            silent = self._silence.heard(tickets, self._work)
            if silent:
                logger.warning("%d merges or copies given up: their API server asks no more", len(silent))
                self._give_up(silent)
            return {"ok": True, "work": {t: answer(functools.partial(self._reply, t)) for t in tickets}}

        return answer(work)

    def cancel(self, tickets: Collection[str]) -> Reply:
        """Give up tickets; work that nobody else waits for ends, or does not begin."""

        def work() -> Reply:
            self._give_up(tickets)
            return {"ok": True, "key": "", "held": self._snapshots.nbytes}

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
            if any(module.rpartition(".")[2] in TOKEN_HEADS for module in adapter.modules):
                raise CalibrationError(
                    f"{name} has an output head, which vLLM leaves out when it rates a prompt; check it with "
                    "the command merged-lora check"
                )
            exchanges = [(e.prompt, e.answer) for e in exchanges_of(name, adapter, strategy)]
            return {"ok": True, "key": key, "exchanges": exchanges, "held": self._snapshots.nbytes}

        return answer(work)

    # In a step of the engine

    def load_merge(self, path: str) -> Model:
        """The merge with this path, for a slot.

        A merge that no API server needs any more is made again, and the step waits for that: this can only
        happen to a request that outlived its API server's interest, such as one of offline inference.
        """
        identity = MergeIdentity.from_path(path)
        self._store_finished()
        ready = self._ready.get(identity.digest)
        if ready is not None:
            return self._adapters.share(ready.model)
        logger.warning("made again within a step: %s; nobody had asked for it to stay", identity.spec)
        planned = make_plan(identity.spec, self._sources(identity), self._max_rank)
        return self.maker.make(identity.number, planned).model

    def load_plain(self, path: str, number: int) -> Model | None:
        """The adapter captured from this path to be served, from memory; None if there is none."""
        plain = self._plain.get(path)
        if plain is None:
            return None
        copy = self._snapshots[plain.key]
        if isinstance(copy, Adapter):
            return self._adapters.build(number, copy, plain.scalings or {})
        return self._adapters.copy(copy, number)

    # Tickets

    def _begin(self, ticket: str, owner: str, work: _Work) -> None:
        work.owners[ticket] = owner
        self._work[ticket] = work

    def _give_up(self, tickets: Collection[str]) -> None:
        for ticket in tickets:
            self._replies.pop(ticket, None)
            given_up = self._work.pop(ticket, None)
            if given_up is not None:
                del given_up.owners[ticket]
                if not given_up.owners:
                    given_up.job.cancel()
                    self._making = {d: w for d, w in self._making.items() if w is not given_up}

    def _reply(self, ticket: str) -> Reply:
        """The reply under a ticket: that of finished work, or how the work is getting on."""
        if ticket in self._replies:
            _, reply = self._replies.pop(ticket)
            self._keep_reply(ticket, reply)
            return reply
        if ticket not in self._work:
            return GIVEN_UP
        job = self._work[ticket].job
        pending = Pending(job.running, job.done, job.total, job.spent, job.announced)
        return {"ok": True, "pending": asdict(pending)}

    def _keep_reply(self, ticket: str, reply: Reply) -> None:
        """Keep the reply about finished work: another rank may need longer, and then all are asked again."""
        now = time.monotonic()
        self._replies[ticket] = now, reply
        old = itertools.takewhile(lambda kept: now - kept[1][0] > KEPT, self._replies.items())
        for ticket, _ in list(old):
            del self._replies[ticket]

    def _store_finished(self) -> None:
        """Store what finished work gave, and keep the replies about it."""
        for work in {id(work): work for work in self._work.values() if work.job.finished}.values():
            reply = answer(work.store)
            for i, ticket in enumerate(work.owners):
                del self._work[ticket]
                own = reply if i == 0 or not reply.get("made") else {**reply, "made": False}
                self._keep_reply(ticket, own)
            self._making = {digest: other for digest, other in self._making.items() if other is not work}

    # Copies

    def _read(self, path: str, options: Mapping[str, Any] | None) -> _Read[Model]:
        """Read an adapter, in the thread that reads."""
        model = self._adapters.read(path, options) if options is not None else None
        try:
            adapter = self._adapters.fit(self._load(path))
            if model is not None:  # as the step path will
                self._adapters.build(1, adapter, self._adapters.scalings(model))
        except (AdapterError, PlanError) as error:
            if model is None:
                raise
            return _Read(model, None, str(error))
        if adapter.identity not in self._snapshots:
            self._snapshots.check_room(adapter.nbytes)
            adapter = self.maker.adopt(adapter)
        return _Read(model, adapter, "")

    def _load(self, path: str) -> Adapter:
        folder = self._adapters.find(path)
        try:  # the size, before anything is read
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
        self._snapshots.check_size(size)
        return Adapter.load(folder)

    def _store_copy(self, job: Job[_Read[Model]], owner: str, path: str) -> Reply:
        read = job.result()
        if read.adapter is None:
            assert read.model is not None
            key = "own-" + blake2b(path.encode(), digest_size=16).hexdigest()
            nbytes, scalings = self._adapters.size(read.model), None
            self._snapshots.add(owner, key, read.model, nbytes, replace=True)
        else:
            key, nbytes = read.adapter.identity, read.adapter.nbytes
            scalings = self._adapters.scalings(read.model) if read.model is not None else None
            self._snapshots.add(owner, key, read.adapter, nbytes)
        if read.model is not None:
            self._plain[path] = _Plain(key, scalings)
        return {
            "ok": True,
            "key": key,
            "refusal": read.refusal,
            "nbytes": nbytes,
            "held": self._snapshots.nbytes,
            "largest": self.largest,
        }

    def _keep_copies(self, owner: str, needed: Collection[str]) -> None:
        dropped = self._snapshots.keep(owner, needed)
        self._plain = {path: plain for path, plain in self._plain.items() if plain.key not in dropped}

    def _source(self, key: str, name: str) -> Adapter:
        copy = self._snapshots.get(key)
        if not isinstance(copy, Adapter):
            raise UnknownAdapterError(f"no snapshot of {name!r} in this worker; register it again")
        return copy

    def _sources(self, identity: MergeIdentity) -> dict[str, Adapter]:
        """The copies of the sources of a merge, by name."""
        names = zip(identity.spec.names, identity.contents, strict=True)
        return {name: self._source(key, name) for name, key in names}

    # Merges

    def _task(self, identity: MergeIdentity, sources: Mapping[str, Adapter]) -> Task[Made[Model]]:
        """The plan of a merge and its size, in the thread that merges."""
        spec = identity.spec
        # Weights that have to be found take time, and change no size.
        sized = make_plan(spec.without("weights") if spec.automatic else spec, sources, self._max_rank)
        sized = replace(sized, spec=spec)
        seconds = self.pace.seconds(sized)
        if seconds > self._seconds:
            refusal = too_long(sized, self._seconds, self.pace, self._max_rank)
            self.pace.doubt(sized)
            raise refusal

        def make(progress: Progress) -> Made[Model]:
            planned = sized
            if spec.automatic:
                planned = make_plan(spec, sources, self._max_rank, progress=progress)
            return self.maker.make(identity.number, planned, progress)

        took = functools.partial(self.pace.correct, sized)
        return Task(seconds, len(sized.modules), make, self._seconds, took)

    def _store_merge(self, identity: MergeIdentity) -> Reply:
        digest = identity.digest
        work = self._making[digest]
        try:
            made: Made[Model] = work.job.result()
        except OverdueError as error:
            raise PlanError(
                f"{identity.spec.strategy} of these sources was expected to take "
                f"{work.job.announced or 0.0:.2g} s, and was {error}; this server merges for at most "
                f"{self._seconds:g} s (--merged-lora-max-seconds)"
            ) from None
        announced = work.job.announced or 0.0
        facts = Facts(
            backend=self.maker.backend.name,
            rank=made.rank,
            modules=made.modules,
            kept_energy=made.result.kept_energy(),
            kept_by_module=made.result.kept_by_module(),
            seconds=work.job.spent,
            announced=announced,
            nbytes=made.nbytes,
        )
        self._ready[digest] = _Ready(made.model, facts)
        if self._room is None or self._room.finished:
            self._room = self._merger.submit(lambda: Task(0.0, 1, self._make_room, idle=True))
        for owner in work.owners.values():
            self._needs.setdefault(owner, set()).add(digest)
        return self._made(digest, made=True)

    def _make_room(self, progress: Progress) -> None:
        """Make memory ready for the next merge, in the thread that merges."""
        try:
            self.maker.backend.make_room(progress)
        except OSError as error:
            logger.warning("there is no memory for the next merge: %s", error)

    def _made(self, digest: str, made: bool) -> Reply:
        facts = asdict(self._ready[digest].facts)
        return {"ok": True, "key": digest, "facts": facts, "made": made, "held": self._snapshots.nbytes}

    def _keep_merges(self, owner: str, needed: Collection[str]) -> None:
        """Drop the merges that no API server needs, given that this one needs only these."""
        self._needs[owner] = set(needed)
        kept = set().union(*self._needs.values())
        self._ready = {digest: ready for digest, ready in self._ready.items() if digest in kept}
