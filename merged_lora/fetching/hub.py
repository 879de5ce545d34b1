"""A repository on the Hugging Face Hub, by huggingface_hub: with its cache, token and offline mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merged_lora.errors import FetchError, ForbiddenError, MergeError, NotFoundError
from merged_lora.files.layout import CONFIG_NAME
from merged_lora.locations import Location

from .cloud import missing
from .files import Bound, Remote, Report, choose
from .transfer import Pace, full


def fetch(location: Location, bound: Bound, report: Report, offline: bool) -> Path:
    """The folder of an adapter in huggingface_hub's cache, as it is on the hub; raises MergeError.

    location: the repository.
    bound:    on the bytes of the adapter.
    report:   called with the number of bytes that came in.
    offline:  take what is in the cache, without a look at the hub, as HF_HUB_OFFLINE does.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise missing("hub", error) from None
    repository = _Repository(location, report)
    with _one_line(location):
        if offline or constants.HF_HUB_OFFLINE:
            try:
                chosen = choose(
                    location, repository.cached, lambda name, _: repository.take_cached(name), bound
                )
            except NotFoundError:
                raise FetchError(
                    f"{location}: not complete in the cache {constants.HF_HUB_CACHE}, and the hub may not be "
                    "asked; leave out HF_HUB_OFFLINE and MERGED_LORA_OFFLINE"
                ) from None
            paths = [repository.take_cached(name) for name in chosen]
        else:
            repository.look()
            chosen = choose(location, repository.find, repository.take, bound)
            paths = [repository.take(name, remote) for name, remote in chosen.items()]
    return paths[0].parent


class _Repository:
    """The files in a folder of a repository."""

    def __init__(self, location: Location, report: Report) -> None:
        self._location = location
        self._revision = location.revision
        self._counter = _counter(location, report)
        self._files: Mapping[str, Remote] = {}

    def look(self) -> None:
        """Learn from the hub which commit is meant, and which files it has."""
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        info = HfApi().model_info(
            self._location.place, revision=self._revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT
        )
        if info.id.lower() != self._location.place.lower():
            raise NotFoundError(f"{self._location}: this repository is called {info.id!r}; name that one")
        if not info.sha:
            raise FetchError(f"{self._location}: the hub does not say which commit this is")
        self._revision = info.sha
        self._files = {each.rfilename: _remote(each) for each in info.siblings or () if each.size is not None}

    def find(self, name: str) -> Remote | None:
        """The file of this name on the hub; None if there is none."""
        return self._files.get(self._path(name))

    def take(self, name: str, remote: Remote) -> Path:
        """A file in the cache; unless it is there, it is brought there and checked."""
        known = self.cached(name) is not None
        if name == CONFIG_NAME and self._revision != self._location.revision:
            # By the name of the branch, so that the cache knows it when the hub may not be asked.
            self._download(name, self._location.revision)
        path = self._download(name, self._revision)
        problem = _problem(path, remote, whole=not known)
        if problem:
            for file in (path.resolve(), path):
                file.unlink(missing_ok=True)
            raise FetchError(f"{self._location}: {name} came in with {problem}; fetch it again")
        return path

    def _download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        path = self._path(name)
        return Path(hf_hub_download(self._location.place, path, revision=revision, tqdm_class=self._counter))

    def cached(self, name: str) -> Remote | None:
        """The file of this name in the cache; None if there is none."""
        path = self._cached_path(name)
        return Remote(path.stat().st_size, "") if path is not None else None

    def take_cached(self, name: str) -> Path:
        """A file that is in the cache."""
        path = self._cached_path(name)
        if path is None:
            raise FetchError(f"{self._location}: {name} has vanished from the cache")
        return path

    def _cached_path(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self._location.place, self._path(name), revision=self._revision)
        return Path(found) if isinstance(found, str) else None

    def _path(self, name: str) -> str:
        return f"{self._location.folder}/{name}" if self._location.folder else name


def _remote(sibling: Any) -> Remote:
    digest = ("sha256", sibling.lfs.sha256) if sibling.lfs is not None else None
    return Remote(sibling.size, sibling.blob_id or "", digest)


def _problem(path: Path, remote: Remote, whole: bool) -> str:
    """How a file differs from what the hub states; empty if it does not.

    whole: read it, and not only its size.
    """
    if path.stat().st_size != remote.size:
        return f"{path.stat().st_size} bytes instead of the {remote.size} that the hub states"
    if whole and remote.digest is not None:
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != remote.digest[1]:
                return "another SHA-256 than the hub states"
    return ""


def _counter(location: Location, report: Report) -> type[Any]:
    """A class for huggingface_hub's progress bars that shows none, reports bytes, and ends what stalls."""
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.pace = Pace(location)
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            report(int(n or 0))
            self.pace.count(int(n or 0))

    return Counter


@contextmanager
def _one_line(location: Location) -> Iterator[None]:
    """Turn what huggingface_hub raises into a MergeError."""
    from huggingface_hub import errors

    known: list[tuple[type[Exception], Callable[[Any], MergeError]]] = [
        (MergeError, lambda error: error),
        (
            errors.GatedRepoError,
            lambda error: ForbiddenError(
                f"{location}: the repository is gated; ask for access on its page and log in (hf auth login) "
                "or set HF_TOKEN"
            ),
        ),
        (errors.DisabledRepoError, lambda error: ForbiddenError(f"{location}: the repository was disabled")),
        (errors.RevisionNotFoundError, lambda error: NotFoundError(f"{location}: there is no such revision")),
        (errors.RepositoryNotFoundError, lambda error: _absent(location)),
        (errors.HfHubHTTPError, lambda error: _answered(location, error)),
        (
            errors.LocalEntryNotFoundError,
            lambda error: FetchError(f"{location}: the hub cannot be reached; try again later"),
        ),
        (
            getattr(errors, "HTTPError", errors.HfHubHTTPError),
            lambda error: FetchError(
                f"{location}: the hub does not answer ({type(error).__name__}); try again later, or set "
                "HF_HUB_OFFLINE=1 to take what is in the cache"
            ),
        ),
        (OSError, lambda error: _on_disk(location, error)),
        (
            Exception,  # what its parsers raise for an answer that is not the hub's
            lambda error: FetchError(f"{location}: the hub's answer makes no sense ({type(error).__name__})"),
        ),
    ]
    try:
        yield
    except Exception as error:
        raise next(make(error) for kind, make in known if isinstance(error, kind)) from None


def _absent(location: Location) -> NotFoundError:
    return NotFoundError(
        f"{location}: there is no such repository on the hub, or it is private and needs a token (HF_TOKEN); "
        "if a folder is meant, there is none of that name"
    )


def _answered(location: Location, error: Any) -> MergeError:
    status = error.response.status_code
    if status in (401, 403):
        return ForbiddenError(f"{location}: the hub denies access (status {status}); log in or set HF_TOKEN")
    if status == 404:
        return NotFoundError(f"{location}: there is no such thing on the hub")
    return FetchError(f"{location}: the hub answers status {status}; try again later")


def _on_disk(location: Location, error: OSError) -> FetchError:
    if error.errno is not None:
        return full(location, error)
    text = ""
    with suppress(IndexError):
        text = str(error).splitlines()[0][:256]
    return FetchError(f"{location}: {text or type(error).__name__}")
