"""Every kernel compiled ahead of time, without a GPU: its registers, its spills, the width of its loads."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from merged_lora.errors import MergeError, listed
from merged_lora.triton_kernels import combine, stream, trim
from merged_lora.triton_kernels.words import BF16, FP16, FP32, MIXED, THREADS

LARGE_RANK = 256  # of an adapter; few have more
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {BF16.value: "bf16", FP16.value: "fp16", FP32.value: "fp32", MIXED.value: "mixed"}
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
    wide: bool


@dataclass(frozen=True)
class Compiled:
    """What became of a case on a target.

    registers: of a thread.  spilled: bytes, or registers on gfx942.  shared: bytes of shared memory.
    instructions: in the machine code, each counted once, loops and rare branches too; None on gfx942.
    loads, stores: how many global accesses of 16 bytes the code holds.
    """

    case: str
    target: str
    seconds: float
    registers: int
    spilled: int
    shared: int
    instructions: int | None
    loads: int
    stores: int


def cases() -> Iterator[Case]:
    """Every rule and dtype with four sources, and what else may change, one at a time."""
    for rule in RULES:
        for kind in DTYPES:
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
            name = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {DTYPES[kind]}"
            yield Case(name, kernel, taken, True)
    yield from _streams()


def _streams() -> Iterator[Case]:
    """The kernels of delta space, four sources: of rank 16 times 64 columns, and large ones of both."""
    for precision in ("tf32", "tf32x3"):
        shared = {
            "RANK": 16,
            "DEPTH": stream.DEPTH,
            "PRECISION": precision,
            "ROWS": stream.ROWS,
            "COLUMNS": stream.COLUMNS,
        }
        yield Case(f"count {precision}", stream._count_kernel, shared | {"BINS": stream.BINS}, False)
        for rule in ("magnitude_prune", "ties", "dare_ties"):
            keep, blend = RULES[rule]
            chosen = {"SOURCES": 4, "KEEP": keep.value, "RULE": blend.value, "WEIGHTED": False}
            for rank, width in ((16, 64), (LARGE_RANK, stream.WIDEST)):
                sizes = {"SKETCH": "tf32x3", "RANK": rank, "WIDTH": width}
                name = f"{rule}_svd {{}} {precision}, r={rank}, {width}"
                constants = shared | chosen | sizes
                yield Case(name.format("times"), stream._times_kernel, constants, False)
                yield Case(name.format("transposed"), stream._transposed_times_kernel, constants, False)


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
    into = "" if target is None else f" into {DTYPES[target]}"
    return Case(
        f"{rule} {DTYPES[kind]}{into}, {', '.join(details)}",
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
        aligned,
    )


TYPES = {
    **dict.fromkeys(("tasks_ptr", "tensors_ptr", "sources_ptr", "keeps_ptr", "keys_ptr"), "*i64"),
    **dict.fromkeys(("weights_ptr", "rescales_ptr"), "*fp32"),
    **dict.fromkeys(("a_ptr", "b_ptr", "scalings_ptr", "low_ptr", "high_ptr"), "*fp32"),
    **dict.fromkeys(("left_ptr", "right_ptr", "product_ptr", "norms_ptr"), "*fp32"),
    **dict.fromkeys(("base_ptr", "shift_ptr"), "*i32"),
    **dict.fromkeys(("modules", "sources", "rows", "columns"), "i32"),
    **dict.fromkeys(("items_ptr", "spans_ptr", "counts_ptr", "shares_ptr", "kinds_ptr", "flags_ptr"), "*i32"),
    **dict.fromkeys(("count", "span", "passes", "tasks"), "i32"),
}
"""Of every kernel's arguments that are no constants."""


def compile_case(case: Case, target: str) -> Compiled:
    """Compile for a target.  Raises whatever the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else TYPES[name] for name in names}
    # AMD's matrix cores take float32 as it is, and know no tf32.
    amd = target == "gfx942"
    given = {k: "ieee" if amd and str(v).startswith("tf32") else v for k, v in case.constants.items()}
    constants = {(names.index(name),): value for name, value in given.items()}
    # What the launcher finds in the arguments and tells the compiler.
    divisible = {i for i, name in enumerate(names) if name.endswith("_ptr") or name == "span"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    start = time.perf_counter()
    compiled: Any = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": THREADS // TARGETS[target].warp_size, "enable_fp_fusion": False},
    )
    seconds = time.perf_counter() - start
    instructions = None
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
        spilled = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)[0])
        loads, stores = (len(re.findall(rf"_{verb}_dwordx4", code)) for verb in ("load", "store"))
    else:
        code = compiled.asm["ptx"]
        registers, spilled = _ask_ptxas(code, TARGETS[target].arch)
        instructions = _count_instructions(compiled.asm["cubin"])
        loads, stores = (len(re.findall(rf"{verb}\.global\S*\.v4", code)) for verb in ("ld", "st"))
    shared = compiled.metadata.shared
    return Compiled(case.name, target, seconds, registers, spilled, shared, instructions, loads, stores)


def _count_instructions(cubin: bytes) -> int:
    """Instructions of the machine code, without those that only fill it up."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", said)
    return sum(name != "NOP" for name in found)


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


def faults(case: Case, done: Compiled) -> list[str]:
    """What is wrong with a compiled case: spilled registers, or accesses that should be 16 bytes wide."""
    found = []
    if done.spilled:
        found.append(f"{done.spilled} {'registers' if done.target == 'gfx942' else 'bytes'} spilled")
    if case.wide and not done.loads:
        found.append("no load of 16 bytes")
    return found


def run(targets: Sequence[str] | None, file: Path | None) -> int:
    """Compile every case for the targets (None: all) and print a table; 1 where one has a fault, else 0.

    Raises MergeError where a target is unknown.
    """
    unknown = set(targets or ()) - TARGETS.keys()
    if unknown:
        raise MergeError(f"unknown target {listed(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    rows, wrong = [], 0
    print(
        f"{'kernel':44} {'target':7} {'registers':>9} {'spilled':>7} {'shared':>6} {'code':>5} {'ld16':>4} "
        f"{'st16':>4}"
    )
    for target, case in ((target, case) for target in targets or TARGETS for case in cases()):
        done = compile_case(case, target)
        found = faults(case, done)
        wrong += bool(found)
        rows.append(asdict(done) | {"faults": found})
        print(
            f"{done.case:44} {target:7} {done.registers:9} {done.spilled:7} {done.shared:6} "
            f"{done.instructions or '':5} {done.loads:4} "
            f"{done.stores:4}  {', '.join(found)}",
            flush=True,
        )
    if file is not None:
        file.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} compiled with Triton {triton.__version__}, {wrong} with a fault")
    return 1 if wrong else 0
