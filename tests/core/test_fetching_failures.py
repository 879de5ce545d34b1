"""Servers that fail: each failure is one error that says what happened, and no cache holds half a file."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from fetched import Site, impatient, speak_s3
from merged_lora import Adapter
from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.errors import AdapterError, FetchError, ForbiddenError, MergeError, NotFoundError
from merged_lora.fetching.transfer import ATTEMPTS
from merged_lora.files.layout import CONFIG_NAME, WEIGHTS_NAME
from stand_ins import Answer, Asked, Hub, Server, certified, closed_after


def about(asked: Asked, name: str = WEIGHTS_NAME) -> bool:
    """Whether a request is for the content of a file."""
    described = "/b/" in asked.path and asked.query.get("alt") != "media"  # by Google
    return asked.method == "GET" and asked.path.endswith(name) and not described


def nothing_half_done(caches: Path) -> bool:
    """Whether both caches hold complete files alone."""
    blobs = [file for file in caches.parent.glob("hub/models--*/blobs/*") if file.stat().st_size > 1000]
    return not [*caches.glob("adapters/*"), *caches.glob(".m*"), *blobs]


@pytest.mark.slow
def test_a_server_that_answers_500_is_asked_again_and_then_reported(
    site: Site, adapter: Path, caches: Path
) -> None:
    location = site.put("sql", adapter)
    site.server.fault = lambda asked, answer: Answer(500)
    with pytest.raises(FetchError, match=rf"^{location}: .*status 500"):
        Adapter.load(location)
    assert len(site.server.asked) <= 2 * ATTEMPTS  # no library has attempts of its own beside these
    assert nothing_half_done(caches)


def test_a_server_that_fails_now_and_then_does_no_harm(https: Site, s3: Site, adapter: Path) -> None:
    for site in (https, s3):
        location, count = site.put("sql", adapter), iter(range(1000))

        def failing(asked: Asked, answer: Answer, count: Iterator[int] = count) -> Answer:
            return answer if next(count) % 2 else Answer(503)

        site.server.fault = failing
        assert Adapter.load(location).digest == Adapter.load(adapter).digest


@pytest.mark.slow
def test_a_server_that_stalls_is_given_up(
    https: Site, s3: Site, gs: Site, adapter: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    for site in (https, s3, gs):
        location = site.put("sql", adapter)

        def stalled(asked: Asked, answer: Answer) -> Answer:
            if about(asked):
                answer.cut, answer.stall = 100, True
            return answer

        site.server.fault = stalled
        with pytest.raises(FetchError, match=rf"{location}: {WEIGHTS_NAME} cannot be fetched"):
            Adapter.load(location)
    assert nothing_half_done(caches)


def test_a_server_that_sends_byte_by_byte_is_given_up(
    https: Site, adapter: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    location = https.put("sql", adapter)

    def dripping(asked: Asked, answer: Answer) -> Answer:
        answer.drip = 0.05 if about(asked) else 0.0
        return answer

    https.server.fault = dripping
    with pytest.raises(FetchError, match=r"it sent \d+ bytes in \d+ s"):
        Adapter.load(location)
    assert nothing_half_done(caches)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_server_that_lies_about_a_size_is_found_out(
    site: Site, adapter: Path, caches: Path, size: int
) -> None:
    location = site.put("sql", adapter)
    if isinstance(site.server, Hub):
        site.server.sizes[f"/org/sql/{WEIGHTS_NAME}"] = size
    else:
        site.server.fault = lambda asked, answer: answer if about(asked) else lying(asked, answer, size)
    with pytest.raises(FetchError, match=WEIGHTS_NAME):
        Adapter.load(location)
    assert nothing_half_done(caches)


def test_an_empty_file_is_refused_by_its_name(site: Site, adapter: Path, caches: Path) -> None:
    for name in (CALIBRATION_NAME, CONFIG_NAME):
        (adapter / name).write_bytes(b"")
        location = site.put("sql", adapter)
        with pytest.raises(AdapterError, match=rf"^{location}: {name} has 0 bytes; no file .* is empty$"):
            Adapter.load(location)
    assert nothing_half_done(caches)


@pytest.mark.parametrize("size", [-5, -100_000_000])
def test_a_size_below_zero_is_none(site: Site, adapter: Path, caches: Path, size: int) -> None:
    location = site.put("sql", adapter)
    if isinstance(site.server, Hub):
        site.server.sizes[f"/org/sql/{WEIGHTS_NAME}"] = size
    else:
        site.server.fault = lambda asked, answer: answer if about(asked) else lying(asked, answer, size)
    with pytest.raises(MergeError, match=WEIGHTS_NAME) as refused:
        Adapter.load(location)
    assert "the cache cannot be written" not in str(refused.value)
    assert nothing_half_done(caches)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [202, 204, 205])
def test_an_answer_without_the_content_is_not_taken_for_a_file(
    https: Site, adapter: Path, method: str, status: int
) -> None:
    location = https.put("sql", adapter)

    def other(asked: Asked, answer: Answer) -> Answer:
        return Answer(status, {"Content-Length": "0"}) if asked.method == method else answer

    https.server.fault = other
    with pytest.raises(
        FetchError, match=rf"^{location}: the server answers status {status} for {CONFIG_NAME}$"
    ):
        Adapter.load(location)


def lying(asked: Asked, answer: Answer, size: int) -> Answer:
    """A description of a file with another size than it has."""
    if asked.path.endswith(WEIGHTS_NAME):
        answer.headers["Content-Length"] = str(size)
        if answer.body.startswith(b"{"):  # Google's description
            answer.body = answer.body.replace(b'"size": "', f'"size": "{size}", "was": "'.encode())
            answer.headers["Content-Length"] = str(len(answer.body))
    return answer


def test_content_that_has_another_digest_than_was_stated_is_not_kept(
    hf: Site, gs: Site, adapter: Path, caches: Path
) -> None:
    for site in (hf, gs):
        location = site.put("sql", adapter)

        def other(asked: Asked, answer: Answer) -> Answer:
            if about(asked):
                answer.body = bytes(len(answer.body))
            return answer

        site.server.fault = other
        with pytest.raises(FetchError, match=rf"{WEIGHTS_NAME} came in with another (SHA-256|md5) than"):
            Adapter.load(location)
    assert nothing_half_done(caches)


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [True, False])
def test_a_file_that_changes_while_it_is_fetched_is_not_mixed_with_its_successor(
    https: Site,
    s3: Site,
    gs: Site,
    adapter: Path,
    caches: Path,
    monkeypatch: pytest.MonkeyPatch,
    conditional: bool,
) -> None:
    monkeypatch.setattr("merged_lora.fetching.cloud.CHUNK", 1000)
    for site in (https, s3, gs):
        location, path = site.put("sql", adapter), f"{site.place('sql')}/{WEIGHTS_NAME}"
        before = site.server.files[path]

        def changing(asked: Asked, answer: Answer, site: Site = site, path: str = path) -> Answer:
            if about(asked):
                site.server.files[path] = bytes(len(site.server.files[path]))
                answer.cut = 1000
            return answer

        site.server.fault, site.server.conditional = changing, conditional
        with pytest.raises(FetchError, match=rf"{WEIGHTS_NAME} changed while it was fetched; fetch it again"):
            Adapter.load(location)
        assert nothing_half_done(caches)
        assert not list(caches.glob(f"parts/*/*{WEIGHTS_NAME}"))
        site.server.fault, site.server.files[path] = lambda asked, answer: answer, before
        assert Adapter.load(location).digest == Adapter.load(adapter).digest
        shutil.rmtree(caches)


def test_a_redirect_is_followed_on_the_same_host_alone(https: Site, adapter: Path, caches: Path) -> None:
    location = https.put("sql", adapter)
    https.server.add("/elsewhere", adapter)
    host = https.server.host

    def to(place: str) -> None:
        def moved(asked: Asked, answer: Answer) -> Answer:
            if not asked.path.startswith("/x/"):
                return answer
            return Answer(302, {"Location": f"{place}/elsewhere/{asked.path.rpartition('/')[2]}"})

        https.server.fault = moved

    for place, reason in {
        "https://127.0.0.1:1": "to another host, '127.0.0.1:1'; name the place",
        "http://user:secret@127.0.0.1:1": "to another host, '127.0.0.1:1'; name the place",
        f"http://{host}": "to the same host by http:",
        f"https://user:secret@{host}": "to the same host with credentials",
        "https://[bad": "to what is no address",
        "https://[::::]": "to what is no address",
    }.items():
        to(place)
        with pytest.raises(FetchError, match=re.escape(reason)) as refused:
            Adapter.load(location)
        assert str(refused.value).startswith(f"{location}: ")
        assert "secret" not in str(refused.value)
    assert nothing_half_done(caches)
    to(f"https://{host}")
    assert Adapter.load(location).digest == Adapter.load(adapter).digest
    https.server.fault = lambda asked, answer: Answer(302, {"Location": asked.path})
    with pytest.raises(FetchError, match="status 302"):
        Adapter.load(location)


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_kept_from_us_is_said_to_be(site: Site, adapter: Path, status: int) -> None:
    location = site.put("sql", adapter)
    site.server.fault = lambda asked, answer: Answer(status)
    with pytest.raises(ForbiddenError, match=rf"{location}: .*(denied|denies access)"):
        Adapter.load(location)


def test_a_server_that_nobody_vouches_for_is_not_trusted(
    https: Site, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    location = https.put("sql", adapter)
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(certified(tmp_path / "other")[1]))
    with pytest.raises(
        FetchError, match=r"the server's certificate is not valid \(.*\); .* set SSL_CERT_FILE"
    ):
        Adapter.load(location)
    assert not https.server.asked


def test_a_host_without_an_address_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def unknown(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(FetchError, match=r"^https://nowhere\.example/sql: there is no host of that name$"):
        Adapter.load("https://nowhere.example/sql")
    assert tries == 1


@pytest.mark.slow
def test_a_host_that_is_not_there_is_said_not_to_answer(site: Site, adapter: Path) -> None:
    location = site.put("sql", adapter)
    site.server.close()
    with pytest.raises(FetchError, match=location):
        Adapter.load(location)


def test_a_disk_that_is_full_is_said_to_be(
    https: Site, adapter: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = https.put("sql", adapter)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage(100))
        with pytest.raises(FetchError, match=r"the disk of the cache has .* left; make room"):
            Adapter.load(location)

    def no_room(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(FetchError, match="no room left on the disk of the cache"):
        Adapter.load(location)
    assert nothing_half_done(caches)


def test_a_cache_that_cannot_be_written_is_said_to_be(
    https: Site, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGED_LORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        FetchError, match="the cache cannot be written: Not a directory; set MERGED_LORA_CACHE"
    ):
        Adapter.load(https.put("sql", adapter))


@pytest.mark.parametrize("text", ["0", "x", "-1", "nan"])
def test_a_bound_of_the_cache_that_is_none_is_refused(
    https: Site, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MERGED_LORA_CACHE_GIB", text)
    with pytest.raises(AdapterError, match="MERGED_LORA_CACHE_GIB must be a number of GiB above 0"):
        Adapter.load(https.location("sql"))


@pytest.mark.parametrize(
    ("status", "code", "kind", "reason"),
    [
        (403, "GatedRepo", ForbiddenError, "gated; ask for access"),
        (401, "GatedRepo", ForbiddenError, "gated; ask for access"),
        (401, "RepoNotFound", NotFoundError, "no such repository on the hub, or it is private"),
        (404, "RepoNotFound", NotFoundError, "no such repository on the hub, or it is private"),
        (403, "", ForbiddenError, "denies access"),
        (429, "", FetchError, "status 429"),
    ],
)
def test_the_reason_of_the_hub_is_given(
    hf: Site, adapter: Path, status: int, code: str, kind: type[MergeError], reason: str
) -> None:
    assert isinstance(hf.server, Hub)
    location = hf.put("sql", adapter)
    hf.server.refusals["org/sql"] = status, code
    with pytest.raises(kind, match=rf"{location}: .*{reason}"):
        Adapter.load(location)


def test_a_revision_or_a_folder_that_is_not_there_is_not_found(hf: Site, adapter: Path) -> None:
    location = hf.put("sql", adapter)
    with pytest.raises(NotFoundError, match="no such revision"):
        Adapter.load(f"{location}@v2")
    with pytest.raises(NotFoundError, match=f"holds no {CONFIG_NAME}"):
        Adapter.load(f"{location}/folder")


def test_a_mistyped_path_that_went_to_the_hub_is_said_to_be_no_folder_either(hf: Site) -> None:
    with pytest.raises(NotFoundError, match=r"; there is no folder adaptors/sql here either$"):
        Adapter.load("adaptors/sql")
    with pytest.raises(NotFoundError) as plain:
        Adapter.load("hf:adaptors/sql")
    assert "here either" not in str(plain.value)


def test_a_repository_that_was_renamed_is_not_taken_for_the_one_that_was_named(
    hf: Site, adapter: Path
) -> None:
    assert isinstance(hf.server, Hub)
    location = hf.put("sql", adapter)
    hf.server.names["org/sql"] = "stranger/sql"
    with pytest.raises(NotFoundError, match="is called 'stranger/sql'; name that one"):
        Adapter.load(location)


def test_a_hub_that_answers_something_else_is_said_to(hf: Site, adapter: Path) -> None:
    location = hf.put("sql", adapter)
    for body in (b"<html>", b"[]", b"{}", b'{"id": "org/sql", "siblings": 7}'):

        def other(asked: Asked, answer: Answer, body: bytes = body) -> Answer:
            return Answer(200, {}, body)

        hf.server.fault = other
        with pytest.raises(FetchError, match=f"{location}: the hub's answer makes no sense"):
            Adapter.load(location)


def test_the_offline_mode_of_the_hub_is_kept(
    hf: Site, adapter: Path, monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    from huggingface_hub import constants

    location = hf.put("sql", adapter)
    digest = Adapter.load(location).digest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Adapter.load(location).digest == digest
    next(caches.parent.glob(f"hub/models--org--sql/snapshots/*/{WEIGHTS_NAME}")).unlink()
    with pytest.raises(FetchError, match=r"not complete in the cache .* leave out HF_HUB_OFFLINE"):
        Adapter.load(location)


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server of another project; returns its address."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    speak_s3(monkeypatch, f"http://{host}:{port}")
    yield f"http://{host}:{port}"
    server.stop()


@pytest.mark.slow
def test_a_bucket_of_another_projects_server_is_read(moto: str, adapter: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket="bucket")
    for file in adapter.iterdir():
        client.upload_file(str(file), "bucket", f"a b/sql/{file.name}")
    for _ in range(2):
        assert Adapter.load("s3://bucket/a b/sql").digest == Adapter.load(adapter).digest
    for place in ("s3://bucket/other", "s3://nothing/sql"):
        with pytest.raises(NotFoundError, match=place):
            Adapter.load(place)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for location, module, extra in (
        ("s3://bucket/x", "s3fs", "s3"),
        ("gs://bucket/x", "gcsfs.core", "gs"),
        ("hf:org/repo", "huggingface_hub", "hub"),
    ):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(FetchError, match=rf"pip install 'vllm-merged-lora\[{extra}\]'"):
                Adapter.load(location)


def test_a_server_that_knows_no_ranges_is_read_anew_from_the_start(https: Site, adapter: Path) -> None:
    location = https.put("sql", adapter)

    def whole(asked: Asked, answer: Answer) -> Answer:
        if not about(asked):
            return answer
        body = https.server.files[asked.path]
        return Answer(200, {"ETag": answer.headers["ETag"]}, body, None if "Range" in asked.headers else 2000)

    https.server.fault = whole
    assert Adapter.load(location).digest == Adapter.load(adapter).digest


def test_a_file_without_a_tag_is_never_put_together_from_two_answers(https: Site, adapter: Path) -> None:
    location, first = https.put("sql", adapter), [True]

    def bare(asked: Asked, answer: Answer) -> Answer:
        answer.headers.pop("ETag", None)
        if about(asked) and first.pop() if first else False:
            answer.cut = 2000
        return answer

    https.server.fault = bare
    assert Adapter.load(location).digest == Adapter.load(adapter).digest
    assert not [asked for asked in https.server.asked if "Range" in asked.headers]


def test_the_stand_in_is_closed_with_its_stalled_answers() -> None:
    with closed_after(Server()) as server:
        assert server.host.startswith("localhost:")
