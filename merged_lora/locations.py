"""The places of adapters: from a text to a folder here, or to a place on the hub, in a store, on a server.

    path/to/folder                a folder; also whatever begins with ".", "/" or "~", or exists
    org/repo[@revision][/folder]  a repository on the hub, unless a path org exists here
    hf:org/repo[@revision][/folder]
    s3://bucket/folder            also gs://
    https://host/folder

Knows nothing of networks, and of disks only which paths exist.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal

from .errors import AdapterError

MAX_LOCATION = 1024
SCHEMES = ("hf:", "s3://", "gs://", "https://")
HUBS = ("huggingface.co", "www.huggingface.co", "hf.co")
FILES = ("adapter_model.safetensors", "adapter_config.json")
"""Files of an adapter, whose location is taken for that of their folder."""

_OTHERS = {"http": "https", "gcs": "gs", "s3a": "s3"}
"""Schemes that others use, with the one that is meant."""
_SCHEME = re.compile(r"hf:|[A-Za-z][A-Za-z0-9+.-]*://")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}))?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")
_HOST = re.compile(
    r"(?:[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*|\[(?P<v6>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{1,5}))?"
)
_UNFIT = re.compile(r"[?#%*\\]")


@dataclass(frozen=True)
class Location:
    """A folder that has to be fetched; ``str`` is the one text for it.

    kind:     ``hf``, ``s3``, ``gs`` or ``https``.
    place:    the repository, bucket or host.
    folder:   the path in there, without slashes at its ends; may be empty.
    revision: branch, tag or commit of a repository; None for its default branch.
    """

    kind: Literal["hf", "s3", "gs", "https"]
    place: str
    folder: str = ""
    revision: str | None = None

    @property
    def unpinned(self) -> str:
        """The text for it without the revision."""
        scheme = "hf:" if self.kind == "hf" else f"{self.kind}://"
        return f"{scheme}{self.place}" + (f"/{self.folder}" if self.folder else "")

    def __str__(self) -> str:
        if self.revision is None:
            return self.unpinned
        return f"hf:{self.place}@{self.revision}" + (f"/{self.folder}" if self.folder else "")


@dataclass(frozen=True)
class Pattern:
    """Locations that an operator allows: one of them, or all that begin alike.

    text: a location, or the beginning of one that ends in ``/*``; ``hf:*`` is the whole hub.  The default
          branch alone is meant by it, unless ``@*`` follows.

    Raises ValueError, whose message starts with "must be", for any other text, for one that does not name
    its bucket or host, and for one that is not written as locations are.
    """

    text: str

    def __post_init__(self) -> None:
        stem = self.text.removesuffix("@*")
        if stem != self.text and not stem.startswith("hf:"):
            raise ValueError("must be a location without @*, except for hf:")
        try:
            if stem == "hf:*":
                return
            if re.fullmatch(rf"hf:{_PART}/\*", stem):
                stem = stem.replace("*", "any")
            location = parse(stem.removesuffix("/*"))
            if location.revision and stem != self.text:
                raise AdapterError("")
        except AdapterError:
            meant = _other_scheme(self.text)
            raise ValueError(
                f"must be written {meant}"
                if meant
                else "must be a location, such as hf:org/repo, or the beginning of one with a * behind its "
                "last slash, such as hf:org/*, s3://bucket/adapters/* or https://host/*"
            ) from None
        if str(location) != stem.removesuffix("/*"):
            raise ValueError(f"must be written {location}{stem[len(stem.removesuffix('/*')) :]}")

    def allows(self, location: Location) -> bool:
        """Whether it means this location."""
        stem = self.text.removesuffix("@*")
        text = str(location) if stem == self.text else location.unpinned
        if text != location.unpinned and "@" not in stem:
            return False
        return text.startswith(stem[:-1]) if stem.endswith("*") else text == stem


def locate(text: str | os.PathLike[str]) -> Location | Path:
    """A folder here, or a location from which an adapter has to be fetched.

    text: a location, or a path; an object that is not text is always a path.

    A text with a scheme, such as ``hf:``, is never a path.  Any other is a path if it begins like one, if
    something of the name of its first part exists, or if it cannot name a repository.  A ``~`` in front is
    the folder of a user, as in a shell.  Raises AdapterError.
    """
    check_path(text)
    if not isinstance(text, str):
        return Path(text)
    if _SCHEME.match(text):
        return parse(text)
    path = Path(text)
    if text.startswith("~"):
        with suppress(RuntimeError):  # no such user
            path = path.expanduser()
        return path
    if text.startswith((".", "/")) or os.path.lexists(path.parts[0] if path.parts else path):
        return path
    return parse(f"hf:{text}") if _is_repository(text) else path


def check_path(path: object) -> None:
    """Raise AdapterError for what names no place: neither text nor a path, empty, or with a NUL character."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise AdapterError(f"an adapter's path is text or a Path, not {type(path).__name__}")
    if not text or "\0" in text:
        raise AdapterError(f"an adapter's path {'holds a NUL character' if text else 'is empty'}")


def parse(text: str) -> Location:
    """The location that a text with a scheme names; raises AdapterError, which shows no credentials."""
    if len(text) > MAX_LOCATION:
        raise AdapterError(f"a location has at most {MAX_LOCATION} characters, this one {len(text)}")
    if not text.isprintable():
        raise AdapterError(f"location {shown(text)!a} holds a control character or an invisible one")
    scheme = next((scheme for scheme in SCHEMES if text.startswith(scheme)), None)
    if scheme is None:
        meant = _other_scheme(text)
        hint = f"; write {meant}" if meant else ""
        raise AdapterError(
            f"location {shown(text)!r}: adapters are fetched from {', '.join(SCHEMES)} alone{hint}"
        )
    rest = text.removeprefix(scheme)
    if scheme == "hf:":
        return _on_the_hub(text, rest)
    place, _, folder = rest.partition("/")
    if scheme == "https://":
        place = _host(text, place)
    elif not _BUCKET.fullmatch(place):
        raise AdapterError(
            f"location {shown(text)!r} names no bucket; the name of one has 2 to 222 characters of a-z, "
            "0-9, '.', '_' and '-'"
        )
    return Location(scheme.removesuffix("://"), place, _folder(text, folder))  # type: ignore[arg-type]


def shown(text: str) -> str:
    """A location as a message may show it: without a name, password or query, of at most 256 characters."""
    without = re.sub(r"//[^/]*@", "//...@", re.sub(r"[?#].*", "?...", text, flags=re.DOTALL))
    return without if len(without) <= 256 else without[:253] + "..."


def location_hint(name: str) -> str:
    """What to write if a name that nothing has was meant as a location; empty if it cannot be one."""
    meant = _other_scheme(name)
    return f"; if a location is meant, write {meant}" if meant else hub_hint(Path(name))


def _other_scheme(text: str) -> str:
    """A location in another spelling of its scheme, such as ``HTTPS://``, as it is written here; or empty."""
    scheme, colon, rest = text.partition(":")
    meant = _OTHERS.get(scheme.lower(), scheme.lower()) + colon + rest
    return shown(meant) if meant != text and meant.startswith(SCHEMES) else ""


def hub_hint(path: Path) -> str:
    """What to write if a path that does not exist was meant as a repository; empty if it cannot be one."""
    text = path.as_posix()
    return f"; for the repository of that name on the hub, write hf:{text}" if _is_repository(text) else ""


def _is_repository(text: str) -> bool:
    try:
        parse(f"hf:{text}")
    except AdapterError:
        return False
    return True


def _on_the_hub(text: str, rest: str) -> Location:
    found = _REPO.match(rest)
    behind = rest[found.end() :] if found else ""
    unfit = found is None or (behind and not behind.startswith("/")) or found["revision"] == "refs"
    if found is None or unfit or re.search(r"--|\.\.", found["repo"]):
        raise AdapterError(
            f"location {shown(text)!r} is not of the form hf:org/repo[@revision][/folder]; a revision with a "
            "slash in its name is named by its commit"
        )
    return Location("hf", found["repo"], _folder(text, behind.removeprefix("/")), found["revision"])


def _host(text: str, place: str) -> str:
    if "@" in place:
        raise AdapterError(f"location {shown(text)!r} holds credentials, which would end up in logs")
    found = _HOST.fullmatch(place)
    if found is None or (found["v6"] and not _is_ipv6(found["v6"])):
        raise AdapterError(f"location {shown(text)!r} names no host")
    if not 0 < int(found["port"] or 443) < 1 << 16:
        raise AdapterError(f"location {shown(text)!r}: a port is a number from 1 to 65535")
    if place.lower() in HUBS:
        raise AdapterError(f"location {shown(text)!r} is on the hub; write hf:org/repo")
    return place.lower().removesuffix(":443")


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _folder(text: str, folder: str) -> str:
    """The path in a place, checked; that of a file of an adapter is the folder's."""
    parts = folder.removesuffix("/").split("/") if folder else []
    if any(part in ("", ".", "..") for part in parts):
        raise AdapterError(f"location {shown(text)!r} holds an empty part, '.' or '..'")
    unfit = _UNFIT.search(folder)
    if unfit:
        raise AdapterError(
            f"location {shown(text)!r} holds {unfit[0]!r}; write names as they are, and without a query"
        )
    return "/".join(parts[:-1] if parts and parts[-1] in FILES else parts)
