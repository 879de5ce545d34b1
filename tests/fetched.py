"""Servers that hold adapters, one of each kind, and caches of a test's own.

pytest's ``pythonpath`` holds this folder: ``from fetched import https_site``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from merged_lora.fetching import transfer
from stand_ins import GoogleStorage, Hub, Server, certified, closed_after

KINDS = ("https", "s3", "gs", "hf")


@dataclass
class Site:
    """A server that has adapters, whatever it speaks.

    location: text that names the adapter in a folder.
    place:    path of that folder on the server.
    """

    server: Server
    location: Callable[[str], str]
    place: Callable[[str], str]

    def put(self, name: str, folder: Path) -> str:
        """Serve an adapter; returns its location."""
        self.server.add(self.place(name), folder)
        return self.location(name)


def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, in a new folder as the hub's is; no pause before a new try, no setting of the machine."""
    from huggingface_hub import constants

    monkeypatch.setenv("MERGED_LORA_CACHE", str(tmp_path / "cache"))
    for name in ("MERGED_LORA_CACHE_GIB", "MERGED_LORA_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "PAUSE", 0.001)
    return tmp_path / "cache"


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon what stalls.  A busy machine then asks again for what did not: nothing may be counted."""
    monkeypatch.setattr(transfer, "PATIENCE", 0.5)


@contextmanager
def https_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    context, authority = certified(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with closed_after(Server(context)) as server:
        yield Site(server, lambda name: f"https://{server.host}/x/{name}", lambda name: f"/x/{name}")


@contextmanager
def s3_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with closed_after(Server()) as server:
        speak_s3(monkeypatch, f"http://{server.host}")
        yield Site(server, lambda name: f"s3://bucket/{name}", lambda name: f"/bucket/{name}")


def speak_s3(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let a server be S3."""
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@contextmanager
def gs_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    pytest.importorskip("gcsfs")
    with closed_after(GoogleStorage()) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield Site(server, lambda name: f"gs://bucket/{name}", lambda name: f"/bucket/{name}")


@contextmanager
def hf_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    from huggingface_hub import constants

    with closed_after(Hub()) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield Site(server, lambda name: f"hf:org/{name}", lambda name: f"/org/{name}")
