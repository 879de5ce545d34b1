"""The protocol between API servers and workers: the methods of a worker, and what they reply.

A method of a worker never raises, on any rank, because vLLM does not survive a failed RPC at tensor parallel
sizes above 1: it replies with the error and its kind, and the API server raises it again.  Nor does it wait,
because the engine's steps would wait with it: work that takes long is begun under a ticket, goes on beside
the steps, and is asked for until it is done.  Knows nothing of vLLM, and nothing of how a merge is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from merged_lora.errors import CalibrationError, MergeError, UnknownAdapterError

logger = logging.getLogger("vllm.merged_lora")

CAPTURE, RELEASE, PREPARE = "merged_lora_capture", "merged_lora_release", "merged_lora_prepare"
REPLAY, POLL, CANCEL = "merged_lora_replay", "merged_lora_poll", "merged_lora_cancel"
"""Names under which vLLM's ``collective_rpc`` finds the methods on a worker."""


class Reply(TypedDict, total=False):
    """The reply of a worker: ``ok`` and results, or not ``ok`` and an error.

    ok:      whether the method succeeded; true as long as nothing has failed.
    work:    the replies about work by ticket, if several were asked for; no other field is set.
    pending: the fields of :class:`Pending`, as long as the work goes on; then no other field is set.
    key:     key of the adapter's copy, or digest of the merge.
    refusal: why an adapter that is served cannot be merged; empty if it can.
    nbytes:  bytes of that copy.
    held:    bytes of all copies in this worker.
    facts:   the fields of :class:`Facts`.
    made:    whether the merge was made for this ticket.
    largest: bytes of the largest merge that the model allows, as :class:`Facts` counts them.
    exchanges: prompts and answers to replay, as token ids.
    error:   message of the error.
    kind:    ``user``, ``unknown`` (adapter), ``calibration``, ``full`` (cache) or ``internal``.
    missing: bytes that have to be freed first, if the cache is full.
    """

    ok: bool
    work: dict[str, Any]
    pending: dict[str, Any]
    key: str
    refusal: str
    nbytes: int
    held: int
    facts: dict[str, Any]
    made: bool
    largest: int
    exchanges: list[tuple[tuple[int, ...], tuple[int, ...]]]
    error: str
    kind: str
    missing: int


@dataclass(frozen=True)
class Pending:
    """What a worker reports of work that goes on.

    running:   whether it has begun.
    done:      number of finished steps, which are modules.
    total:     number of steps; 0 until they are known.
    spent:     seconds that it took so far, without those in which it was interrupted.
    announced: seconds that it is expected to take; None until that is known.
    """

    running: bool
    done: int
    total: int
    spent: float
    announced: float | None

    @property
    def left(self) -> float:
        """Seconds that it is expected to take from now on."""
        return max(0.0, (self.announced or 0.0) - self.spent)


@dataclass(frozen=True)
class Facts:
    """What a worker reports of a merge that it made.

    backend:        name of the backend.
    rank:           largest rank of a module.
    modules:        number of modules.
    kept_energy:    share of the squared norm kept in modules whose rank was cut; 1 if none was.
    kept_by_module: the same for each module whose rank was cut.
    seconds:        time to make the merge in this worker, without interruptions.
    announced:      seconds that it was expected to take.
    nbytes:         bytes of host memory that it takes in this worker as long as it is ready.
    """

    backend: str
    rank: int
    modules: int
    kept_energy: float
    kept_by_module: dict[str, float]
    seconds: float
    announced: float
    nbytes: int


class CacheFullError(MergeError):
    """The copies in use leave no room for one more; ``missing`` bytes have to be freed first."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


def answer(method: Callable[[], Reply]) -> Reply:
    """The reply of a method, or a reply with the error that it raised.  A fault of ours is logged."""
    try:
        return method()
    except UnknownAdapterError as error:
        return {"ok": False, "kind": "unknown", "error": str(error)}
    except CacheFullError as error:
        return {"ok": False, "kind": "full", "error": str(error), "missing": error.missing}
    except CalibrationError as error:
        return {"ok": False, "kind": "calibration", "error": str(error)}
    except MergeError as error:
        return {"ok": False, "kind": "user", "error": str(error)}
    except Exception as error:
        logger.exception("merging failed")
        return {"ok": False, "kind": "internal", "error": f"{type(error).__name__}: {error}"}


def agreed(replies: Sequence[Reply]) -> Reply:
    """One reply for all ranks: the first failure, or the results they agree on with their bytes added up.

    As long as work goes on in any of them, the reply is that of the one that has the longest way to go.  The
    facts of a merge are those of the rank that took longest, for which the request waited, with the bytes of
    the rank where it takes most.
    """
    for reply in replies:
        if not reply["ok"]:
            return reply
    pending = [reply for reply in replies if "pending" in reply]
    if pending:
        return max(pending, key=lambda reply: Pending(**reply["pending"]).left)
    if len({reply["key"] for reply in replies}) != 1:
        return {
            "ok": False,
            "kind": "internal",
            "error": "the workers read different content for one adapter",
        }
    made = any(reply.get("made", False) for reply in replies)
    reply = {**replies[0], "held": sum(reply["held"] for reply in replies), "made": made}
    facts = [each["facts"] for each in replies if "facts" in each]
    if facts:
        slowest = max(facts, key=lambda each: each["seconds"])
        reply["facts"] = {**slowest, "nbytes": max(each["nbytes"] for each in facts)}
    return reply


def agreed_under(ticket: str, replies: Sequence[Reply]) -> Reply:
    """One reply for all ranks about the work under a ticket, from their replies to ``POLL``."""
    return agreed([reply["work"][ticket] if reply["ok"] else reply for reply in replies])


def raise_failure(reply: Reply) -> None:
    """Raise the error in a reply: a MergeError for a user's mistake, a RuntimeError for a fault of ours."""
    if not reply["ok"]:
        if reply["kind"] == "full":
            raise CacheFullError(reply["error"], reply["missing"])
        kinds: dict[str, type[Exception]] = {
            "unknown": UnknownAdapterError,
            "calibration": CalibrationError,
            "user": MergeError,
        }
        raise kinds.get(reply["kind"], RuntimeError)(reply["error"])
