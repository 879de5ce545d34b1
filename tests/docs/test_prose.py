"""Pages, docstrings and comments keep clear of phrases that we do not write, and of misspellings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prose

ROOT = Path(__file__).resolve().parents[2]

FOREIGN = (
    "How a plan comes about is told in another file.",
    "The merge of that name, None where there is none.",
    "Raises MergeError where the name is unknown.",
    "Holder: stands for a request.",
    "One source.\n\nOf sources: those for which there is a kernel.",
    "Those of this process.",
    "Either is reported, but by the NumPy backend.",
    "All layers but for the last.",
    "Unless said, there is room for eight.",
    "A tensor that is no product.",
    "An API server that dies takes the others not with it.",
    "Names beginning with a dot are nobody's.",
    "The releases, held beside the installed one.",
    "What comes in.  path: of a folder.  options: how it is read.",
)
NATIVE = (
    "A place to look: it says where it is, and from where it came.",
    "There is no limit, and there are no files to manage.",
    "It is no longer than a line, and no less exact.",
    "This tells them apart. A stand-in for the model.",
    "See where the file lies, if it exists. A number of names, one of them new.",
    "Takes two.\n\npath:    of a folder.\noptions: how it is read.\n\nA note. See: this is well.",
    "All but one agree. The rank of the result is that of its sources.",
)


@pytest.mark.parametrize("text", FOREIGN)
def test_a_phrase_that_we_do_not_write_is_found(text: str) -> None:
    assert list(prose.check_text(text))


@pytest.mark.parametrize("text", NATIVE)
def test_plain_english_passes(text: str) -> None:
    assert not list(prose.check_text(text))


def test_code_and_links_of_a_page_are_not_prose() -> None:
    page = "# A\n\nSay `told`, [here](told.md).\n\n```text\nis told\n```\n\n    told\n\nA merge is\ntold.\n"
    found = list(prose.check_text(prose.prose_of_page(page)))
    assert [words for _, words, _ in found] == ["told"]
    assert prose.prose_of_page(page)[: found[0][0]].count("\n") == page.split("told.\n")[0].count("\n")


def test_docstrings_and_comments_of_a_module_are_prose(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""What is told."""\n\nA = "told"\n"""Of all."""\n# a comment that\n# was told\n\n\n'
        'def f():\n    """One ``told``."""\n    return 1  # nobody\'s\n',
        encoding="utf-8",
    )
    found = sorted((finding.line, finding.words) for finding in prose.check_file(module))
    assert found == [(1, "told"), (4, "Of"), (6, "told"), (11, "nobody's")]


@pytest.mark.parametrize("folder", prose.FOLDERS)
def test_a_folder_has_no_such_phrases(folder: str) -> None:
    found = [finding for file in prose.files_of(folder) for finding in prose.check_file(file)]
    assert not found, "\n".join(map(str, found))


def test_pages_have_few_semicolons() -> None:
    found = [file for folder in (".", "docs", "bench") for file in prose.files_of(folder)]
    pages = [file for file in found if file.suffix == ".md"]
    many = {page.name: prose.semicolons(page.read_text(encoding="utf-8")) for page in pages}
    assert len(many) > 10
    assert not {name: rate for name, rate in many.items() if rate > prose.MAX_SEMICOLONS}
    assert prose.semicolons("One; two, three; four.") == 500.0


def test_words_are_spelled_as_dictionaries_spell_them(tmp_path: Path) -> None:
    files = [str(file) for folder in prose.FOLDERS for file in prose.files_of(folder)]
    command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", prose.OUR_WORDS]
    spelled = subprocess.run([*command, *files], capture_output=True, text=True)
    assert spelled.returncode == 0, spelled.stdout
    wrong = tmp_path / "wrong.md"
    wrong.write_text("An adp" + "ater.\n", encoding="utf-8")
    assert subprocess.run([*command, str(wrong)], capture_output=True).returncode != 0
