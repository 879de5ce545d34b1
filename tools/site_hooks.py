"""MkDocs hooks: pages link to files outside ``docs/`` as they do in the repository, and the site holds them.

A linked Markdown file becomes a page of the site, a linked data file is copied, and a link to source code
becomes plain text. A link to a file that does not exist stays as it is, so that ``mkdocs build --strict``
refuses it. Knows nothing of what the pages say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
DATA = (".json", ".svg", ".csv")
AT_THE_ROOT = {"Contributing": "CONTRIBUTING.md", "Changelog": "CHANGELOG.md"}
"""Pages that live at the root of the repository, by their title in the navigation."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages at the root of the repository to the navigation."""
    root = Path(config.docs_dir).parent
    there = [{title: name} for title, name in AT_THE_ROOT.items() if (root / name).is_file()]
    config.nav = [*(config.nav or []), {"The project": there}] if there else config.nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside ``docs/`` and is linked from a page, or belongs into the navigation."""
    root = Path(config.docs_dir).parent
    wanted = {name for name in AT_THE_ROOT.values() if (root / name).is_file()}
    for page in files.documentation_pages():
        wanted |= set(_outside(page.content_string, f"docs/{page.src_uri}"))
    for name in sorted(wanted):
        source = root / name
        if source.is_file() and source.suffix == ".md":
            text = _rewritten(source.read_text(encoding="utf-8"), name, root)
            files.append(File.generated(config, name, content=text))
        elif source.is_file() and source.suffix in DATA:
            files.append(File.generated(config, name, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave ``docs/`` lead to where the site holds what they mean."""
    if page.file.generated_by is not None:
        return markdown
    return _rewritten(markdown, f"docs/{page.file.src_uri}", Path(config.docs_dir).parent)


def _outside(markdown: str, page: str) -> Iterator[str]:
    """The files outside ``docs/`` that a page links to, as paths from the root of the repository."""
    for _, target, _ in LINK.findall(markdown):
        path = _from_root(target, page)
        if not path.startswith("docs/"):
            yield path


def _from_root(target: str, page: str) -> str:
    return normpath(PurePosixPath(page).parent / target)


def _rewritten(markdown: str, page: str, root: Path) -> str:
    """The text of a page, given by its path from the root, with links as the site needs them."""
    here = PurePosixPath(page.removeprefix("docs/")).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = _from_root(target, page)
        if not (root / path).exists():
            return match[0]
        if path.startswith("docs/") or path.endswith((".md", *DATA)):
            return f"[{text}]({relpath(path.removeprefix('docs/'), here)}{anchor})"
        return text

    return LINK.sub(link, markdown)
