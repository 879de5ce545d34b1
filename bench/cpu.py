"""Merges on CPU cores beside PEFT's: four layers of Llama-3-8B, rank 16."""

import json
import statistics
from collections.abc import Mapping
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
from .agreement import count_agreed, disagreements, unseen
from .timing import interleaved, once, ratio, shown

LAYERS, RANK, DENSITY, ROUNDS = 4, 16, 0.5, 9
COUNTS = (2, 4, 8)
AIMS = {"linear": None, "ties": 40, "dare_ties": 20, "svd": 1000}
SVD_MODULES = ("self_attn.k_proj", "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
"""One module of every distinct shape, the smallest first: its time tells how long the others will take."""


def run(quick: bool, file: Path | None) -> int:
    """Check, measure and print; the exit code.

    quick: without PEFT's large SVDs.  file: gets every measured time as JSON.
    """
    backend = load_backend("cpu")
    print("agreement, on small tensors")
    checks = count_agreed(disagreements(backend))
    if checks is None:
        return 1
    facts = machine.facts()
    machine.show(facts)
    rows = _factor_rows(backend)
    if not quick:
        rows += _svd_rows(backend)
    if file is not None:
        report = {"date": date.today().isoformat(), "machine": facts, "checks": checks, "rows": rows}
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten: {file}")
    return 0


def _factor_rows(backend: Backend) -> list[dict[str, object]]:
    shapes = cases.llama3_8b(LAYERS)
    sources = cases.random_sources(shapes, max(COUNTS), RANK, torch.bfloat16)
    print(
        f"\n{LAYERS} layers of Llama-3-8B ({len(shapes)} modules), rank {RANK}, bfloat16, density {DENSITY}"
    )
    print(f"milliseconds, median of {ROUNDS} (fastest-slowest), ours and PEFT's in turn; about two minutes")
    print(f"  {'strategy':10} {'N':>2}  {'ours':22} {'PEFT':26} {'ratio':>6} {'aim':>5} {'GB/s':>5}  plan")
    rows: list[dict[str, object]] = []
    for strategy, count in ((s, n) for s in ("linear", "ties", "dare_ties") for n in COUNTS):
        options = "" if strategy == "linear" else f", density={DENSITY}"
        plan = make_plan(parse(f"{strategy}({', '.join(cases.names(count))}{options})"), sources)
        planned = [once(partial(make_plan, plan.spec, sources)) for _ in range(ROUNDS)]
        seconds = interleaved(
            {
                "ours": partial(backend.merge, plan, unseen),
                "peft": partial(_peft_factors, plan, sources, None if strategy == "linear" else DENSITY),
            },
            ROUNDS,
        )
        ours, theirs, times = seconds["ours"], seconds["peft"], ratio(seconds["peft"], seconds["ours"])
        moved = _bytes(plan, sources)
        print(
            f"  {strategy:10} {count:>2}  {shown(ours):22} {shown(theirs):26} {times:>6.1f} "
            f"{AIMS[strategy] or '':>5} {moved / statistics.median(ours) / 1e9:>5.1f}  {shown(planned)}",
            flush=True,
        )
        rows.append(
            {
                "case": f"{strategy}, N = {count}, {LAYERS} layers",
                "spec": str(plan.spec),
                "bytes_moved": moved,
                "ours_s": ours,
                "peft_s": theirs,
                "plan_s": planned,
                "ratio": times,
            }
        )
    return rows


def _svd_rows(backend: Backend) -> list[dict[str, object]]:
    """Truncated sums: ours over all layers, then both on one module of each shape; float32, as torch has no
    SVD of bfloat16."""
    sources = cases.random_sources(cases.llama3_8b(LAYERS), 2, RANK, torch.float32)
    plan = make_plan(parse(f"svd(a, b, rank={RANK})"), sources)
    whole = interleaved({"ours": partial(backend.merge, plan, unseen)}, ROUNDS)["ours"]
    print(f"\nsvd, N = 2, rank {RANK}, float32; milliseconds")
    print(f"  ours, all {len(plan.modules)} modules of {LAYERS} layers: {shown(whole)}")
    print("  one module of each shape, PEFT once, ours as above")
    print(f"  {'module':18} {'shape':14} {'ours':22} {'PEFT':>10} {'ratio':>7} {'aim':>5}")
    rows: list[dict[str, object]] = [
        {"case": f"svd, N = 2, {LAYERS} layers, ours alone", "spec": str(plan.spec), "ours_s": whole}
    ]
    pace = None
    for name in SVD_MODULES:
        shape = cases.LLAMA3_8B_LAYER[name]
        if pace is not None:
            print(f"  {name:18} PEFT's SVD should take {pace * peers.svd_work(shape):.0f} s", flush=True)
        only = {key: Adapter({name: a.modules[f"model.layers.0.{name}"]}) for key, a in sources.items()}
        one = make_plan(plan.spec, only)
        ours = interleaved({"ours": partial(backend.merge, one, unseen)}, ROUNDS)["ours"]
        pair = {key: adapter.modules[name] for key, adapter in only.items()}
        theirs = [once(partial(peers.merge_svd, pair, [1.0, 1.0], RANK))]
        pace = theirs[0] / peers.svd_work(shape)
        times = ratio(theirs, ours)
        print(
            f"  {name:18} {'x'.join(map(str, shape)):14} {shown(ours):22} {shown(theirs):>10} {times:>7.0f} "
            f"{AIMS['svd']:>5}",
            flush=True,
        )
        rows.append(
            {
                "case": f"svd, N = 2, {name} alone",
                "shape": shape,
                "ours_s": ours,
                "peft_s": theirs,
                "ratio": times,
            }
        )
    return rows


def _peft_factors(plan: MergePlan, sources: Mapping[str, Adapter], density: float | None) -> None:
    for module in plan.modules:
        layer = {name: sources[name].modules[module] for name in plan.spec.names}
        peers.merge_factors(plan.spec.strategy, layer, plan.spec.weights(), density)


def _bytes(plan: MergePlan, sources: Mapping[str, Adapter]) -> int:
    """What must be read and written at least: every source once, the result once."""
    return sum(sources[name].nbytes for name in plan.spec.names) + plan.nbytes
