"""The fenced blocks of pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

KINDS = ("python", "console", "bash", "json", "spec", "text")
"""What a block can be.

python:  a program; it runs, unless it needs a server or vLLM, and then its merges are parsed.
console: a session of the command ``merged-lora``, whose output is compared.
bash:    commands that need a server, a network or minutes; their flags and merges are parsed.
json:    a body or an answer; it is parsed, and so are the merges in it.
spec:    merges, one a line; they are parsed.
text:    output that was measured, a diagram or a formula; the output of a program before it is compared.
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    line:   the line of its opening fence, from 1.
    kind:   one of KINDS.
    before: the block right before it, with nothing in between.
    """

    page: str
    line: int
    kind: str
    text: str
    before: Block | None

    @property
    def name(self) -> str:
        """Page and line, as the name of a test shows them."""
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order; ``before`` is set for a block right after another."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = -1
    for match in FENCE.finditer(text):
        before = blocks[-1] if blocks and text[end : match.start()].strip() == "" else None
        line = text[: match.start()].count("\n") + 1
        blocks.append(Block(page, line, match[1].strip(), match[2], before))
        end = match.end()
    return blocks


def all_blocks(*kinds: str) -> list[Block]:
    """The blocks of these kinds on all pages; of every kind without one."""
    return [block for page in PAGES for block in blocks_of(page) if not kinds or block.kind in kinds]


def commands_of(text: str) -> list[list[str]]:
    """The commands of a ``bash`` block as words, without comments; `|` and `&&` begin another command."""
    text = re.sub(r"(?:^|\s+)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    words = shlex.shlex(text, posix=True, punctuation_chars="|&\n")
    words.whitespace = " \t"
    words.whitespace_split = True
    words.commenters = ""
    commands: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("|&\n"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def session_of(text: str) -> list[tuple[list[str], str]]:
    """The commands of a ``console`` block as words, each with the output that it shows."""
    steps = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not steps[0].strip(), "a session begins with a command"
    found = []
    for step in steps[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", step)
        assert command is not None
        found.append((shlex.split(command[0].replace("\\\n", " ")), step[command.end() :]))
    return found
