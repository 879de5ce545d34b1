"""In each worker: snapshots of the sources in memory, and merges made from them for vLLM's own slots.

Two calls come in by RPC, ``capture`` and ``prepare``; neither ever raises, on any rank, because vLLM does not
survive a failed RPC at tensor parallel sizes above 1.  What the step path needs later is then certain to
succeed: it reads no disk, and the merge it may have to repeat has succeeded before.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypedDict, TypeVar

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import load_backend
from merged_lora.engine import merge, plan, run
from merged_lora.errors import MergeError, PlanError, UnknownAdapterError
from merged_lora.factors import Factors

from .identity import NUMBER_TAKEN, MergeIdentity

logger = logging.getLogger("vllm.merged_lora")

Model = TypeVar("Model")

PREPARED_AHEAD = 4  # merges kept for a slot that vLLM has not asked for yet; an older one is made again


class Reply(TypedDict, total=False):
    """What an RPC answers: ``ok`` with results, or not ``ok`` with an error and its kind."""

    ok: bool
    digest: str
    error: str
    kind: str  # "user", "unknown" (adapter) or "internal"


class MergeWorker(Generic[Model]):
    """The sources that may be merged, by content digest, and merges waiting for their slot.

    max_rank: the engine's ``--max-lora-rank``.  resolve: turns an adapter's path or hub name into a folder.
    build: makes of an id and an adapter what vLLM holds; it raises where vLLM would refuse the adapter.
    """

    def __init__(
        self, max_rank: int, resolve: Callable[[str], str], build: Callable[[int, Adapter], Model]
    ) -> None:
        self._max_rank = max_rank
        self._resolve = resolve
        self._build = build
        self._snapshots: dict[str, Adapter] = {}
        self._prepared: OrderedDict[str, Model] = OrderedDict()
        self._holders: dict[int, str] = {}
        _warm_up()

    def capture(self, path: str) -> Reply:
        """Read the adapter at ``path`` into memory; answers its content digest."""

        def work() -> Reply:
            adapter = Adapter.load(self._resolve(path))
            self._snapshots.setdefault(adapter.digest, adapter)
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
            self._prepared[identity.digest] = self._merge(identity)
            while len(self._prepared) > PREPARED_AHEAD:
                self._prepared.popitem(last=False)
            return {"ok": True, "digest": identity.digest}

        return _never_raising(work)

    def take(self, path: str) -> Model:
        """The merge that ``path`` names, for a slot: the prepared one, or made again from the snapshots."""
        identity = MergeIdentity.from_path(path)
        self._holders[identity.number] = identity.digest
        model = self._prepared.pop(identity.digest, None)
        return self._merge(identity) if model is None else model

    def _merge(self, identity: MergeIdentity) -> Model:
        missing = [
            name
            for name, content in zip(identity.spec.names, identity.contents, strict=True)
            if content not in self._snapshots
        ]
        if missing:
            raise UnknownAdapterError(f"no snapshot of {missing[0]!r} in this worker; register it again")
        sources = {
            name: self._snapshots[content]
            for name, content in zip(identity.spec.names, identity.contents, strict=True)
        }
        start = time.perf_counter()
        merged = run(plan(identity.spec, sources, self._max_rank))
        logger.info(
            "merged spec=%r digest=%s backend=%s rank=%d modules=%d kept_energy=%s ms=%.1f",
            str(identity.spec),
            identity.digest,
            merged.metadata["merged_lora.backend"],
            merged.rank,
            len(merged.modules),
            merged.metadata.get("merged_lora.kept_energy", "1"),
            (time.perf_counter() - start) * 1e3,
        )
        return self._build(identity.number, merged)


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


def _warm_up() -> None:
    """Let the backend compile what it compiles, so that no request waits for it."""
    start = time.perf_counter()
    tiny = {
        name: Adapter(
            {"x": Factors(torch.ones(2, 2), torch.ones(2, 2)), "y": _tiny_half(), "z": _tiny_half()}
        )
        for name in ("a", "b")
    }
    for spec in ("ties(a, b)", "dare_linear(a, b)"):
        merge(spec, tiny)
    logger.info("merge backend %s ready after %.1f s", load_backend("auto").name, time.perf_counter() - start)


def _tiny_half() -> Factors:
    return Factors(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bfloat16))


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
