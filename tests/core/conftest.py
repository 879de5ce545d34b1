"""Settings of the property tests in this folder, and its fixture."""

import pytest
from hypothesis import settings

from merged_lora.cli import main
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
