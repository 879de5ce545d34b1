"""Merges in delta and core space on CPU cores: one layer of Llama-3-8B, rank 16, four sources."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Collection
from datetime import date
from functools import partial
from pathlib import Path

import torch

from merged_lora.adapters import Adapter
from merged_lora.backends import Backend, load_backend
from merged_lora.plan import MergePlan
from merged_lora.planning import make_plan
from merged_lora.spec import parse

from . import cases, machine, peers
from .agreement import count_agreed, entry_disagreements, unseen
from .timing import Aim, interleaved, once, ratio, shown

COUNT, RANK, ROUNDS = 4, 16, 9
CORE = {"core_linear": None, "core_ties": 0.06, "core_dare_ties": None, "knots": 0.15}
"""Strategies and the seconds a layer should take at most."""
DELTA = {"ties_svd": 15.0, "dare_ties_svd": None, "magnitude_prune_svd": None}
DELTA_ROUNDS = 3
MEMORY = 200e6  # bytes that a merge of a layer may take beside its inputs
PEER_MODULE = "self_attn.k_proj"
FASTER = 20.0
Row = dict[str, object]


def run(spaces: Collection[str], file: Path | None) -> int:
    """Check, measure and print; the exit code.  spaces: of ``delta`` and ``core``."""
    backend = load_backend("cpu")
    print("agreement with the dense reference, on small tensors")
    if count_agreed(entry_disagreements(backend)) is None:
        return 1
    facts = machine.facts()
    machine.show(facts)
    rows: list[Row] = []
    aims: list[Aim] = []
    sources = cases.random_sources(cases.llama3_8b(1), COUNT, RANK, torch.bfloat16)
    print(f"\none layer of Llama-3-8B (7 modules), {COUNT} sources of rank {RANK}, bfloat16")
    print("milliseconds, median (fastest-slowest), and the most memory taken beside the inputs, MB")
    for space, table, rounds in (("core", CORE, ROUNDS), ("delta", DELTA, DELTA_ROUNDS)):
        if space in spaces:
            for strategy, aim in table.items():
                rows.append(_layer(backend, strategy, sources, rounds))
                if aim is not None:
                    aims.append(Aim(f"{strategy}, seconds a layer", _median(rows[-1]), aim, at_most=True))
                if space == "delta":
                    taken = rows[-1]["peak_bytes"]
                    assert isinstance(taken, int)
                    aims.append(
                        Aim(f"{strategy}, MB beside its inputs", taken / 1e6, MEMORY / 1e6, at_most=True)
                    )
    if "delta" in spaces:
        rows.append(_beside_peft(backend))
        times = rows[-1]["ratio"]
        assert isinstance(times, float)
        aims.append(Aim("ties_svd, times PEFT's speed on 1024 x 4096", times, FASTER, at_most=False))
    print("\naims")
    for one in aims:
        print(one.line())
    if file is not None:
        report = {"date": date.today().isoformat(), "machine": facts, "rows": rows}
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {file}")
    return 0


def _layer(backend: Backend, strategy: str, sources: dict[str, Adapter], rounds: int) -> Row:
    plan = make_plan(parse(f"{strategy}({', '.join(cases.names(COUNT))})"), sources)
    seconds = interleaved({"ours": partial(backend.merge, plan, unseen)}, rounds)["ours"]
    # In a process of its own: here, memory that an earlier merge has freed would hide what the next takes.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(_peak_memory, (strategy,))
    print(f"  {strategy:20} {shown(seconds):26} {peak / 1e6:>6.0f}", flush=True)
    return {"case": f"{strategy}, one layer", "spec": str(plan.spec), "ours_s": seconds, "peak_bytes": peak}


def _peak_memory(strategy: str) -> int:
    """The most bytes that merging a layer takes beside its inputs, everything compiled and loaded."""
    backend = load_backend("cpu")
    sources = cases.random_sources(cases.llama3_8b(1), COUNT, RANK, torch.bfloat16)
    text = f"{strategy}({', '.join(cases.names(COUNT))})"
    small = cases.random_sources(cases.SMALL, COUNT, RANK, torch.bfloat16)
    backend.merge(make_plan(parse(text), small), unseen)
    return machine.peak_memory(partial(backend.merge, make_plan(parse(text), sources), unseen))


def _beside_peft(backend: Backend) -> Row:
    """One module that PEFT merges in seconds, by both; float32, as torch has no SVD of bfloat16."""
    shape = cases.LLAMA3_8B_LAYER[PEER_MODULE]
    sources = cases.random_sources({PEER_MODULE: shape}, COUNT, RANK, torch.float32)
    plan: MergePlan = make_plan(parse(f"ties_svd({', '.join(cases.names(COUNT))}, rank={RANK})"), sources)
    layer = {name: adapter.modules[PEER_MODULE] for name, adapter in sources.items()}
    weights = [1.0] * COUNT
    ours: list[float] = []
    theirs: list[float] = []
    backend.merge(plan, unseen)
    for _ in range(DELTA_ROUNDS):
        ours.append(once(partial(backend.merge, plan, unseen)))
        theirs.append(once(partial(peers.merge_svd, layer, weights, RANK, "ties_svd", 0.5)))
    times = ratio(theirs, ours)
    print(f"\nties_svd of {PEER_MODULE} alone, {'x'.join(map(str, shape))}, float32; milliseconds")
    print(f"  ours {shown(ours)}, PEFT {shown(theirs)}: {times:.1f} times", flush=True)
    return {"case": f"ties_svd, {PEER_MODULE} alone", "ours_s": ours, "peft_s": theirs, "ratio": times}


def _median(row: Row) -> float:
    seconds = row["ours_s"]
    assert isinstance(seconds, list)
    return float(statistics.median(seconds))
