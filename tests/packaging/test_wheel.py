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
PACKAGES = sorted(file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests")
WINGS = sorted(folder.name for folder in PACKAGES if folder.name != "merged_lora")

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves files beside the sources, and packs what it left before."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES:
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(built), str(source)], check=True)
    (file,) = built.iterdir()
    return file


def test_the_wheel_holds_every_module_of_every_folder_and_one_top_level_package(wheel: Path) -> None:
    expected = set()
    for folder in PACKAGES:
        place = Path() if folder.name == "merged_lora" else Path("merged_lora")
        expected |= {(place / file.relative_to(ROOT)).as_posix() for file in folder.rglob("*.py")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected | {"merged_lora/py.typed", "merged_lora/vllm_plugin/reliance.json"}


def test_the_wheel_brings_the_command_the_vllm_plugin_and_the_licence(wheel: Path) -> None:
    entry_points = ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert dict(entry_points["console_scripts"]) == {"merged-lora": "merged_lora.cli:main"}
    assert dict(entry_points["vllm.general_plugins"]) == {"merged_lora": "merged_lora.vllm_plugin:register"}


def test_an_unpacked_wheel_finds_the_wings_inside_the_package(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert find(tmp_path, *WINGS) == [f"{tmp_path}/merged_lora/{wing}/__init__.py" for wing in WINGS]


def test_an_unpacked_wheel_does_not_take_its_neighbours_for_its_own_modules(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "neighbour.py").touch()
    assert find(tmp_path, "neighbour") == ["nowhere"]


def test_a_checkout_finds_the_wings_beside_the_package() -> None:
    assert find(ROOT, *WINGS) == [f"{ROOT}/{wing}/__init__.py" for wing in WINGS]


def test_the_folder_triton_kernels_is_no_package_of_that_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ImportError: this folder is merged_lora.triton_kernels" in done.stderr


def find_vllm() -> Path:
    """The folder of the package vllm."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_vllm_does_not_take_the_folder_for_openais_kernels() -> None:
    ask = (
        "import sys; from vllm.utils.import_utils import has_triton_kernels; has_triton_kernels();"
        "print(getattr(sys.modules.get('triton_kernels'), '__file__', 'none'))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    taken = done.stdout.splitlines()[-1]  # vLLM's GPU build brings a copy of them
    assert taken == "none" or Path(taken).is_relative_to(find_vllm())
