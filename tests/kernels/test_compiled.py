"""Every supported release of Triton compiles each kernel for NVIDIA and AMD GPUs within its bounds.

It spills no more registers than the bounds allow, leaves room for as many programs, and loads 16 bytes at a
time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import triton

from kernels.bounds import BOUNDS, Bounds, find_faults
from kernels.releases import INSTALLED, environment
from merged_lora.bench import registers
from merged_lora.bench.registers import BOUNDED, TARGETS, Compiled
from other_releases import RELEASES

Rows = Mapping[str, list[Compiled]]

OLDEST = RELEASES["triton"][0]
CHOICES = [
    pytest.param((INSTALLED, False), marks=pytest.mark.slow),
    pytest.param((OLDEST, True), marks=pytest.mark.slow),  # with few kernels, as all of them take minutes
    *(pytest.param((release, False), marks=pytest.mark.soak) for release in RELEASES["triton"]),
]


@pytest.fixture(scope="module", params=CHOICES, ids=lambda choice: choice[0] + ", usual" * choice[1])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bounds, Rows]:
    """The bounds of a release and the rows of every target.

    Each target is compiled in a process of its own, without the interpreter.
    """
    release, bounded = request.param
    folder = tmp_path_factory.mktemp("compiled")

    def compile_for(target: str) -> list[Compiled]:
        file = folder / f"{target}.json"
        command = [sys.executable, "-m", "merged_lora.bench", "registers", "--target", target]
        done = subprocess.run(
            [*command, "--json", str(file), *["--bounded"] * bounded],
            env=environment(release),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(file.read_text())
        assert report["triton"] == (triton.__version__ if release == INSTALLED else release)
        rows = [Compiled(**{k: v for k, v in row.items() if k != "programs"}) for row in report["rows"]]
        assert len(rows) == len(BOUNDED) if bounded else len(rows) > 50
        print(done.stdout)
        return rows

    with ThreadPoolExecutor(2) as pool:
        rows = dict(zip(TARGETS, pool.map(compile_for, TARGETS), strict=True))
    minor = ".".join((triton.__version__ if release == INSTALLED else release).split(".")[:2])
    return BOUNDS[minor], rows


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_within_the_bounds_and_aligned_variants_load_16_bytes(
    compiled: tuple[Bounds, Rows], target: str
) -> None:
    bounds, rows = compiled
    assert [(row.case, faults) for row in rows[target] if (faults := find_faults(row, bounds))] == []


@pytest.mark.parametrize("target", TARGETS)
def test_all_sources_are_loaded_16_bytes_at_a_time(compiled: tuple[Bounds, Rows], target: str) -> None:
    loads = {row.case: row.loads for row in compiled[1][target]}
    # On AMD the tables are loaded as widely: those loads come on top.
    assert all(loads[f"{rule} bf16, N=4"] >= 4 for rule in ("linear", "ties", "dare_ties"))
    if target != "gfx942":
        assert loads["linear bf16, N=4"] == 4
        assert loads["linear fp32, N=4"] == 8
        assert loads["linear bf16, N=4, unaligned"] == 0


def test_every_release_that_is_installed_has_bounds_of_cases_that_there_are() -> None:
    minors = [release.rpartition(".")[0] for release in (*RELEASES["triton"], triton.__version__)]
    assert minors == list(BOUNDS)
    names = {case.name for case in registers.cases()}
    assert set(BOUNDED) <= names
    for bounds in BOUNDS.values():
        assert {case for case, _ in bounds.spilled} <= names
        assert {target for _, target in bounds.spilled} <= TARGETS.keys()


@pytest.mark.parametrize(
    ("target", "count", "programs"),
    # 65,536 registers of NVIDIA's multiprocessors for programs of 256 threads; 512 a lane of AMD's units
    [
        *(("sm_90", *of) for of in ((32, 8), (33, 6), (40, 6), (64, 4), (65, 3), (80, 3), (81, 2), (255, 1))),
        *(("gfx942", *of) for of in ((12, 8), (64, 8), (65, 7), (73, 6), (96, 5), (512, 1))),
    ],
)
def test_registers_bound_the_programs(target: str, count: int, programs: int) -> None:
    assert compiled_to(target, registers=count).programs == programs


def compiled_to(target: str, registers: int = 32, spilled: int = 0, loads: int = 4) -> Compiled:
    """The first bounded case, as if it had been compiled to these numbers."""
    return Compiled(BOUNDED[0], target, 1.0, registers, spilled, 0, 300, loads, 1, True)


def test_a_kernel_beyond_its_bounds_has_a_fault() -> None:
    bounds = Bounds({BOUNDED[0]: (8, 4, 8)}, {(BOUNDED[0], "sm_80"): 16})

    def found(*given: Any, **more: Any) -> list[str]:
        return find_faults(compiled_to(*given, **more), bounds)

    assert found("sm_80", spilled=16) == []
    assert found("sm_80", spilled=17) == ["17 bytes spilled"]
    assert found("sm_90", spilled=1) == ["1 bytes spilled"]
    assert found("gfx942", spilled=1) == ["1 registers spilled"]
    assert found("sm_80", 40) == ["room for 6 programs, not 8"]
    assert found("sm_90", 64) == []
    assert found("sm_90", 65) == ["room for 3 programs, not 4"]
    assert found("sm_90", loads=0) == ["no load of 16 bytes"]


MACHINE_CODE = """
.text._some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__division) ;
.L_x_1:
        /*0030*/               @P0 EXIT ;
        /*0040*/                   STG.E.128 desc[UR16][R4.64], R8 ;
        /*0050*/                   NOP;
"""


def test_instructions_are_counted_without_padding() -> None:
    assert len(registers.INSTRUCTION.findall(MACHINE_CODE)) == 5
