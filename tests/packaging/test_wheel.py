"""The wheel that users install and the checkout that developers use hold the same modules."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "merged_lora"
LINKS = sorted(path.name for path in PACKAGE.iterdir() if path.is_symlink())
"""The folders beside the package that are linked into it."""
FOLDERS = [name for name in LINKS if name != "bench"]
"""The linked folders that a wheel holds: the benchmarks are for a checkout."""

FIND = """
import sys, importlib.util
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    spec = importlib.util.find_spec("merged_lora." + name)
    print(spec.origin if spec else "nowhere")
"""


def find(root: Path, *names: str) -> list[str]:
    """Where Python finds these modules of merged_lora with `root` on sys.path and nothing installed."""
    command = [sys.executable, "-I", "-S", "-c", FIND, str(root), *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def copy_of_the_sources(folder: Path) -> Path:
    """What a clone holds of the package: setuptools leaves files beside the sources that it builds from."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("merged_lora", *LINKS):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
    return folder


def build(source: Path, made: Path) -> Path:
    """The wheel of a folder or of an sdist."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(made), str(source)], check=True)
    (file,) = made.glob("*.whl")
    return file


def modules_of(wheel: Path) -> set[str]:
    """The files that a wheel installs, without what describes it."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_the_sources(tmp_path_factory.mktemp("source"))
    return build(source, tmp_path_factory.mktemp("wheel"))


def test_the_links_are_relative_and_lead_to_the_folders_beside_the_package() -> None:
    assert {name: (PACKAGE / name).readlink() for name in LINKS} == {
        name: Path("..", name)
        for name in ("bench", "cpu_kernels", "reference", "triton_kernels", "vllm_plugin")
    }


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_one_top_level_package(wheel: Path) -> None:
    places = [PACKAGE, *(PACKAGE / name for name in FOLDERS)]  # rglob does not follow links
    expected = {file.relative_to(ROOT).as_posix() for place in places for file in place.rglob("*.py")}
    page = {file for file in (PACKAGE / "playground" / "static").rglob("*") if file.is_file()}
    assert modules_of(wheel) == expected | {file.relative_to(ROOT).as_posix() for file in page} | {
        "merged_lora/py.typed",
        "merged_lora/vllm_plugin/hooks/reliance.json",
    }


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_holds_the_same(wheel: Path, tmp_path: Path) -> None:
    source = copy_of_the_sources(tmp_path)
    backend = "from setuptools import build_meta; print(build_meta.build_sdist('made'))"
    done = subprocess.run(
        [sys.executable, "-c", backend], cwd=source, capture_output=True, text=True, check=True
    )
    sdist = source / "made" / done.stdout.splitlines()[-1]
    (made := tmp_path / "rebuilt").mkdir()
    assert modules_of(build(sdist, made)) == modules_of(wheel)


@pytest.mark.slow
def test_an_editable_install_finds_the_folders_and_nothing_beside_the_package(tmp_path: Path) -> None:
    source, made = copy_of_the_sources(tmp_path), tmp_path / "installed"
    made.mkdir()
    backend = "from setuptools import build_meta; print(build_meta.build_editable('installed'))"
    subprocess.run([sys.executable, "-c", backend], cwd=source, capture_output=True, check=True)
    (file,) = made.glob("*.whl")
    zipfile.ZipFile(file).extractall(made)
    ask = f"import site; site.addsitedir({str(made)!r})\n" + FIND.replace(
        "sys.path.insert(0, sys.argv[1])", ""
    )
    command = [sys.executable, "-I", "-S", "-c", ask, "unused", *LINKS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{source}/merged_lora/{name}/__init__.py" for name in LINKS]
    beside = [sys.executable, "-I", "-S", "-c", ask.replace("merged_lora.", ""), "unused", *LINKS]
    done = subprocess.run(beside, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["nowhere"] * len(LINKS)


@pytest.mark.slow
def test_the_wheel_brings_the_command_the_vllm_plugin_and_the_licence(wheel: Path) -> None:
    entry_points = ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert dict(entry_points["console_scripts"]) == {"merged-lora": "merged_lora.cli:main"}
    assert dict(entry_points["vllm.general_plugins"]) == {"merged_lora": "merged_lora.vllm_plugin:register"}


@pytest.mark.slow
def test_an_unpacked_wheel_finds_the_folders_inside_the_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert find(tmp_path, *FOLDERS) == [f"{tmp_path}/merged_lora/{folder}/__init__.py" for folder in FOLDERS]


@pytest.mark.slow
def test_an_unpacked_wheel_does_not_take_its_neighbours_for_its_own_modules(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "neighbour.py").touch()
    assert find(tmp_path, "neighbour") == ["nowhere"]


def test_a_checkout_finds_the_linked_folders_inside_the_package() -> None:
    assert find(ROOT, *LINKS) == [f"{ROOT}/merged_lora/{name}/__init__.py" for name in LINKS]


@pytest.mark.slow
def test_the_public_names_are_there_and_nothing_heavy_is_imported_before_they_are_used() -> None:
    program = """
import sys
import merged_lora
from merged_lora import MergeError, MergeSpec, parse
assert str(parse("ties(a, b)")) and issubclass(MergeError, Exception) and MergeSpec
heavy = {"torch", "numpy", "safetensors", "triton", "vllm", "numba"} & set(sys.modules)
assert not heavy, heavy
assert {"merge", "Adapter", "parse"} <= set(dir(merged_lora))
from merged_lora import Adapter, merge
from merged_lora.adapters import Adapter as same
from merged_lora.engine import merge as same_merge
assert Adapter is same and merge is same_merge
try:
    merged_lora.merg
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'merged_lora' has no attribute 'merg'\n"


def test_the_folder_triton_kernels_is_no_package_of_that_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError: this folder is merged_lora.triton_kernels" in done.stderr
    assert done.stderr.rstrip().endswith(
        "start Python outside of this checkout, and leave it out of PYTHONPATH"
    )


def find_vllm() -> Path:
    """The folder of the package vllm."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.slow
def test_vllm_does_not_take_the_folder_for_openais_kernels() -> None:
    ask = (
        "import sys; from vllm.utils.import_utils import has_triton_kernels; has_triton_kernels();"
        "print(getattr(sys.modules.get('triton_kernels'), '__file__', 'none'))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    taken = done.stdout.splitlines()[-1]  # vLLM's GPU build brings a copy of them
    assert taken == "none" or Path(taken).is_relative_to(find_vllm())
