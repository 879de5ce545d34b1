"""A tiny model, its adapters and one running server for every test of this folder that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

import tiny
from making import random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench import cases
from merged_lora.calibration import Exchange
from merged_lora.engine import merge
from tiny import CALIBRATED, FLAGS, MAX_AD_HOC, MAX_RANK, SPECS, Place, importing_tests
from vllm_server import Server

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The tiny model and five adapters of it: one of higher rank, one of attention alone, two calibrated."""
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
    for name in CALIBRATED:
        tiny.calibrate(root / name, Exchange((10, 20, 30), (40, 50), fitted=False))
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
        "--merged-lora-playground",
        "--merged-lora-check",
        *("--merged-lora-max-ad-hoc", str(MAX_AD_HOC), "--enable-prompt-tokens-details"),
        *("--worker-extension-cls", "faults.Faults"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out"),
        log=root / "server.log",
        environment={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "MERGED_LORA_TESTS_HOLD": str(place.hold),
            **importing_tests(),
        },
    ) as running:
        yield running


# vLLM's layers without an engine; imported late, because most tests of this folder start no vLLM here


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """vLLM's configuration, with its process groups initialised for one process."""
    from slots import distributed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_HOST_IP", "127.0.0.1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        with distributed(tmp_path_factory.mktemp("distributed")) as made:
            yield made


@pytest.fixture
def activation_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's one hook into the activation of an adapter."""
    from vllm.lora.model_manager import LoRAModelManager

    from merged_lora.vllm_plugin.hooks.worker import wrap_activate_adapter

    original = vars(LoRAModelManager)["activate_adapter"]
    monkeypatch.setattr(LoRAModelManager, "activate_adapter", wrap_activate_adapter(original))


@pytest.fixture(scope="module")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model with experts, which has no weights."""
    from expert_layers import make_config

    return make_config(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def sources() -> dict[str, Adapter]:
    """The adapters that SPECS names, two of the modules in OTHERS, and one of a single module."""
    from slots import OTHERS

    return {
        "sql": cases.calibrated(tiny.make_adapter(1)),
        "chat": tiny.make_adapter(2, scaling=1.0),
        "tone": cases.calibrated(tiny.make_adapter(3)),
        "attention": tiny.make_adapter(4, only="self_attn"),
        "keys": tiny.make_adapter(5, only="0.self_attn.k_proj"),
        "ends": random_adapter(OTHERS, 8, torch.bfloat16, 6, embeddings=["model.embed_tokens"]),
        "tails": random_adapter(OTHERS, 8, torch.bfloat16, 7, embeddings=["model.embed_tokens"]),
    }
