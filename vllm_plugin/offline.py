"""Merges in offline inference: ``LLM(..., additional_config={"merged_lora": {"enable": True}})``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.lora.request import LoRARequest

from merged_lora.planning import check_names
from merged_lora.spec import MergeSpec, parse
from merged_lora.vllm_plugin.hooks.api_server import lora_request

from .identity import MergeIdentity
from .merge_log import log_merge
from .rpc import CAPTURE, PREPARE, Facts, agreed, raise_failure


def merged_lora_request(llm: Any, spec: str | MergeSpec, adapters: Mapping[str, str]) -> LoRARequest:
    """The ``LoRARequest`` of a merge, ready to pass to ``llm.generate(..., lora_request=...)``.

    llm:      a ``vllm.LLM`` made with ``additional_config={"merged_lora": {"enable": True}}``.
    spec:     such as ``ties(0.7*sql, 0.3*chat, density=0.5)``.
    adapters: a folder, or a name on the hub, for every source of the spec.

    Every worker makes the merge before this returns, from copies of the adapters that stay in memory.
    Raises MergeError if it cannot be made.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    check_names(spec, adapters)
    contents = []
    for name in spec.names:
        reply = agreed(llm.collective_rpc(CAPTURE, args=("offline", None, str(adapters[name]), None)))
        raise_failure(reply)
        contents.append(reply["key"])
    identity = MergeIdentity(spec, tuple(contents))
    reply = agreed(llm.collective_rpc(PREPARE, args=(identity.path,)))
    raise_failure(reply)
    if reply["made"]:
        log_merge(identity, Facts(**reply["facts"]))
    return lora_request(identity)
