"""Code that pages, docstrings and comments name exists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import prose

ROOT = Path(__file__).resolve().parents[2]
OURS = (*prose.CODE, "examples", "tools", "tests", "docs")
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|svg|json)")
DOTTED = re.compile(r"[a-z_]\w*(?:\.[A-Za-z_]\w*)+(?:\(\))?")


@functools.cache
def files() -> frozenset[str]:
    """Every file of the repository that can be named, by its path from the root."""
    found = [f for folder in OURS for f in (ROOT / folder).rglob("*") if f.resolve() == f and f.is_file()]
    return frozenset(str(f.relative_to(ROOT)) for f in (*found, *ROOT.glob("*.*")))


@functools.cache
def endings() -> frozenset[str]:
    """The names of all files with any number of the folders that they are in."""
    return frozenset("/".join(Path(file).parts[i:]) for file in files() for i in range(len(Path(file).parts)))


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every Python file of the repository, parsed, by its path from the root."""
    python = [file for file in files() if file.endswith(".py")]
    return {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in python}


@functools.cache
def modules() -> dict[tuple[str, ...], list[set[str]]]:
    """What each module and package of ours defines, by every ending of its dotted name."""
    found: dict[tuple[str, ...], list[set[str]]] = {}
    for file, tree in trees().items():
        parts = Path(file).with_suffix("").parts
        defined = set(definitions(tree))
        if parts[-1] == "__init__":
            parts = parts[:-1]
            defined |= {other.stem for other in (ROOT / file).parent.iterdir()}
        if parts[0] in prose.CODE[1:]:
            parts = ("merged_lora", *parts)
        for i in range(len(parts)):
            found.setdefault(parts[i:], []).append(defined)
    return found


def definitions(tree: ast.AST) -> Iterator[str]:
    """The names that a module defines or imports, and those in its classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]


@functools.cache
def texts() -> frozenset[str]:
    """Every string in the code: keys of metadata and of settings look like names too."""
    code = [tree for file, tree in trees().items() if file.startswith(prose.CODE)]
    nodes = [node for tree in code for node in ast.walk(tree)]
    return frozenset(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def exists(name: str) -> bool:
    """Whether a dotted name is not ours, or names something that is there."""
    parts = tuple(name.removesuffix("()").split("."))
    if (parts[0],) not in modules() or parts in modules() or name in texts():
        return True
    known = max(i for i in range(1, len(parts)) if parts[:i] in modules())
    return any(parts[known] in defined for defined in modules()[parts[:known]])


def quoted(file: Path) -> Iterator[str]:
    """What a page, a docstring or a comment shows as code, in one piece."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        yield from re.findall(r"`([^`\s]+)`", text)
        return
    for _, written in prose.written_in(text):
        yield from re.findall(r"``([^`\s]+)``", written)
        yield from re.findall(r":[a-z]+:`~?([^`\s]+)`", written)


def missing(file: Path) -> list[str]:
    """The names of code in a file that lead nowhere."""
    lost = []
    for name in quoted(file):
        path = FILE.fullmatch(name)
        ours = name.endswith((".py", ".md")) or name.split("/")[0] in OURS
        if path:
            lost += [name] if ours and name not in endings() else []
        elif DOTTED.fullmatch(name) and not exists(name):
            lost.append(name)
    return lost


@pytest.mark.parametrize("folder", prose.FOLDERS)
def test_code_that_is_named_exists(folder: str) -> None:
    lost = {str(f.relative_to(ROOT)): missing(f) for f in prose.files_of(folder)}
    assert not {file: names for file, names in lost.items() if names}


def test_a_name_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`planning.py` `merged_lora/planning.py` `planing.py` `docs/no.md` `torch.topk`\n"
        "`spec.parse` `spec.pars` `reference.factors` `reference.entries`\n"
        "`merged_lora.spec.MergeSpec` `merged_lora.spec.Nothing` `merged_lora.kept_energy` `x.json`\n",
        encoding="utf-8",
    )
    assert missing(page) == [
        "planing.py",
        "docs/no.md",
        "spec.pars",
        "reference.factors",
        "merged_lora.spec.Nothing",
    ]
    module = tmp_path / "module.py"
    module.write_text(
        '"""See ``nowhere.py`` and :func:`spec.nothing`."""\n# ``engine.nothing``\n', encoding="utf-8"
    )
    assert missing(module) == ["nowhere.py", "spec.nothing", "engine.nothing"]
