"""Renders the tables of ``docs/adapters.md`` from the kinds, the rows and what was recorded of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from formats.kinds import KINDS, NOT_CHECKED, ODD_KINDS, Kind
from formats.table import ROWS

RECORDED = Path(__file__).with_name("recorded.json")
HEADER = "| kind | merged-lora | PEFT {PEFT} | vLLM {vLLM} | LoRAX | mergekit |\n|---|---|---|---|---|---|\n"


def kinds_as_markdown() -> str:
    """The table of kinds: what becomes of each, and what others do with it."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines = [HEADER.format(**recorded["releases"])]
    for name, kind in KINDS.items():
        facts = [recorded["rows"][row] for row in ROWS if ROWS[row].kind == name]
        by_others = _in_peft(kind, facts), _in_vllm(kind, facts), _in_mergekit(kind, facts)
        lines.append(_line(kind, *by_others))
    for name, kind in ODD_KINDS.items():
        facts = [recorded["odd"][name]]
        lines.append(_line(kind, _in_peft(kind, facts), _in_vllm(kind, facts), kind.mergekit))
    return "".join(lines)


def architectures_as_markdown() -> str:
    """The architectures, and how many adapters of each are built and merged by the tests."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines = ["| architecture | adapters | of them merged | vLLM has LoRA for it |\n|---|---:|---:|---|\n"]
    for architecture in dict.fromkeys(row.architecture for row in ROWS.values()):
        names = [name for name, row in ROWS.items() if row.architecture == architecture]
        merged = sum(ROWS[name].of.outcome != "refused" for name in names)
        served = any(recorded["rows"][name]["vLLM"] != "has no LoRA for this architecture" for name in names)
        lines.append(f"| {architecture} | {len(names)} | {merged} | {'yes' if served else 'no'} |\n")
    return "".join(lines)


def _line(kind: Kind, peft: str, vllm: str, mergekit: str) -> str:
    return (
        f"| {kind.title} | **{kind.outcome}**. {kind.why} | {peft} | {vllm} | {kind.lorax} | {mergekit} |\n"
    )


def _in_peft(kind: Kind, facts: Iterable[Mapping[str, Any]]) -> str:
    if kind.peft:
        return kind.peft

    def reads(fact: str) -> str:
        return "reads it" if fact == "the same deltas" else _failed(fact)

    def adds(fact: str) -> str:
        if fact == "half the sum":
            return "adds up"
        if fact.startswith("half the sum"):
            return "adds up the factors alone"
        return "adds up to other deltas" if fact == "other deltas" else "does not add up"

    found = [fact["PEFT"] for fact in facts]
    read = _phrases(reads, (fact["reads"] for fact in found))
    if not read.startswith("reads") or "adds" not in found[0]:
        return read
    added = (fact["adds"] for fact in found if fact["reads"] == "the same deltas")
    return f"{read}; {_phrases(adds, added)}"


def _in_vllm(kind: Kind, facts: Iterable[Mapping[str, Any]]) -> str:
    if kind.vllm:
        return kind.vllm

    def words(fact: str) -> str:
        if fact == "the same deltas":
            return "reads it as plain LoRA" if kind.outcome == "refused" else "reads it"
        if fact == "other deltas":
            return "reads other deltas"
        return "reads it and the head" if fact.startswith("the same deltas") else _failed(fact)

    found = [fact["vLLM"] for fact in facts if fact["vLLM"] != "has no LoRA for this architecture"]
    return _phrases(words, found) if found else "has no LoRA for these"


def _in_mergekit(kind: Kind, facts: Iterable[Mapping[str, Any]]) -> str:
    if kind.mergekit != NOT_CHECKED:
        return kind.mergekit

    def words(fact: str) -> str:
        return "has PEFT merge it into the base" if fact == "is merged" else _failed(fact)

    return _phrases(words, (fact["PEFT"]["into the base"] for fact in facts))


def _failed(fact: str) -> str:
    return NOT_CHECKED if fact.startswith(NOT_CHECKED) else "refuses"


def _phrases(words: Callable[[str], str], facts: Iterable[str]) -> str:
    return ", or ".join(dict.fromkeys(map(words, facts))) or NOT_CHECKED
