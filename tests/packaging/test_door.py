"""What contributors meet first, the workflows, forms, hooks and targets, fits together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from check_jsonschema.cli import main as check_jsonschema
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def faults(schema: str, *files: Path) -> str:
    """What is wrong with these files by a schema that ``check-jsonschema`` brings; empty if nothing is."""
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", schema, *map(str, files)])
    return "" if done.exit_code == 0 else done.output


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_are_valid_and_every_job_has_a_time_limit(schema: str) -> None:
    assert len(WORKFLOWS) == 3
    assert faults(schema, *WORKFLOWS) == ""


def test_a_workflow_that_is_not_valid_is_found(tmp_path: Path) -> None:
    file = tmp_path / "broken.yml"
    file.write_text(WORKFLOWS[0].read_text(encoding="utf-8").replace("runs-on", "runs_on"), encoding="utf-8")
    assert "runs_on" in faults("vendor.github-workflows", file)


def test_issue_forms_are_valid() -> None:
    assert [form.name for form in FORMS] == ["bug.yml", "feature.yml"]
    assert faults("vendor.github-issue-forms", *FORMS) == ""
    assert faults("vendor.github-issue-config", FORMS[0].with_name("config.yml")) == ""


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_commit_and_may_read_alone(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert [use for use in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", use)] == []
    assert "\npermissions:\n  contents: read\n" in text


@pytest.mark.parametrize(
    "file",
    [*WORKFLOWS, ROOT / "CONTRIBUTING.md", ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"],
    ids=lambda file: file.name,
)
def test_every_target_that_is_named_is_one_of_the_makefile(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|run: |`|exec |entry: )make ([a-z-]+)", text, re.MULTILINE))
    assert named
    assert named <= TARGETS


def test_every_target_that_users_call_is_listed_with_what_it_does() -> None:
    listed = re.findall(r"^([a-z-]+):.*## \S", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == TARGETS


def test_paths_that_the_guide_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:md|toml))`", text)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []
