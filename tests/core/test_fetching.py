"""Adapters that are fetched: what comes in, what is kept, and what is fetched again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import safe_open

from fetched import Site
from making import SMALL, random_adapter
from merged_lora import Adapter, merge
from merged_lora.calibration import CALIBRATION_NAME
from merged_lora.errors import AdapterError, FetchError, NotFoundError
from merged_lora.fetching.files import Bound
from merged_lora.fetching.opening import local_folder
from merged_lora.files.layout import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from running import Run, environment
from stand_ins import GoogleStorage, Hub


def folders(cache: Path) -> list[Path]:
    """The folders of adapters in the cache."""
    return sorted(cache.glob("adapters/*"))


def contents(site: Site, name: str) -> int:
    """How often the content of a file was asked for."""
    return len(
        [asked for asked in site.server.asked_for(name) if "generation" in asked.query or not_gs(site)]
    )


def not_gs(site: Site) -> bool:
    """Whether descriptions of files are asked for by HEAD, and not by GET as in Google's storage."""
    return not isinstance(site.server, GoogleStorage)


def test_an_adapter_is_the_same_wherever_it_is_kept_and_its_weights_come_in_once(
    site: Site, adapter: Path
) -> None:
    location = site.put("sql", adapter)
    for _ in range(2):
        assert Adapter.load(location).digest == Adapter.load(adapter).digest
        assert contents(site, WEIGHTS_NAME) == 1


def test_nothing_but_configuration_safetensors_and_calibration_is_asked_for(
    site: Site, adapter: Path
) -> None:
    for name in ("adapter_model.bin", "modeling.py", "tokenizer.json", "optimizer.pt", "other.safetensors"):
        (adapter / name).write_bytes(b"x")
    (adapter / CALIBRATION_NAME).write_bytes(b"x")
    with local_folder(site.put("sql", adapter)) as folder:
        kept = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
    assert kept == {CONFIG_NAME, WEIGHTS_NAME, CALIBRATION_NAME}
    wanted = [asked.path for asked in site.server.asked if "/api/" not in asked.path]
    assert {path.rpartition("/")[2] for path in wanted if "." in path} == kept


def test_the_shards_that_an_index_names_are_fetched(site: Site, adapter: Path) -> None:
    shard = "adapter_model-00001-of-00001.safetensors"
    (adapter / WEIGHTS_NAME).rename(adapter / shard)
    with safe_open(adapter / shard, "pt") as tensors:
        index = {"weight_map": dict.fromkeys(tensors.keys(), shard)}
    (adapter / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8-sig")
    assert Adapter.load(site.put("sql", adapter)).digest == Adapter.load(adapter).digest


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"x": "../secret.safetensors"}, "'../secret.safetensors' is not the name of a file beside it"),
        ({"x": "/etc/passwd"}, "'/etc/passwd' is not the name of a file beside it"),
        ({"x": "code.py"}, "'code.py' is not the name of a file beside it"),
        ({"x": f"{'x' * 250}.safetensors"}, "is not the name of a file beside it"),
        ({"x": 7}, "weight_map must name a file for every tensor"),
        ({}, "names 0 files"),
        ({str(i): f"{i}.safetensors" for i in range(1025)}, "names 1025 files, at least 1 and at most 1024"),
    ],
    ids=["above", "absolute", "code", "long", "number", "none", "many"],
)
def test_an_index_that_names_something_else_is_refused(
    https: Site, adapter: Path, names: object, reason: str
) -> None:
    (adapter / WEIGHTS_NAME).unlink()
    (adapter / INDEX_NAME).write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    location = https.put("sql", adapter)
    with pytest.raises(AdapterError, match=reason) as refused:
        Adapter.load(location)
    assert re.match(rf"{location}(/|: ){INDEX_NAME}", str(refused.value))


def test_pickled_weights_are_never_fetched(site: Site, adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")
    location = site.put("sql", adapter)
    with pytest.raises(AdapterError, match=r"pickled \(adapter_model.bin\)"):
        Adapter.load(location)
    assert not [
        asked for asked in site.server.asked if asked.path.endswith(".bin") and "Range" in asked.headers
    ]


def test_what_is_no_adapter_is_not_found(site: Site, adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).unlink()
    location = site.put("sql", adapter)
    for place in (location, site.location("nothing")):
        with pytest.raises(NotFoundError, match=place):
            Adapter.load(place)


def test_a_mistake_in_a_fetched_file_names_the_location(site: Site, adapter: Path) -> None:
    (adapter / CONFIG_NAME).write_text("{", encoding="utf-8")
    location = site.put("sql", adapter)
    with pytest.raises(AdapterError) as refused:
        Adapter.load(location)
    assert str(refused.value) == f"{location}/{CONFIG_NAME}: not valid JSON"


@pytest.mark.slow
def test_an_adapter_that_changed_is_fetched_again_and_its_other_files_are_not(
    site: Site, adapter: Path, tmp_path: Path
) -> None:
    location = site.put("sql", adapter)
    Adapter.load(location)
    random_adapter(SMALL, seed=2).save(tmp_path / "other")
    site.put("sql", tmp_path / "other")
    if isinstance(site.server, Hub):
        site.server.commit = "f" * 40
    assert Adapter.load(location).digest == Adapter.load(tmp_path / "other").digest
    assert contents(site, WEIGHTS_NAME) == 2
    assert contents(site, CONFIG_NAME) == 1 or isinstance(site.server, Hub)


def test_one_content_in_two_places_is_kept_once(https: Site, adapter: Path, caches: Path) -> None:
    for name in ("one", "two"):
        Adapter.load(https.put(name, adapter))
    assert len(folders(caches)) == 1


def test_the_adapter_that_was_not_used_for_the_longest_time_makes_room(
    https: Site, tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = []
    for seed in range(3):
        random_adapter(SMALL, seed=seed).save(tmp_path / str(seed))
        locations.append(https.put(str(seed), tmp_path / str(seed)))
    size = sum(file.stat().st_size for file in (tmp_path / "0").iterdir())
    monkeypatch.setenv("MERGED_LORA_CACHE_GIB", repr(2.5 * size / 2**30))
    with local_folder(locations[0]) as first, local_folder(locations[1]) as second:
        os.utime(first / ".lock", (1, 1))
        os.utime(second / ".lock", (2, 2))
        with pytest.raises(FetchError, match=r"full of what is in use.* raise MERGED_LORA_CACHE_GIB"):
            Adapter.load(locations[2])
    with local_folder(locations[2]) as third:
        assert folders(caches) == sorted([second, third])
    assert len(list(caches.glob("places/*.json"))) == 2


def test_an_adapter_over_the_limit_is_refused_before_its_weights_come_in(site: Site, adapter: Path) -> None:
    location = site.put("sql", adapter)
    with (
        pytest.raises(AdapterError, match=r"GiB, the limit is .* GiB; ask for more$"),
        local_folder(location, Bound(5000, "ask for more")),
    ):
        pass
    assert not contents(site, WEIGHTS_NAME)


def test_offline_what_was_fetched_is_there_and_nothing_is_asked(
    site: Site, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location, other = site.put("sql", adapter), site.put("other", adapter)
    digest = Adapter.load(location).digest
    asked = len(site.server.asked)
    monkeypatch.setenv("MERGED_LORA_OFFLINE", "1")
    assert Adapter.load(location).digest == digest
    with pytest.raises(FetchError, match=rf"{other}: not .*MERGED_LORA_OFFLINE"):
        Adapter.load(other)
    assert len(site.server.asked) == asked


@pytest.mark.slow
def test_a_fetch_goes_on_from_where_an_earlier_one_ended(site: Site, adapter: Path, caches: Path) -> None:
    if isinstance(site.server, Hub):
        pytest.skip("huggingface_hub begins anew")
    location, half = site.put("sql", adapter), (adapter / WEIGHTS_NAME).stat().st_size // 2
    whole = site.server.fault

    def broken(asked, answer):  # type: ignore[no-untyped-def]
        weights = asked.path.endswith(WEIGHTS_NAME)
        if weights and site.location("").startswith("https"):
            answer.cut = half if "Range" not in asked.headers else 0
        elif weights and "Range" in asked.headers:
            answer.status, answer.body = 503, b""
        return answer

    site.server.fault = broken
    with pytest.raises(FetchError, match=f"{WEIGHTS_NAME} cannot be fetched"):
        Adapter.load(location)
    assert not folders(caches)
    site.server.fault = whole
    assert Adapter.load(location).digest == Adapter.load(adapter).digest
    if site.location("").startswith("https"):
        assert site.server.asked_for(WEIGHTS_NAME)[-1].headers["Range"] == f"bytes={half}-"


def test_however_many_ask_a_file_comes_in_once(https: Site, adapter: Path) -> None:
    location, digest = https.put("sql", adapter), Adapter.load(adapter).digest
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Adapter.load(location).digest, range(8)))
    assert found == [digest] * 8
    assert contents(https, WEIGHTS_NAME) == 1


def test_every_byte_is_reported_once(site: Site, adapter: Path) -> None:
    came: list[int] = []
    location = site.put("sql", adapter)
    with local_folder(location, report=came.append):
        assert sum(came) == sum(file.stat().st_size for file in adapter.iterdir())
    came.clear()
    with local_folder(location, report=came.append):
        assert sum(came) == 0


def test_a_cache_of_another_release_or_of_a_killed_process_is_repaired(
    https: Site, adapter: Path, caches: Path
) -> None:
    location, digest = https.put("sql", adapter), Adapter.load(adapter).digest
    Adapter.load(location)
    for place in caches.glob("places/*.json"):
        place.write_text('{"folder": 7}', encoding="utf-8")
    (caches / ".removed-x").mkdir()
    (caches / ".made-x").mkdir()
    (caches / ".made-x" / ".lock").touch()
    os.utime(caches / ".made-x" / ".lock", (1, 1))
    assert Adapter.load(location).digest == digest
    assert len(folders(caches)) == 1
    assert not list(caches.glob(".[mr]*"))


@pytest.mark.slow
def test_the_command_and_python_take_locations_beside_folders(
    run: Run, https: Site, adapter: Path, tmp_path: Path
) -> None:
    location = https.put("sql", adapter)
    random_adapter(SMALL, seed=2).save(tmp_path / "b")
    expected = merge("ties(a, b)", {"a": location, "b": tmp_path / "b"})
    sources = ("--adapter", f"a={location}", "--adapter", f"b={tmp_path / 'b'}")
    code, _, err = run("merge", "ties(a, b)", *sources, "--output", tmp_path / "made")
    assert (code, err) == (0, "")
    assert Adapter.load(tmp_path / "made").digest == expected.digest


def test_the_command_says_in_one_line_what_is_wrong_with_a_location(
    run: Run, https: Site, tmp_path: Path
) -> None:
    for location, reason in {
        "ftp://x/y": "adapters are fetched from hf:, s3://, gs://, https:// alone",
        https.location("none"): f"holds no {CONFIG_NAME}",
    }.items():
        code, _, err = run("merge", "a", "--adapter", f"a={location}", "--output", tmp_path / "made")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert reason in err


def test_a_calibration_is_not_written_into_a_place_elsewhere(run: Run) -> None:
    code, _, err = run("calibrate", "--model", "m", "--adapter", "a=hf:org/repo", "--prompts", "p")
    assert code == 2
    assert "hf:org/repo is none here" in err


def test_a_hub_id_that_was_given_as_a_path_says_how_to_write_it() -> None:
    with pytest.raises(AdapterError, match=r"no such adapter folder; .* write hf:org/repo"):
        Adapter.load(Path("org/repo"))


@pytest.mark.slow
def test_the_command_uses_the_hub_as_the_environment_has_it(hf: Site, adapter: Path, tmp_path: Path) -> None:
    hf.put("repo", adapter)
    hub = {
        "HF_ENDPOINT": f"http://{hf.server.host}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }
    command = [sys.executable, "-m", "merged_lora", "merge", "a", "--adapter", "a=org/repo@v1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "made")],
        env={**environment(), **hub},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    tokens = {
        asked.path: asked.headers.get("authorization") for asked in hf.server.asked if "/org/" in asked.path
    }
    assert set(tokens.values()) == {"Bearer hf_secret"}, tokens
    assert list((tmp_path / "home").rglob("refs/v1"))


@pytest.mark.slow
def test_importing_what_fetches_imports_no_library_of_networks() -> None:
    program = "import sys, merged_lora.adapters; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert not {"huggingface_hub", "s3fs", "gcsfs", "aiohttp", "httpx"} & set(loaded.split())


def test_threads_that_use_an_adapter_keep_it_from_being_removed(
    https: Site, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = https.put("sql", adapter)
    random_adapter(SMALL, seed=5).save(tmp_path / "other")
    other = https.put("other", tmp_path / "other")
    size = sum(file.stat().st_size for file in adapter.iterdir())
    monkeypatch.setenv("MERGED_LORA_CACHE_GIB", repr(1.5 * size / 2**30))
    inside, leave = threading.Event(), threading.Event()

    def use() -> bool:
        with local_folder(location) as folder:
            inside.set()
            leave.wait(30)
            return (folder / WEIGHTS_NAME).is_file()

    with ThreadPoolExecutor(1) as pool:
        used = pool.submit(use)
        assert inside.wait(30)
        with pytest.raises(FetchError, match="in use"):
            Adapter.load(other)
        leave.set()
        assert used.result()
    Adapter.load(other)


def damage(file: Path) -> None:
    """Let a file hold something else; other names of it do so, too."""
    file.write_bytes(b"junk" + file.read_bytes()[4:])


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME])
def test_a_damaged_copy_is_removed_and_the_next_attempt_fetches_it_again(
    https: Site, adapter: Path, caches: Path, name: str
) -> None:
    location = https.put("sql", adapter)
    Adapter.load(location)
    damage(folders(caches)[0] / name)
    with pytest.raises(FetchError, match=rf"^{location}: its copy in the cache was damaged and was removed"):
        Adapter.load(location)
    assert not folders(caches)
    with local_folder(location) as folder:
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()


def test_offline_a_damaged_copy_is_said_to_be(
    https: Site, adapter: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = https.put("sql", adapter)
    Adapter.load(location)
    damage(folders(caches)[0] / WEIGHTS_NAME)
    monkeypatch.setenv("MERGED_LORA_OFFLINE", "1")
    with pytest.raises(FetchError, match=rf"^{location}: its copy in the cache was damaged and was removed"):
        Adapter.load(location)
    with pytest.raises(FetchError, match=rf"^{location}: not in the cache, and MERGED_LORA_OFFLINE is set"):
        Adapter.load(location)


def test_a_damaged_copy_that_another_uses_is_named(https: Site, adapter: Path, caches: Path) -> None:
    location = https.put("sql", adapter)
    with local_folder(location) as folder:
        damage(folder / WEIGHTS_NAME)
        with pytest.raises(FetchError, match=f"damaged and is in use; remove {folder}$"):
            Adapter.load(location)
        assert folders(caches) == [folder]


def test_a_mistake_of_the_adapter_itself_is_no_damage(https: Site, adapter: Path, caches: Path) -> None:
    damage(adapter / WEIGHTS_NAME)
    location = https.put("sql", adapter)
    for _ in range(2):
        with pytest.raises(AdapterError, match="not a sound safetensors file"):
            Adapter.load(location)
    assert contents(https, WEIGHTS_NAME) == len(folders(caches)) == 1


def test_a_damaged_file_is_not_taken_over_into_the_adapter_that_follows(
    https: Site, adapter: Path, caches: Path
) -> None:
    location = https.put("sql", adapter)
    Adapter.load(location)
    damage(folders(caches)[0] / WEIGHTS_NAME)
    config = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8")) | {"inference_mode": False}
    (adapter / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    https.put("sql", adapter)
    assert Adapter.load(location).digest == Adapter.load(adapter).digest
    assert contents(https, WEIGHTS_NAME) == 2
