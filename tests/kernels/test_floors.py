"""The modules of ``triton_kernels`` form floors: none imports from a floor above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from merged_lora import triton_kernels

PACKAGE = "merged_lora.triton_kernels"
FOLDER = Path(triton_kernels.__file__).parent
BELOW: dict[str, set[str]] = {
    "transfer": set(),
    "packed": {"transfer"},
    "kernels": {"transfer"},
    "factors": {"transfer", "packed", "kernels"},
    "batched": {"kernels", "factors"},
    "results": {"transfer", "packed"},
    "placing": {"transfer", "packed", "factors"},
    "warm_up": {"kernels"},
    "backend": {"transfer", "packed", "kernels", "factors", "batched", "results", "placing", "warm_up"},
}
"""For each folder or file of ``triton_kernels``, the others that it may import from."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module with its name, for instance ``factors.launch``, and its syntax tree."""
    for path in sorted(FOLDER.rglob("*.py")):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix("__init__")
        yield name.rstrip("."), ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, tree: ast.Module) -> set[str]:
    """The modules and names of ``triton_kernels`` that a module imports anywhere, without that prefix."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = [PACKAGE, *name.split(".")[:-1]]
            base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return {full.removeprefix(f"{PACKAGE}.") for full in found if full.startswith(f"{PACKAGE}.")}


IMPORTED = {name: imported(name, tree) for name, tree in modules()}


def test_every_folder_and_file_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in IMPORTED if name} == set(BELOW)


@pytest.mark.parametrize("name", [name for name in IMPORTED if name])
def test_a_module_imports_only_from_its_own_folder_and_those_below(name: str) -> None:
    folder = name.partition(".")[0]
    folders = {target.partition(".")[0] for target in IMPORTED[name]}
    assert folders <= BELOW[folder] | {folder}


@pytest.mark.parametrize("name", ["GROUP", "INFINITY", "KINDS", "MAGNITUDE", "SHARES"])
def test_a_fact_about_entries_has_one_home(name: str) -> None:
    homes = [
        module
        for module, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    ]
    assert homes == ([] if name == "SHARES" else ["kernels.words"])  # SHARES is the core's


def test_imports_of_every_form_are_seen() -> None:
    tree = ast.parse(
        f"import {PACKAGE}.packed\nfrom {PACKAGE} import transfer\ndef f():\n    from .layout import Layout\n"
        f"from {PACKAGE}.kernels.words import GROUP\nfrom . import tables\nimport numpy\n"
    )
    assert imported("factors.launch", tree) == {
        *("packed", "transfer", "factors.layout.Layout", "kernels.words.GROUP", "factors.tables"),
    }


def test_groups_alone_look_at_how_a_plan_is_launched() -> None:
    batched = {name: targets for name, targets in IMPORTED.items() if name.startswith("batched.")}
    using = {name for name, targets in batched.items() if any(t.startswith("factors.") for t in targets)}
    assert using == {"batched.groups"}
