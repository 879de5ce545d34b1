"""Writes a file completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_place_of(file: Path) -> Iterator[Path]:
    """A name beside a file; what the block writes there takes the file's place when it ends; raises OSError.

    A block that fails leaves the file as it was, and nothing beside it.
    """
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        yield scratch
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
