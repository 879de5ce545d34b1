"""What a text means: a folder here, or a place on the hub, in a store or on a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merged_lora.errors import AdapterError
from merged_lora.locations import MAX_LOCATION, Location, Pattern, hub_hint, locate, location_hint, parse


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder ``adapters``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:org/repo", Location("hf", "org/repo")),
        ("hf:org/repo@v1.0", Location("hf", "org/repo", "", "v1.0")),
        ("hf:org/repo/some/folder", Location("hf", "org/repo", "some/folder")),
        ("hf:org/repo@abc/folder/", Location("hf", "org/repo", "folder", "abc")),
        ("hf:org/repo/adapter_model.safetensors", Location("hf", "org/repo")),
        ("s3://bucket", Location("s3", "bucket")),
        ("s3://bucket/a prefix/of@it/", Location("s3", "bucket", "a prefix/of@it")),
        ("gs://bucket.name/x/adapter_config.json", Location("gs", "bucket.name", "x")),
        ("https://Example.ORG:8443/a/b", Location("https", "example.org:8443", "a/b")),
        ("https://[::1]/größe", Location("https", "[::1]", "größe")),
        ("https://host:443/a", Location("https", "host", "a")),
    ],
)
def test_a_location_is_read_as_it_is_written(text: str, expected: Location) -> None:
    assert parse(text) == locate(text) == expected


@given(
    st.sampled_from(["hf:a/b", "hf:Or-g/re.po_1@v2", "s3://bucket/", "gs://bucket/", "https://host:1/"]),
    st.lists(st.from_regex(r"[a-z0-9 ._@+-]{1,8}", fullmatch=True), max_size=3),
)
def test_the_text_of_a_location_means_the_same_location(start: str, parts: list[str]) -> None:
    text = "/".join([start.rstrip("/"), *parts])
    if any(part in (".", "..") for part in parts):
        with pytest.raises(AdapterError):
            parse(text)
    else:
        assert str(parse(text)) == text
        assert parse(str(parse(text))) == parse(text)


def test_what_exists_or_begins_like_a_path_is_one_and_an_id_of_a_repository_is_on_the_hub(here: Path) -> None:
    paths = ["adapters/sql", "adapters", "./org/repo", "../org/repo", "/org/repo", "sql"]
    paths += ["org//repo", "org/re--po", "a b/repo"]
    assert [locate(text) for text in paths] == [Path(text) for text in paths]
    assert locate("org/repo@v1/sub") == Location("hf", "org/repo", "sub", "v1")
    (here / "org").mkdir()
    assert locate("org/repo") == Path("org/repo")
    assert locate("hf:org/repo") == Location("hf", "org/repo")


def test_a_tilde_in_front_is_the_folder_of_a_user_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert locate("~/org/repo") == Path("/home/me/org/repo")
    assert locate("~no-such-user/repo") == Path("~no-such-user/repo")
    assert locate("./x/~") == Path("x/~")


def test_an_object_that_is_no_text_is_a_path() -> None:
    assert locate(Path("org/repo")) == Path("org/repo")
    assert locate(Path("~/repo")) == Path("~/repo")


def test_a_path_that_may_have_meant_a_repository_says_how_to_write_that() -> None:
    assert hub_hint(Path("org/repo")) == "; for the repository of that name on the hub, write hf:org/repo"
    assert hub_hint(Path("repo")) == hub_hint(Path("/org/repo")) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:repo", "not of the form hf:org/repo"),
        ("hf:org/repo@refs/pr/1", "named by its commit"),
        ("hf:org/../repo", "is not"),
        ("hf:org/repo/../../other", "'..'"),
        ("hf:org/repo//x", "an empty part"),
        ("s3://", "names no bucket"),
        ("s3://UPPER/x", "names no bucket"),
        ("s3://bucket/a/./b", "'.'"),
        ("gs://bucket/a*b", "'*'"),
        ("https://", "names no host"),
        ("https:///etc/passwd", "names no host"),
        ("https://[::::]/x", "names no host"),
        (f"https://{'a' * 64}.org/x", "names no host"),
        ("https://host\\@other/x", "holds credentials"),
        ("https://host/a%2e%2e/b", "'%'"),
        ("https://host/a\\..\\b", "'\\\\'"),
        ("https://huggingface.co/org/repo", "write hf:org/repo"),
        ("http://host/a", "from hf:, s3://, gs://, https:// alone"),
        ("file:///etc", "from hf:, s3://, gs://, https:// alone"),
        ("http://host/a", "alone; write https://host/a"),
        ("HTTPS://host/a", "alone; write https://host/a"),
        ("gcs://bucket/a", "alone; write gs://bucket/a"),
        ("https://host:0/a", "a port is a number from 1 to 65535"),
        ("https://host:65536/a", "a port is a number from 1 to 65535"),
        ("s3://bucket/a\nb", "a control character"),
        ("https://host/\u202eb", "an invisible one"),
        ("s3://bucket/" + "x" * MAX_LOCATION, "at most 1024 characters"),
    ],
)
def test_a_location_that_is_none_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(AdapterError) as refused:
        parse(text)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "text", ["https://user:secret@host/a", "https://host/a?token=secret", "https://host/a#secret"]
)
def test_no_message_shows_a_secret(text: str) -> None:
    with pytest.raises(AdapterError) as refused:
        parse(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("hf:org/*", ["hf:org/a", "hf:org/a/b"], ["hf:other/a", "hf:organ/a", "hf:org/a@v1", "s3://org/a"]),
        ("hf:org/*@*", ["hf:org/a", "hf:org/a@v1/b"], ["hf:other/a@v1"]),
        ("hf:org/a", ["hf:org/a"], ["hf:org/ab", "hf:org/a/b", "hf:org/a@v1"]),
        ("hf:org/a@*", ["hf:org/a", "hf:org/a@v1"], ["hf:org/a@v1/b"]),
        ("hf:org/a@v1", ["hf:org/a@v1"], ["hf:org/a", "hf:org/a@v2"]),
        ("hf:org/a@v1/*", ["hf:org/a@v1/b"], ["hf:org/a@v2/b", "hf:org/a/b"]),
        ("hf:*", ["hf:org/a"], ["hf:org/a@v1", "s3://bucket/a"]),
        ("s3://bucket/x/*", ["s3://bucket/x/a", "s3://bucket/x/a/b@1"], ["s3://bucket/xa", "s3://bucket/x"]),
        ("s3://bucket/*", ["s3://bucket/a"], ["s3://bucket2/a", "gs://bucket/a"]),
        ("https://host/*", ["https://host/a"], ["https://host.org/a", "https://host:444/a"]),
    ],
)
def test_a_pattern_allows_what_begins_like_it_and_nothing_else(
    pattern: str, allowed: list[str], refused: list[str]
) -> None:
    assert all(Pattern(pattern).allows(parse(text)) for text in allowed)
    assert not any(Pattern(pattern).allows(parse(text)) for text in refused)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://HOST/*", "https://host/*"),
        ("https://host:443/a/*", "https://host/a/*"),
        ("http://host:80/*", "https://host:80/*"),
        ("HF:org/*", "hf:org/*"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket/a/adapter_config.json", "s3://bucket/a"),
    ],
)
def test_a_pattern_in_another_spelling_says_how_it_is_written(text: str, written: str) -> None:
    with pytest.raises(ValueError, match=f"^must be written {re.escape(written)}$"):
        Pattern(text)
    Pattern(written)


def test_a_name_that_may_have_meant_a_location_says_how_to_write_that() -> None:
    assert location_hint("HTTPS://host/sql") == "; if a location is meant, write https://host/sql"
    assert location_hint("HF:org/sql@v1") == "; if a location is meant, write hf:org/sql@v1"
    assert location_hint("org/sql") == hub_hint(Path("org/sql")) != ""
    assert location_hint("sql") == location_hint("hf:org/sql") == ""


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "s3://*",
        "https://*",
        "https://*.org/a",
        "hf:",
        "hf:org*",
        "hf:o*/a",
        "hf:o*/*",
        "hf:*/*",
        "hf:**/*",
        "hf:*/a",
        "hf:o--g/*",
        "hf:/*",
        "hf:org/a*",
        "hf:org/a@v1@*",
        "hf:org/a@v1/*@*",
        "hf:org/*@v1",
        "s3://b/a*",
        "s3://b/*/c",
        "s3://bucket/*@*",
        "org/*",
        "/adapters/*",
    ],
)
def test_a_pattern_that_allows_nothing_or_names_no_owner_bucket_or_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a location"):
        Pattern(text)
