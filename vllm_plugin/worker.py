"""In each worker: snapshots of the sources in memory, and merges made from them for vLLM's own slots.

How a merge is made is a maker's business (``makers.py``).  Two calls come in by RPC, ``capture`` and
``prepare``; neither ever raises, on any rank, because vLLM does not survive a failed RPC at tensor parallel
sizes above 1.  What the step path needs later is then certain to succeed: it reads no disk, and the merge it
may have to repeat has succeeded before.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypedDict, TypeVar

from merged_lora.adapters import Adapter
from merged_lora.engine import plan
from merged_lora.errors import MergeError, PlanError, UnknownAdapterError
from merged_lora.plan import MergePlan

from .identity import NUMBER_TAKEN, MergeIdentity
from .makers import Maker

logger = logging.getLogger("vllm.merged_lora")

Model = TypeVar("Model")

PREPARED_AHEAD = 4  # merges kept for a slot that vLLM has not asked for yet; an older one is made again
LIGHT_MERGES = 64  # merges without values that are kept, taken or not: about 1 MB for 500 modules


class Reply(TypedDict, total=False):
    """What an RPC answers: ``ok`` with results, or not ``ok`` with an error and its kind."""

    ok: bool
    digest: str
    error: str
    kind: str  # "user", "unknown" (adapter) or "internal"


class MergeWorker(Generic[Model]):
    """The sources that may be merged, by content digest, and merges waiting for their slot.

    max_rank: the engine's ``--max-lora-rank``.  resolve: turns an adapter's path or hub name into a folder.
    maker: makes of a plan what vLLM holds.
    """

    def __init__(self, max_rank: int, resolve: Callable[[str], str], maker: Maker[Model]) -> None:
        self._max_rank = max_rank
        self._resolve = resolve
        self._maker = maker
        self._snapshots: dict[str, Adapter] = {}
        self._prepared: OrderedDict[str, Model] = OrderedDict()
        self._holders: dict[int, str] = {}

    def capture(self, path: str) -> Reply:
        """Read the adapter at ``path`` into memory; answers its content digest."""

        def work() -> Reply:
            adapter = Adapter.load(self._resolve(path))
            if adapter.digest not in self._snapshots:
                self._snapshots[adapter.digest] = self._maker.adopt(adapter)
            return {"ok": True, "digest": adapter.digest}

        return _never_raising(work)

    def prepare(self, path: str, loaded: set[int]) -> Reply:
        """Make and check the merge that ``path`` names, so that loading it cannot fail.

        loaded: ids of the adapters that vLLM holds in this worker.
        """

        def work() -> Reply:
            identity = MergeIdentity.from_path(path)
            self._holders = {
                number: digest
                for number, digest in self._holders.items()
                if number in loaded or digest in self._prepared
            }
            holder = self._holders.setdefault(identity.number, identity.digest)
            if holder != identity.digest:
                raise PlanError(NUMBER_TAKEN)
            self._keep(identity, self._maker.prepare(identity.number, self._plan(identity)))
            return {"ok": True, "digest": identity.digest}

        return _never_raising(work)

    def take(self, path: str) -> Model:
        """The merge that ``path`` names, for a slot: the prepared one, or made again from the snapshots."""
        identity = MergeIdentity.from_path(path)
        self._holders[identity.number] = identity.digest
        model = self._prepared.pop(identity.digest, None)
        if model is None:
            model = self._maker.again(identity.number, self._plan(identity))
        if self._maker.light:
            self._keep(identity, model)
        return model

    def _keep(self, identity: MergeIdentity, model: Model) -> None:
        self._prepared.pop(identity.digest, None)
        self._prepared[identity.digest] = model
        while len(self._prepared) > (LIGHT_MERGES if self._maker.light else PREPARED_AHEAD):
            self._prepared.popitem(last=False)

    def _plan(self, identity: MergeIdentity) -> MergePlan:
        sources = dict(zip(identity.spec.names, identity.contents, strict=True))
        missing = [name for name, content in sources.items() if content not in self._snapshots]
        if missing:
            raise UnknownAdapterError(f"no snapshot of {missing[0]!r} in this worker; register it again")
        snapshots = {name: self._snapshots[content] for name, content in sources.items()}
        return plan(identity.spec, snapshots, self._max_rank)


def _never_raising(work: Callable[[], Reply]) -> Reply:
    try:
        return work()
    except UnknownAdapterError as error:
        return {"ok": False, "kind": "unknown", "error": str(error)}
    except MergeError as error:
        return {"ok": False, "kind": "user", "error": str(error)}
    except Exception as error:
        logger.exception("merging failed")
        return {"ok": False, "kind": "internal", "error": f"{type(error).__name__}: {error}"}


def agreed(replies: Sequence[Reply]) -> Reply:
    """The one answer of all ranks: the first failure, or what they agree on."""
    for reply in replies:
        if not reply["ok"]:
            return reply
    if len({reply["digest"] for reply in replies}) != 1:
        return {
            "ok": False,
            "kind": "internal",
            "error": "the workers read different content for one adapter",
        }
    return replies[0]


def raise_failure(reply: Reply) -> None:
    """Raise what a reply reports: a MergeError for a user's mistake, a RuntimeError for a fault of ours."""
    if not reply["ok"]:
        kinds: dict[str, type[Exception]] = {"unknown": UnknownAdapterError, "user": MergeError}
        raise kinds.get(reply["kind"], RuntimeError)(reply["error"])
