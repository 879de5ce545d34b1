"""A blank figure, and how one is written to a file."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from merged_lora.errors import MergeError
from merged_lora.scratch import in_place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_UNDATED: dict[str, dict[str, str | None]] = {
    ".png": {},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None},
}
"""Metadata by which the same figure makes the same file."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure, completely or not at all; raises MergeError.

    path: the file, which is replaced; its ending is one of FORMATS.
    """
    from matplotlib import rc_context

    check_path(path)
    try:
        with (
            in_place_of(path) as scratch,
            rc_context({"svg.hashsalt": "merged-lora", "svg.fonttype": "none"}),
        ):
            figure.savefig(scratch, format=path.suffix[1:], dpi=150, metadata=_UNDATED[path.suffix])
    except OSError as error:
        raise MergeError(f"cannot write {path}: {error.strerror or error}") from None


def check_path(path: Path) -> None:
    """Raise MergeError for a file that no figure can be written to, and without matplotlib."""
    if path.suffix not in FORMATS:
        raise MergeError(f"{path}: a plot is written as {', '.join(FORMATS)}; end the name with one of these")
    if not path.parent.is_dir():
        raise MergeError(f"cannot write {path}: {path.parent} is no folder")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise MergeError(f"cannot write {path}: {'a folder' if path.is_dir() else 'no permission'}")
    blank(1.0, 1.0)


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches, which no window shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MergeError(
            f"plots need matplotlib, which cannot be imported ({error}): pip install 'vllm-merged-lora[plot]'"
        ) from None

    class Shown(Figure):
        """A figure that a notebook shows, although no window of matplotlib's knows of it."""

        def _repr_svg_(self) -> str:
            written = StringIO()
            self.savefig(written, format="svg")
            return written.getvalue()

    return Shown(figsize=(width, height), layout="constrained")
