"""The installed release of vLLM, compared with the releases that the plugin is for.

Imports nothing that the hooks need, because another release may not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import vllm
from packaging.version import InvalidVersion, Version

from merged_lora.errors import MergeError
from merged_lora.vllm_plugin.releases import KNOWN_BAD, TESTED, minor

from . import reliance

SHOWN = 5
"""Number of changed functions that a message names."""

Choice = TypeVar("Choice")


def installed() -> Version | None:
    """The installed release; None if a build from source does not say which it is."""
    try:
        return Version(vllm.__version__)
    except InvalidVersion:
        return None


def refusals() -> list[str]:
    """Why the plugin stays off on this release, whatever its functions look like; empty if it does not."""
    release = installed()
    if release is not None and release < Version(TESTED[0]):
        return [f"vLLM {release} is older than {TESTED[0]}, the first release that it works with"]
    reason = KNOWN_BAD.get(release.base_version) if release is not None else None
    return [f"vLLM {release} is known not to work with it: {reason}"] if reason else []


def since(choices: Mapping[str, Choice]) -> Choice:
    """The value for the release that is installed.  Everything that depends on a release asks here.

    choices: values, each by the first release that it is for, such as ``{"0.30": False, "0.31": True}``.

    A build from source that does not say its release gets the last value.
    """
    release = installed()
    begun = [r for r in choices if release is None or Version(r) <= Version(release.base_version)]
    return choices[max(begun or choices, key=Version)]


def named(module: ModuleType, name: str) -> Any:
    """A module's attribute, looked up by a name that depends on the release.

    Raises ImportError if the module does not have it, as ``from module import name`` does, so that the
    plugin stays off.
    """
    if name not in vars(module):
        raise ImportError(f"{module.__name__}.{name} is missing", name=module.__name__)
    return vars(module)[name]


def difference() -> str:
    """One line about what differs from the tested releases; empty if nothing does."""
    names = reliance.changed(reliance.read(Path(vllm.__file__).parent), reliance.recorded())
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"in vLLM {vllm.__version__}, {len(names)} of the functions that merged-lora relies on differ from "
        f"those in the tested releases ({', '.join(TESTED)}): {', '.join(names[:SHOWN])}{more}"
    )


def check_tested() -> None:
    """Raise MergeError unless this release was tested and its source is unchanged since."""
    release = installed()
    if release is None or minor(release.base_version) not in map(minor, TESTED):
        raise MergeError(
            f"--merged-lora-vllm tested: vLLM {vllm.__version__} is not one of the tested releases "
            f"({', '.join(TESTED)}); install one of them, or leave the flag out"
        )
    changes = difference()
    if changes:
        raise MergeError(f"--merged-lora-vllm tested: {changes}")
