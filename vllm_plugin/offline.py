"""Merges in offline inference: ``LLM(..., additional_config={"merged_lora": {"enable": True}})``."""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from vllm.lora.request import LoRARequest

from merged_lora.fetching.opening import local_folder
from merged_lora.lru import Lru
from merged_lora.planning import check_names
from merged_lora.spec import MergeSpec, check_own_name, parse
from merged_lora.vllm_plugin.api_server.fetched import is_location
from merged_lora.vllm_plugin.api_server.workers import pause
from merged_lora.vllm_plugin.hooks.api_server import lora_request

from .identity import MergeIdentity
from .merge_log import log_merge
from .rpc import CANCEL, CAPTURE, POLL, PREPARE, Facts, Pending, Reply, agreed, agreed_under, raise_failure
from .settings import GIB, Settings

logger = logging.getLogger("vllm.merged_lora")

OWNER = "offline"
"""What the workers know this process as."""
PATIENCE = 2.0
"""Seconds for which an engine may take to cancel work."""

_kept: weakref.WeakKeyDictionary[Any, Lru[str, int]] = weakref.WeakKeyDictionary()
"""For each LLM the merges that its workers keep, with their bytes."""


def merged_lora_request(llm: Any, spec: str | MergeSpec, adapters: Mapping[str, str]) -> LoRARequest:
    """The ``LoRARequest`` of a merge, ready to pass to ``llm.generate(..., lora_request=...)``.

    llm:      a ``vllm.LLM`` made with ``additional_config={"merged_lora": {"enable": True}}``.
    spec:     such as ``ties(0.7*sql, 0.3*chat, density=0.5)``.
    adapters: a folder, a name on the hub, or a location such as ``s3://bucket/folder`` for every source of
              the spec.

    Every worker makes the merge before this returns, from copies of the adapters that stay in memory.  The
    merges asked for last stay ready, within ``"ready_gib"``; the use of an older one makes it again, and the
    other requests of its batch wait for that.  Raises MergeError if the merge cannot be made.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    for name in adapters:
        check_own_name(name)
    check_names(spec, adapters)
    contents, largest = [], 0
    for name in spec.names:
        place = str(adapters[name])
        with local_folder(place) if is_location(place) else nullcontext(place) as folder:
            reply = _finished(llm, CAPTURE, OWNER, None, str(folder), None)
        contents.append(reply["key"])
        largest = reply["largest"]
    identity = MergeIdentity(spec, tuple(contents))
    kept = _kept.setdefault(llm, Lru())
    if kept.use(identity.digest) is None:
        limit = Settings.of(llm.llm_engine.vllm_config.additional_config).ready_gib * GIB - largest
        while kept and sum(kept.values()) > limit:
            kept.popitem(last=False)
    reply = _finished(llm, PREPARE, OWNER, list(kept), identity.path)
    facts = Facts(**reply["facts"])
    kept.add(identity.digest, facts.nbytes, len(kept) + 1)
    if reply["made"]:
        log_merge(identity, facts)
    return lora_request(identity)


def _finished(llm: Any, method: str, *arguments: Any) -> Reply:
    """The workers' reply when their work is done; raises MergeError."""
    ticket, start = uuid.uuid4().hex, time.monotonic()
    try:
        reply = agreed(llm.collective_rpc(method, args=(ticket, *arguments)))
        while "pending" in reply:
            time.sleep(pause(time.monotonic() - start, Pending(**reply["pending"])))
            reply = agreed_under(ticket, llm.collective_rpc(POLL, args=([ticket],)))
        raise_failure(reply)
    except BaseException:  # such as an interrupt by the user: nothing goes on beside the steps
        _give_up(llm, ticket)
        raise
    return reply


def _give_up(llm: Any, ticket: str) -> None:
    """Cancel work.  An interrupt may have ended the engine as well, and then the call would never end."""

    def cancel() -> None:
        try:
            llm.collective_rpc(CANCEL, args=([ticket],))
        except Exception as error:
            logger.warning("work that nobody waits for goes on: %s", error)

    call = threading.Thread(target=cancel, daemon=True)
    call.start()
    call.join(PATIENCE)
