"""The plugin's rooms: which file may import which, read from the source."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from merged_lora import vllm_plugin

PACKAGE = "merged_lora.vllm_plugin"
FOLDER = Path(str(vllm_plugin.__file__)).parent
FILES = {
    ".".join((PACKAGE, *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
}
"""The files by module name."""

PROTOCOL = {f"{PACKAGE}.{name}" for name in ("identity", "rpc", "settings")}
"""The modules that the processes share, besides the core."""


def imported(module: str) -> set[str]:
    """Modules that a module imports, anywhere in it, by their full names."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return found


def room(module: str) -> str:
    """The folder inside the plugin that a module is in; its own name if it is in none."""
    return module.removeprefix(f"{PACKAGE}.").partition(".")[0]


def modules_of(name: str) -> list[str]:
    """The modules of one room."""
    found = [module for module in FILES if room(module) == name]
    assert found
    return found


def test_the_processes_share_the_protocol_and_the_core_and_nothing_else() -> None:
    used = {
        process: {
            name
            for module in modules_of(process)
            for name in imported(module)
            if name.startswith(PACKAGE) and room(name) != process
        }
        for process in ("api_server", "worker")
    }
    assert used["api_server"] & used["worker"] <= PROTOCOL
    for names in used.values():
        assert {room(name) for name in names} <= {"identity", "merge_log", "rpc", "settings"}


def test_hooks_and_the_offline_helper_alone_import_vllm() -> None:
    users = {module for module in FILES if any(f"{n}.".startswith("vllm.") for n in imported(module))}
    assert f"{PACKAGE}.offline" in users
    assert {room(module) for module in users} == {"hooks", "offline"}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: imported(module) & set(FILES) - {PACKAGE} for module in FILES if module != PACKAGE}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


def test_no_import_between_rooms_runs_upward() -> None:
    floors = [
        ("rpc", "identity", "settings", "releases", "merge_log"),
        ("api_server", "worker"),
        ("hooks",),
        ("offline",),
    ]
    floor = {name: level for level, names in enumerate(floors) for name in names}
    for module in FILES:
        for name in imported(module) & set(FILES) - {PACKAGE}:
            if module != PACKAGE and room(name) != room(module):
                assert floor[room(name)] <= floor[room(module)], f"{module} imports {name}"
