"""A folder on an HTTPS server as a store, by the standard library: proxies and certificates are the system's.

A redirect is followed to the same host alone, by HTTPS.  Nothing that identifies the user is sent.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import IO, Any

from merged_lora.errors import FetchError, ForbiddenError
from merged_lora.locations import Location

from .files import Remote, TransientError

CHUNK = 1 << 20
MAX_REDIRECTS = 5

_CONTENT = (200, 206)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_DENIED = (401, 403, 407)
_GONE = (404, 410)


class HttpsStore:
    """The files in a folder of a server.

    location: the folder.
    patience: seconds without a byte after which a connection is given up.
    """

    def __init__(self, location: Location, patience: float) -> None:
        self._location = location
        self._patience = patience
        self._url = f"https://{location.place}/{urllib.parse.quote(location.folder)}"
        self._opener = urllib.request.build_opener(_SameHost(location))

    def find(self, name: str) -> Remote | None:
        """The file of this name; None if there is none."""
        try:
            with closing(self._open("HEAD", name, {})) as reply:
                return self._described(name, reply.headers)
        except urllib.error.HTTPError as error:
            if error.code in _GONE:
                return None
            raise self._refusal(name, error) from None

    def read(self, name: str, remote: Remote, start: int) -> Iterator[bytes]:
        """The content of a file from byte ``start`` on; raises FetchError if it is not that file any more."""
        wanted = {"Range": f"bytes={start}-"} if start else {}
        if remote.tag.startswith('"'):
            wanted["If-Match"] = remote.tag
        try:
            reply = self._open("GET", name, wanted)
        except urllib.error.HTTPError as error:
            if error.code in (*_GONE, 412, 416):
                raise self._changed(name) from None
            raise self._refusal(name, error) from None
        with closing(reply):
            ranged = reply.status == http.client.PARTIAL_CONTENT
            if (
                _tag(reply.headers) != remote.tag
                or _size(reply.headers, start if ranged else 0) != remote.size
            ):
                raise self._changed(name)
            skipped = start if not ranged else 0  # of a server that knows no ranges
            while chunk := self._chunk(reply):
                yield chunk[skipped:]
                skipped = max(0, skipped - len(chunk))

    def _chunk(self, reply: Any) -> bytes:
        try:
            chunk: bytes = reply.read1(CHUNK)
            return chunk
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(_reason(error)) from None

    def _open(self, method: str, name: str, headers: Mapping[str, str]) -> Any:
        url = f"{self._url.rstrip('/')}/{urllib.parse.quote(name)}"
        request = urllib.request.Request(url, None, {"Accept-Encoding": "identity", **headers}, method=method)
        try:
            reply = self._opener.open(request, timeout=self._patience)
        except urllib.error.HTTPError as error:
            if error.code in _RETRIED:
                raise TransientError(f"status {error.code}") from None
            raise
        except urllib.error.URLError as error:
            if lasting := _lasting(error.reason):
                raise FetchError(f"{self._location}: {lasting}") from None
            raise TransientError(_reason(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(_reason(error)) from None
        except ValueError:  # of urllib, which takes the address apart
            raise FetchError(f"{self._location}: {name} is redirected to what is no address") from None
        if reply.status not in _CONTENT:
            reply.close()
            raise FetchError(f"{self._location}: the server answers status {reply.status} for {name}")
        return reply

    def _described(self, name: str, headers: Any) -> Remote:
        size = _size(headers, 0)
        if size is None or headers.get("Content-Encoding", "identity") != "identity":
            raise FetchError(f"{self._location}: the server does not say how many bytes {name} has")
        return Remote(size, _tag(headers))

    def _changed(self, name: str) -> FetchError:
        return FetchError(f"{self._location}: {name} changed while it was fetched; fetch it again")

    def _refusal(self, name: str, error: urllib.error.HTTPError) -> ForbiddenError | FetchError:
        if error.code in _DENIED:
            return ForbiddenError(
                f"{self._location}: the server denies access to {name} (status {error.code})"
            )
        return FetchError(f"{self._location}: the server answers status {error.code} for {name}")


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same host by HTTPS; raises FetchError for any other."""

    max_redirections = MAX_REDIRECTS

    def __init__(self, location: Location) -> None:
        self._location = location

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        there = urllib.parse.urlsplit(newurl)
        user, _, host = there.netloc.lower().rpartition("@")
        if host != self._location.place:
            raise FetchError(
                f"{self._location}: redirected to another host, {host[:253]!r}; "
                "name the place where it is kept"
            )
        if there.scheme != "https" or user:
            what = "with credentials" if user else f"by {there.scheme}:"
            raise FetchError(
                f"{self._location}: redirected to the same host {what}; files are fetched by https: alone, "
                "without credentials"
            )
        request = urllib.request.Request(newurl, None, dict(req.header_items()), method=req.get_method())
        request.remove_header("Host")
        return request


def _tag(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _size(headers: Any, start: int) -> int | None:
    """The size of the whole file by a reply whose content begins at a byte; None if it does not say."""
    try:
        if not start:
            size = int(headers["Content-Length"])
            return size if size >= 0 else None
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
        return int(match[3]) if match and int(match[1]) == start else None
    except (TypeError, ValueError):
        return None


def _lasting(error: object) -> str:
    """What another try would not mend, with the way out; empty for what it may."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate is not valid ({error.verify_message}); for an authority of your own, "
            "set SSL_CERT_FILE"
        )
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return "there is no host of that name"
    return ""


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "it stopped sending"
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__
