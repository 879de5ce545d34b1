"""The libraries that fetching needs, by the kind of location.  They are looked for, and not imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from merged_lora.errors import FetchError

LIBRARIES: Mapping[str, tuple[str, str]] = {
    "hf": ("huggingface_hub", "hub"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
}
"""The library for a kind of location, and the extra of this package that installs it."""


def check_library(text: str) -> None:
    """Raise FetchError, which names the extra, if the library for a location is not installed.

    text: a location, or a pattern of locations.
    """
    library, extra = LIBRARIES.get(text.partition(":")[0], ("", ""))
    if library and importlib.util.find_spec(library) is None:
        raise FetchError(
            f"{text} needs {library}, which is not installed; pip install 'vllm-merged-lora[{extra}]'"
        )
