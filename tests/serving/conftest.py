"""A tiny model, its adapters and one running server for every test of this folder that takes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tiny
from merged_lora.engine import merge
from tiny import FLAGS, MAX_AD_HOC, MAX_RANK, SPECS, Place, importing_tests
from vllm_server import Server


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The tiny model, four adapters of it (one of higher rank, one of attention alone)."""
    root = tmp_path_factory.mktemp("serving")
    adapters = {
        "sql": tiny.make_adapter(1),
        "chat": tiny.make_adapter(2, scaling=1.0),
        "tone": tiny.make_adapter(3),
        "attention": tiny.make_adapter(4, only="self_attn"),
        "wide": tiny.make_adapter(5, rank=16),
    }
    for name, adapter in adapters.items():
        adapter.save(root / name)
    (root / "sources").mkdir()
    model = tiny.make_model(root / "model")
    return Place(model, {name: root / name for name in adapters}, root / "sources")


@pytest.fixture(scope="session")
def server(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the adapters, the offline twins of SPECS as plain adapters, and two aliases.

    Aliases and adapters can be changed at run time, and its workers heed the seeds of ``faults.py``.
    """
    root = tmp_path_factory.mktemp("offline")
    for name, spec in SPECS.items():
        merge(spec, place.adapters, rank=MAX_RANK).save(root / name)
    modules = {**place.adapters, **{name: root / name for name in SPECS}}
    with Server(
        place.model,
        *(*FLAGS, "--enable-merged-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2"),
        *("--max-cpu-loras", "3", "--lora-modules", *(f"{name}={path}" for name, path in modules.items())),
        *("--merged-lora-modules", "mix=ties(sql, chat, density=0.2)", "both = 0.5*sql + 0.5*chat"),
        *("--merged-lora-runtime-aliases", "--merged-lora-source-dir", str(place.sources)),
        *("--merged-lora-max-ad-hoc", str(MAX_AD_HOC), "--enable-prompt-tokens-details"),
        *("--worker-extension-cls", "faults.Faults"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
        log=root / "server.log",
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **importing_tests()},
    ) as running:
        yield running
