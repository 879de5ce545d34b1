"""Settings of the property tests in this folder, and its fixtures."""

from pathlib import Path

import pytest
from hypothesis import settings

import tiny
from calibrations import TEXTS, write
from merged_lora.cli import main
from merged_lora.language_model import LanguageModel
from running import Run

# A deadline per example would make tests fail on a busy machine; pytest's timeout guards the whole test.
settings.register_profile("merged-lora", deadline=None)
settings.load_profile("merged-lora")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


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
