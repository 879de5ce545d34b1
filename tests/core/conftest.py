"""Settings of the property tests in this folder, and its fixtures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import tiny
from calibrations import TEXTS, write
from fetched import KINDS, Site, gs_site, hf_site, https_site, own_caches, s3_site
from making import SMALL, random_adapter
from merged_lora.language_model import LanguageModel

# A deadline per example would make tests fail on a busy machine; pytest's timeout guards the whole test.
settings.register_profile("merged-lora", deadline=None)
settings.load_profile("merged-lora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel.load(tiny.make_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: an adapter ``a`` of all linear modules, and eight prompts."""
    monkeypatch.chdir(tmp_path)
    tiny.make_adapter(seed=1).save("a")
    write("prompts.jsonl", [{"prompt": text} for text in TEXTS])
    return tmp_path


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of fetched adapters, of this test alone."""
    return own_caches(tmp_path, monkeypatch)


@pytest.fixture
def https(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with https_site(tmp_path, monkeypatch) as site:
        yield site


@pytest.fixture
def s3(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with s3_site(monkeypatch) as site:
        yield site


@pytest.fixture
def gs(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with gs_site(monkeypatch) as site:
        yield site


@pytest.fixture
def hf(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with hf_site(monkeypatch) as site:
        yield site


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Site:
    """Each kind of server, one after the other."""
    found: Site = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter."""
    random_adapter(SMALL, seed=1).save(tmp_path / "adapter")
    return tmp_path / "adapter"
