"""The rooms of the Triton wing stand on floors: no module imports from a floor above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from merged_lora import triton_kernels

WING = "merged_lora.triton_kernels"
FOLDER = Path(triton_kernels.__file__).parent
BELOW: dict[str, set[str]] = {
    "transfer": set(),
    "packed": {"transfer"},
    "kernels": {"transfer"},
    "factors": {"transfer", "packed", "kernels"},
    "batched": {"kernels", "factors"},
    "warm_up": {"kernels"},
    "backend": {"transfer", "packed", "kernels", "factors", "batched", "warm_up"},
}
"""By room, a folder or a file, the other rooms of the wing that it may import from."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the wing with its name, for instance ``factors.launch``; ``factors`` for a package."""
    for path in sorted(FOLDER.rglob("*.py")):
        name = ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix("__init__")
        yield name.rstrip("."), ast.parse(path.read_text(encoding="utf-8"))


def imported(name: str, tree: ast.Module) -> set[str]:
    """The modules and names of the wing that a module imports anywhere, from the wing's folder on."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = [WING, *name.split(".")[:-1]]
            base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return {full.removeprefix(f"{WING}.") for full in found if full.startswith(f"{WING}.")}


IMPORTED = {name: imported(name, tree) for name, tree in modules()}


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in IMPORTED if name} == set(BELOW)


@pytest.mark.parametrize("name", [name for name in IMPORTED if name])
def test_a_module_imports_only_from_its_own_room_and_those_below(name: str) -> None:
    room = name.partition(".")[0]
    rooms = {target.partition(".")[0] for target in IMPORTED[name]}
    assert rooms <= BELOW[room] | {room}


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
        f"import {WING}.packed\nfrom {WING} import transfer\ndef f():\n    from .layout import Layout\n"
        f"from {WING}.kernels.words import GROUP\nfrom . import tables\nimport numpy\n"
    )
    assert imported("factors.launch", tree) == {
        *("packed", "transfer", "factors.layout.Layout", "kernels.words.GROUP", "factors.tables"),
    }


def test_groups_alone_look_at_how_a_plan_is_launched() -> None:
    batched = {name: targets for name, targets in IMPORTED.items() if name.startswith("batched.")}
    using = {name for name, targets in batched.items() if any(t.startswith("factors.") for t in targets)}
    assert using == {"batched.groups"}
