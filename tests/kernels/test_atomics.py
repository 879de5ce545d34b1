"""Counts on a GPU are added up in any order: their atomic operations are relaxed, and none brings a fence."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

SCRIPT = """
import json
import triton
from merged_lora.bench import registers

codes = {}
compile_source = triton.compile

def compile_and_keep(*given, **named):
    compiled = compile_source(*given, **named)
    codes[case.name] = compiled.asm["ptx"]
    return compiled

triton.compile = compile_and_keep
for case in registers.cases():
    if "atomic_" in case.kernel.src:
        registers.compile_case(case, "sm_90")
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_every_atomic_operation_is_relaxed_and_nothing_is_fenced() -> None:
    # In a process of its own, which knows no interpreter.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes: dict[str, str] = json.loads(done.stdout)
    assert {name.split()[0] for name in codes} == {"count", "count_spans"}
    for name, code in codes.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S+", code)
        assert atomics, name
        assert all(".relaxed." in one for one in atomics), f"{name}: {atomics}"
        assert not re.findall(r"\b(?:fence|membar)\b\S*", code), name
