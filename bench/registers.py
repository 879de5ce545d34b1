"""Compile every kernel ahead of time, without a GPU: its registers, its spills, the width of its loads.

It knows nothing of what the numbers should be: the tests hold them to bounds.
"""

from __future__ import annotations

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
from merged_lora.triton_kernels.kernels import combine, sketch, trim
from merged_lora.triton_kernels.kernels.words import BF16, FP16, FP32, MIXED, THREADS

from .recording import write_report

LARGE_RANK = 256  # of an adapter; few have more
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {BF16.value: "bf16", FP16.value: "fp16", FP32.value: "fp32", MIXED.value: "mixed"}
MOST_PROGRAMS = 8  # of THREADS on a multiprocessor
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
    """A kernel with its compile-time constants; ``wide`` if its loads must be 16 bytes."""

    name: str
    kernel: Any
    constants: Mapping[str, object]
    wide: bool


@dataclass(frozen=True)
class Compiled:
    """A case as it was compiled for a target.

    registers: registers of a thread.
    spilled: spilled bytes, or spilled registers on gfx942.
    shared: bytes of shared memory.
    instructions: instructions of the machine code, each counted once, loops and rare branches included.
    loads, stores: number of global accesses of 16 bytes in the code.
    wide: whether the loads must be 16 bytes.
    """

    case: str
    target: str
    seconds: float
    registers: int
    spilled: int
    shared: int
    instructions: int
    loads: int
    stores: int
    wide: bool

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor has registers for at once."""
        # Threads take registers by the eight. NVIDIA: 65,536 for all threads of a multiprocessor; AMD: 512
        # for a lane of each of four units, and a program has a wave of 64 lanes on each.
        registers = 512 if self.target == "gfx942" else 65536 // THREADS
        return min(MOST_PROGRAMS, registers // (-(-self.registers // 8) * 8))


BOUNDED = (
    "linear bf16, N=4",
    "linear fp32, N=4",
    "linear bf16, N=4, unaligned",
    "magnitude_prune bf16, N=4",
    "ties bf16, N=4",
    "dare_linear bf16, N=4",
    "dare_ties bf16, N=4",
    "ties bf16, N=loop",
    "find_thresholds bf16",
)
"""The cases whose number of programs the tests bound: the usual merges and their trim."""


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
    yield from _sketches()


def _sketches() -> Iterator[Case]:
    """The kernels for entries of deltas, 4 sources: of rank 16 times 64 columns, and large ones of both."""
    for precision in ("tf32", "tf32x3"):
        shared = {
            "RANK": 16,
            "DEPTH": sketch.DEPTH,
            "PRECISION": precision,
            "TILE_ROWS": sketch.TILE_ROWS,
            "TILE_COLUMNS": sketch.TILE_COLUMNS,
        }
        yield Case(f"count {precision}", sketch._count_kernel, shared | {"BINS": sketch.BINS}, False)
        for rule in ("magnitude_prune", "ties", "dare_ties"):
            keep, blend = RULES[rule]
            chosen = {"SOURCES": 4, "KEEP": keep.value, "BLEND": blend.value, "WEIGHTED": False}
            for rank, width in ((16, 64), (LARGE_RANK, sketch.WIDEST)):
                sizes = {"SKETCH": "tf32x3", "RANK": rank, "WIDTH": width}
                name = f"{rule}_svd {{}} {precision}, r={rank}, {width}"
                constants = shared | chosen | sizes
                times = constants | {"TRANSPOSED": False}
                transposed = constants | {"TRANSPOSED": True, "norms_ptr": None}
                yield Case(name.format("times"), sketch._multiply_kernel, times, False)
                yield Case(name.format("transposed"), sketch._multiply_kernel, transposed, False)


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
    sources = 0 if kind == MIXED.value else sources
    stored = FP32.value if kind == MIXED.value else kind
    details = {"unaligned": not aligned, "check": check, "weighted": weighted}
    words = [f"N={sources or 'loop'}", *(word for word, true in details.items() if true)]
    into = "" if target is None else f" into {DTYPES[target]}"
    return Case(
        f"{rule} {DTYPES[kind]}{into}, {', '.join(words)}",
        combine._combine_kernel,
        {
            "SOURCES": sources,
            "KIND": kind,
            "ROUND": stored,
            "TARGET": stored if target is None else target,
            "KEEP": keep.value,
            "BLEND": blend.value,
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
    **dict.fromkeys(("factor_ptr", "product_ptr", "norms_ptr"), "*fp32"),
    **dict.fromkeys(("base_ptr", "shift_ptr"), "*i32"),
    **dict.fromkeys(("modules", "sources", "rows", "columns"), "i32"),
    **dict.fromkeys(("items_ptr", "spans_ptr", "counts_ptr", "shares_ptr", "kinds_ptr", "flags_ptr"), "*i32"),
    **dict.fromkeys(("count", "span", "passes", "tasks"), "i32"),
}
"""Types of all kernel arguments that are not constexpr."""


def compile_case(case: Case, target: str) -> Compiled:
    """Compile a case for a target; raises whatever the compiler raises."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else TYPES[name] for name in names}
    # AMD's matrix cores take float32 as it is, and have no tf32.
    amd = target == "gfx942"
    given = {k: "ieee" if amd and str(v).startswith("tf32") else v for k, v in case.constants.items()}
    constants = {(names.index(name),): value for name, value in given.items()}
    # What the launcher finds in the arguments and passes to the compiler.
    divisible = {i for i, name in enumerate(names) if name.endswith("_ptr") or name == "span"}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    start = time.perf_counter()
    compiled: Any = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": THREADS // TARGETS[target].warp_size, "enable_fp_fusion": False},
    )
    seconds = time.perf_counter() - start
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
        spilled = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)[0])
        instructions = len(AMD_INSTRUCTION.findall(code))
        loads, stores = (len(re.findall(rf"_{verb}_dwordx4", code)) for verb in ("load", "store"))
    else:
        code = compiled.asm["ptx"]
        registers, spilled = _ask_ptxas(code, TARGETS[target].arch)
        instructions = len(INSTRUCTION.findall(_disassemble(compiled.asm["cubin"])))
        loads, stores = (len(re.findall(rf"{verb}\.global\S*\.v4", code)) for verb in ("ld", "st"))
    shared = compiled.metadata.shared
    return Compiled(
        case.name, target, seconds, registers, spilled, shared, instructions, loads, stores, case.wide
    )


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?!NOP\b)[A-Z]", re.MULTILINE)
"""An instruction of NVIDIA's machine code, with its predicate; padding is left out."""
AMD_INSTRUCTION = re.compile(r"^\t(?:[vs]|ds|global|buffer|flat|scratch)_\w+", re.MULTILINE)


def _disassemble(cubin: bytes) -> str:
    """The listing of machine code for NVIDIA by Triton's disassembler."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ask_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as ptxas reports them."""
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
    output = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", output)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas reports no registers: {output}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


def run(targets: Sequence[str] | None, file: Path | None, bounded: bool = False) -> int:
    """Compile every case for the targets, all by default, print a table and return the exit code.

    file: gets the table as JSON.
    bounded: compile only the cases of BOUNDED.

    Raises MergeError if a target is unknown.
    """
    unknown = set(targets or ()) - TARGETS.keys()
    if unknown:
        raise MergeError(f"unknown target {listed(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    rows = []
    print(
        f"{'kernel':47} {'target':7} {'registers':>9} {'programs':>8} {'spilled':>7} {'shared':>6} "
        f"{'code':>5} {'ld16':>4} {'st16':>4}"
    )
    chosen = [case for case in cases() if not bounded or case.name in BOUNDED]
    for target, case in ((target, case) for target in targets or TARGETS for case in chosen):
        done = compile_case(case, target)
        rows.append(asdict(done) | {"programs": done.programs})
        print(
            f"{done.case:47} {target:7} {done.registers:9} {done.programs:8} {done.spilled:7} "
            f"{done.shared:6} {done.instructions:5} {done.loads:4} {done.stores:4}",
            flush=True,
        )
    print(f"{len(rows)} compiled with Triton {triton.__version__}")
    write_report(file, triton=triton.__version__, rows=rows)
    return 0
