"""A folder in a bucket as a store, by fsspec's drivers s3fs and gcsfs, with their own settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from inspect import unwrap
from types import MethodType
from typing import Any, TypeVar

from merged_lora.errors import FetchError, ForbiddenError, MergeError
from merged_lora.locations import Location

from .files import Remote, TransientError

CHUNK = 8 << 20
CONNECTING = 10.0
"""Seconds for a connection."""

Reply = TypeVar("Reply")


class BucketStore:
    """The files in a folder of a bucket.

    location: the folder.
    patience: seconds after which an answer, or a part of a file, does not come any more.

    Raises FetchError if the driver is not installed.
    """

    def __init__(self, location: Location, patience: float) -> None:
        self._location = location
        self._patience = patience

    def find(self, name: str) -> Remote | None:
        """The file of this name; None if there is none."""
        return self._asked(name, self._head, self._key(name))

    def read(self, name: str, remote: Remote, start: int) -> Iterator[bytes]:
        """The content of a file from byte ``start`` on; raises FetchError if it is not that file any more."""
        while start < remote.size:
            end = min(start + CHUNK, remote.size)
            chunk = self._asked(name, self._part, self._key(name), remote, start, end)
            if chunk is None:
                raise FetchError(f"{self._location}: {name} changed while it was fetched; fetch it again")
            yield chunk
            start += len(chunk)

    async def _head(self, key: str) -> Remote | None:
        raise NotImplementedError

    async def _part(self, key: str, remote: Remote, start: int, end: int) -> bytes | None:
        """Bytes of a file; None if it is not the one that was described any more."""
        raise NotImplementedError

    def _key(self, name: str) -> str:
        return f"{self._location.folder}/{name}" if self._location.folder else name

    def _asked(self, name: str, ask: Callable[..., Coroutine[Any, Any, Reply]], *arguments: object) -> Reply:
        from fsspec.asyn import get_loop

        asked = asyncio.run_coroutine_threadsafe(
            asyncio.wait_for(ask(*arguments), self._patience), get_loop()
        )
        try:
            return asked.result()
        except MergeError:
            raise
        except TimeoutError:
            raise TransientError("it does not answer") from None
        except Exception as error:  # of three libraries, which raise whatever they like
            if isinstance(error, PermissionError) or _status(error) in (401, 403):
                raise ForbiddenError(
                    f"{self._location}: access to {name} is denied ({_line(error)})"
                ) from None
            if "Credentials" in type(error).__name__:
                raise ForbiddenError(f"{self._location}: there are no credentials ({_line(error)})") from None
            raise TransientError(_line(error)) from None
        finally:
            asked.cancel()


class S3Store(BucketStore):
    """The files in a folder of a bucket in S3, or in a server that speaks its protocol."""

    def __init__(self, location: Location, patience: float) -> None:
        super().__init__(location, patience)
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise missing("s3", error) from None
        waits = {
            "connect_timeout": CONNECTING,
            "read_timeout": patience,
            "retries": {"total_max_attempts": 1},
        }
        self._files = S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=waits)
        self._files.retries = 1  # the transfer itself is tried again

    async def _head(self, key: str) -> Remote | None:
        try:
            found = await self._files._call_s3("head_object", Bucket=self._location.place, Key=key)
        except FileNotFoundError:
            return None
        return Remote(found["ContentLength"], found.get("ETag", ""))

    async def _part(self, key: str, remote: Remote, start: int, end: int) -> bytes | None:
        wanted = {"IfMatch": remote.tag} if remote.tag else {}
        try:
            reply = await self._files._call_s3(
                "get_object", Bucket=self._location.place, Key=key, Range=f"bytes={start}-{end - 1}", **wanted
            )
        except FileNotFoundError:
            return None
        except OSError as error:
            if _status(error) in (412, 416):
                return None
            raise
        async with reply["Body"] as body:
            data: bytes = await body.read()
        found = reply.get("ETag", ""), reply.get("ContentRange", "").rpartition("/")[2]
        return data if len(data) == end - start and found == (remote.tag, str(remote.size)) else None


class GcsStore(BucketStore):
    """The files in a folder of a bucket in Google Cloud Storage."""

    def __init__(self, location: Location, patience: float) -> None:
        super().__init__(location, patience)
        try:
            from gcsfs.core import GCSFileSystem
        except ImportError as error:
            raise missing("gs", error) from None
        self._files = GCSFileSystem(
            skip_instance_cache=True, use_listings_cache=False, access="read_only", requests_timeout=patience
        )
        once = unwrap(GCSFileSystem._request)  # without six tries and their pauses
        self._files._request = MethodType(once, self._files)  # the transfer itself is tried again

    async def _head(self, key: str) -> Remote | None:
        from base64 import b64decode

        try:
            found = await self._files._info(f"{self._location.place}/{key}")
        except FileNotFoundError:
            return None
        if found["type"] != "file":
            return None
        md5 = found.get("md5Hash")
        digest = ("md5", b64decode(md5).hex()) if md5 else None
        return Remote(int(found["size"]), str(found["generation"]), digest)

    async def _part(self, key: str, remote: Remote, start: int, end: int) -> bytes | None:
        path = f"{self._location.place}/{key}"
        try:
            data: bytes = await self._files._cat_file(path, start=start, end=end, generation=remote.tag)
        except FileNotFoundError:  # a generation that was overwritten and is not kept
            return None
        return data if len(data) == end - start else None


def missing(extra: str, error: ImportError) -> FetchError:
    """What to install for a kind of location."""
    return FetchError(
        f"{extra} locations need a library that is not installed ({error}); "
        f"pip install 'vllm-merged-lora[{extra}]'"
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of s3fs or gcsfs; None if it holds none."""
    if str(error).startswith("Forbidden"):  # all that gcsfs says of 403
        return 403
    reply = getattr(error.__cause__, "response", None) or {}
    found = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", getattr(error, "code", None))
    return int(found) if isinstance(found, int | str) and str(found).isdecimal() else None


def _line(error: BaseException) -> str:
    """What an error says; of a fault of the server its status, to which its words add nothing."""
    status = _status(error)
    if status is not None and status >= 500:
        return f"status {status}"
    text = " ".join(str(error).split())
    return text[:256] or type(error).__name__
