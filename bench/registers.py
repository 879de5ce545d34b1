"""Every kernel compiled ahead of time, without a GPU: its registers, its spills, the width of its loads."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from merged_lora.triton_kernels import combine, trim
from merged_lora.triton_kernels.words import BF16, FP16, FP32, MIXED

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KINDS = {BF16.value: "bf16", FP16.value: "fp16", FP32.value: "fp32", MIXED.value: "mixed"}
RULES = {
    "copy": (combine.KEEP_ALL, combine.COPY),
    "linear": (combine.KEEP_ALL, combine.SUM),
    "magnitude_prune": (combine.KEEP_LARGEST, combine.SUM),
    "ties": (combine.KEEP_LARGEST, combine.VOTE_TOTAL),
    "ties, frequency": (combine.KEEP_LARGEST, combine.VOTE_FREQUENCY),
    "dare_linear": (combine.KEEP_RANDOM, combine.SUM),
    "dare_ties": (combine.KEEP_RANDOM, combine.VOTE_TOTAL),
    "dare_ties, frequency": (combine.KEEP_RANDOM, combine.VOTE_FREQUENCY),
}


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time constants.  wide: whether its loads must be 16 bytes."""

    name: str
    kernel: Any
    constants: Mapping[str, object]
    warps: int
    wide: bool


@dataclass(frozen=True)
class Compiled:
    """What became of a case on a target; registers and spilled bytes only where ptxas tells them.

    loads, stores: how many global accesses of 16 bytes the code holds.
    """

    case: str
    target: str
    seconds: float
    registers: int | None
    spilled: int | None
    shared: int
    loads: int
    stores: int


def cases() -> Iterator[Case]:
    """Every rule and dtype with four sources, and what else may change, one at a time."""
    for rule in RULES:
        for kind in KINDS:
            yield _combine(rule, kind, 1 if rule == "copy" else 4)
    for rule in ("linear", "ties", "dare_ties"):
        for sources in (1, 2, 3, 0):
            yield _combine(rule, BF16.value, sources)
        yield _combine(rule, BF16.value, 4, check=True)
        for kind in (BF16.value, FP32.value):
            yield _combine(rule, kind, 4, aligned=False)
        yield _combine(rule, BF16.value, 4, target=FP32.value)
    yield _combine("ties", BF16.value, 4, weighted=True)
    for kernel in (trim._find_thresholds_kernel, trim._count_spans_kernel, trim._finish_spans_kernel):
        for kind in (BF16.value, FP16.value, FP32.value):
            constants = {"KIND": kind, "SAMPLE": trim.SAMPLE, "BLOCK": trim.BLOCK}
            taken = {name: constants[name] for name in kernel.arg_names if name in constants}
            name = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {KINDS[kind]}"
            yield Case(name, kernel, taken, trim.WARPS, True)


def _combine(
    rule: str,
    kind: int,
    sources: int,
    aligned: bool = True,
    check: bool = False,
    weighted: bool = False,
    target: int | None = None,
) -> Case:
    keep, blend = RULES[rule]
    stored = FP32.value if kind == MIXED.value else kind
    said = {"unaligned": not aligned, "check": check, "weighted": weighted}
    details = [f"N={sources or 'loop'}", *(word for word, true in said.items() if true)]
    into = "" if target is None else f" into {KINDS[target]}"
    return Case(
        f"{rule} {KINDS[kind]}{into}, {', '.join(details)}",
        combine._combine_kernel,
        {
            "SOURCES": sources,
            "KIND": kind,
            "ROUND": stored,
            "TARGET": stored if target is None else target,
            "KEEP": keep.value,
            "RULE": blend.value,
            "WEIGHTED": weighted,
            "ALIGNED": aligned,
            "CHECK": check,
            "BLOCK": combine.BLOCK,
        },
        combine.WARPS,
        aligned,
    )


TYPES = {
    **dict.fromkeys(("tasks_ptr", "tensors_ptr", "sources_ptr", "keeps_ptr"), "*i64"),
    **dict.fromkeys(("weights_ptr", "rescales_ptr"), "*fp32"),
    **dict.fromkeys(("items_ptr", "spans_ptr", "counts_ptr", "shares_ptr", "kinds_ptr", "flags_ptr"), "*i32"),
    **dict.fromkeys(("count", "span", "passes", "tasks"), "i32"),
}
"""Of every kernel's arguments that are no constants."""


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for a target.  Raises whatever the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else TYPES[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    # What the launcher finds in the arguments and tells the compiler.
    divisible = {i for i, name in enumerate(names) if name.endswith("_ptr") or name == "span"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    start = time.perf_counter()
    compiled: Any = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": case.warps, "enable_fp_fusion": False},
    )
    seconds = time.perf_counter() - start
    registers = spilled = None
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        found = re.search(r"\.vgpr_count:\s+(\d+)", code)
        lost = re.search(r"\.vgpr_spill_count:\s+(\d+)", code)
        registers, spilled = (int(m[1]) if m else None for m in (found, lost))
        loads, stores = (
            len(re.findall(rf"(?:global|buffer|flat)_{verb}_dwordx4", code)) for verb in ("load", "store")
        )
    else:
        code = compiled.asm["ptx"]
        registers, spilled = _ask_ptxas(code, TARGETS[target].arch)
        loads, stores = (len(re.findall(rf"{verb}\.global(?:\.\w+)*\.v4", code)) for verb in ("ld", "st"))
    return Compiled(case.name, target, seconds, registers, spilled, compiled.metadata.shared, loads, stores)


def _ask_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as ptxas tells them."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        suffix = "a" if arch == 90 else ""
        done = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name=sm_{arch}{suffix}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    said = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas does not tell the registers: {said}")
    return int(registers[1]), int(spills[1]) + int(spills[2])
