"""The vLLM that is installed, held beside the releases that the plugin is for.

Imports nothing that the hooks need, because other releases may lack it.
"""

from __future__ import annotations

from pathlib import Path

import vllm
from packaging.version import InvalidVersion, Version

from merged_lora.errors import MergeError
from merged_lora.vllm_plugin.releases import KNOWN_BAD, TESTED, minor

from . import reliance

SHOWN = 5  # of the names that read differently


def installed() -> Version | None:
    """The release, None where a build from source does not say which it is."""
    try:
        return Version(vllm.__version__)
    except InvalidVersion:
        return None


def refusals() -> list[str]:
    """Why the plugin stays off on this release, whatever its functions look like; empty where it does not."""
    release = installed()
    if release is not None and release < Version(TESTED[0]):
        return [f"vLLM {release} is older than {TESTED[0]}, the first release that it works with"]
    reason = KNOWN_BAD.get(release.base_version) if release is not None else None
    return [f"vLLM {release} is known not to work with it: {reason}"] if reason else []


def since(choices: dict[str, str]) -> str:
    """Of values by the release with which each began, the one for the release that is installed."""
    release = installed()
    begun = [r for r in choices if release is None or Version(r) <= release]
    return choices[max(begun or choices, key=Version)]


def difference() -> str:
    """What reads differently here than in the tested releases, in one line; empty where nothing does."""
    names = reliance.changed(reliance.read(Path(vllm.__file__).parent), reliance.recorded())
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"in vLLM {vllm.__version__}, {len(names)} of the functions that merged-lora relies on read otherwise"
        f" than in the releases that it was tested on ({', '.join(TESTED)}): {', '.join(names[:SHOWN])}{more}"
    )


def check_tested() -> None:
    """Raise MergeError unless this release was tested and reads as it did then."""
    release = installed()
    if release is None or minor(release.base_version) not in map(minor, TESTED):
        raise MergeError(
            f"--merged-lora-vllm tested: vLLM {vllm.__version__} is none of the tested releases "
            f"({', '.join(TESTED)}); install one of them, or leave the flag out"
        )
    changes = difference()
    if changes:
        raise MergeError(f"--merged-lora-vllm tested: {changes}")
