"""Checks the English of pages, docstrings and comments against a short list of phrases that we do not write.

    python tools/prose.py [FILE ...]

Without files it checks the whole repository. The exit code is 1 if there is a finding. It finds words and
phrases, and cannot judge a sentence. Spelling is codespell's part, see ``tests/docs``.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("merged_lora", "reference", "cpu_kernels", "triton_kernels", "vllm_plugin", "bench")
FOLDERS = (*CODE, "examples", "tools", "tests", "docs", ".")
"""Where pages and Python files are, each with the folders below it, except for ``.``: the root alone."""

START = r"(?:\A\W*|[.:?!]\s+|\n\s*\n\s*)"
"""The beginning of a sentence."""
SPATIAL = "".join(
    rf"(?<!{word}\s)" for word in ("say", "says", "knows", "shows", "from", "place", "finds", "is", "stays")
)
"""Not after a word that makes ``where`` a place instead of a condition."""
THINGS = r"(?:it|they|that|one|none|this|these|those|both|all|some|nothing|there|an? \w+|the \w+|no \w+)"
BE = "is|are|was|were|do|does|has|have|can|cannot|could"
VERBS = rf"(?:{BE}|fits?|fails?|differs?|exceeds?|lacks?|overflows?|raises?)"

PHRASES = (
    (r"\btold\b", "reported, stored, said"),
    (r"\btells\b(?! (?:\S+ )?apart)", "says, shows, reports"),
    (rf"{SPATIAL}\bwhere {THINGS} {VERBS}\b", "if"),
    (
        r"\bst(?:ands?|ood) (?:for|in|at|on|here|there|beside|by|below|above|over|under|before|as)\b",
        "is, means",
    ),
    (rf"{START}Of\b", "a whole sentence"),
    (rf"{START}(?:Those|That) (?:of|for|in)\b", "a whole sentence"),
    (r"\bbut for\b|, but by\b", "except for"),
    (
        r"\bunless said\b|\bsaid (?:once|of|before|otherwise)\b|\bas said\b|\bwhat (?:is|was) said\b",
        "given, set",
    ),
    (r"(?<!there\s)\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|better\b|worse\b)\w+", "is not a"),
    (r"\b(?:in )?so far as\b|\bby so (?:much|many)\b", "as far as, by this much"),
    (r"\b(?:takes?|makes?|gives?|does) (?:it|them|others|the others) not\b", "does not"),
    (r"\b(?:comes?|came) about\b", "is built, arises"),
    (r"\b(?:held|holds?) (?:\S+ )?beside\b", "compared with"),
    (r"\bwhatever becomes of\b", "whatever happens to"),
    (r"\bthe way of the\b", "the path of the"),
    (r"\bnobody's\b|\bworth its while\b|\bmoods\b|\bfor want of\b|\bfor good\b", "a plain word"),
    (r"\b(?:there|where|here)(?:of|by|upon|in)\b", "a plain word"),
    (r"\bwings?\b", "backend, folder"),
    (r"[.;]\x20{1,2}(?!x:)(?-i:[a-z_]\w*)(?:,\x20[a-z_]\w*)*:\x20", "one parameter a line"),
)
"""What we do not write, as patterns in which a space is any white space, with what to write instead."""

COMPILED = tuple(
    (re.compile(pattern.replace(" ", r"\s+"), 0 if pattern.startswith(START) else re.IGNORECASE), better)
    for pattern, better in PHRASES
)

MAX_SEMICOLONS = 6.0
"""For every thousand words of a page."""

OUR_WORDS = "desnity,rouge"  # of a test; a score
"""What codespell takes for misspelled and is not, separated by commas."""


@dataclass(frozen=True)
class Finding:
    """A phrase that we do not write: its file, its line, its words, and what to write instead."""

    file: Path
    line: int
    words: str
    better: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.words!r}; better: {self.better}"


def check_text(text: str) -> Iterator[tuple[int, str, str]]:
    """The offset, the words and a better choice for every phrase in a text that we do not write."""
    for pattern, better in COMPILED:
        for match in pattern.finditer(text):
            yield match.start(), " ".join(match[0].split()), better


def prose_of_page(text: str) -> str:
    """A Markdown page without code, targets of links and rendered parts; every line keeps its number."""
    text = re.sub(
        r"^```.*?^```|^<!-- rendered:.*?^<!-- end of rendered",
        lambda block: "\n" * block[0].count("\n"),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "x", text)
    return re.sub(r"\]\([^)]*\)|<!--.*?-->", "]", text)


def written_in(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings and comments of a Python file, each with the line at which it begins."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(ast.Constant(str(text))):
                    yield statement.lineno, text
    lines: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and lines:
                yield last - len(lines) + 1, "\n".join(lines)
                lines = []
            lines.append(token.string.lstrip("# "))
            last = token.start[0]
    if lines:
        yield last - len(lines) + 1, "\n".join(lines)


def prose_of_module(source: str) -> Iterator[tuple[int, str]]:
    """The docstrings and comments of a Python file without the code in them, each with its line."""
    for line, text in written_in(source):
        yield line, re.sub(r"``[^`]*``", "x", text)


def check_file(file: Path) -> Iterator[Finding]:
    """The findings of a page or of a Python file."""
    text = file.read_text(encoding="utf-8")
    parts = [(1, prose_of_page(text))] if file.suffix == ".md" else prose_of_module(text)
    for first, part in parts:
        for offset, words, better in check_text(part):
            yield Finding(file, first + part[:offset].count("\n"), words, better)


def semicolons(page: str) -> float:
    """Semicolons in the prose of a page for every thousand of its words."""
    prose = prose_of_page(page)
    return 1000.0 * prose.count(";") / max(1, len(re.findall(r"\w+", prose)))


def files_of(folder: str) -> list[Path]:
    """The pages and Python files of a folder; a link to another folder is not followed."""
    root = ROOT / folder
    found = root.glob("*") if folder == "." else root.rglob("*")
    return sorted(f for f in found if f.suffix in (".py", ".md") and f.is_file() and f.resolve() == f)


def main(arguments: Sequence[str]) -> int:
    """Print the findings and return the exit code."""
    named = [Path(name).resolve() for name in arguments]
    files = named or [file for folder in FOLDERS for file in files_of(folder)]
    findings = [found for file in files for found in check_file(file)]
    print(*findings, sep="\n", end="\n" if findings else "")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
