"""Start real servers on a new GPU: are their answers right, what does a merge cost, what memory is left.

    python -m merged_lora.bench.first_day_server --json FOLDER

A model of Llama-3-8B's shape with dummy weights, random adapters and a tokenizer of bytes are made on the
spot; nothing is installed or downloaded.  This needs a checkout, and vLLM on the path.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
import time
import tomllib
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import merged_lora
from merged_lora.adapters import Adapter
from merged_lora.engine import merge
from merged_lora.factors import Factors
from merged_lora.files.layout import Header

from . import cases, machine, serve, serving
from .launcher import VllmServer
from .recording import FAILED, WRONG, Record
from .timing import once

FILE = "first-day-server.json"
MINUTES = 9.5
SPEC, OTHER = "ties(0.7*sql, 0.3*tone, density=0.5)", "linear(0.4*json, 0.6*tone)"
WIDE = "ties(0.7*sql32, 0.3*tone32, density=0.5)"
SPACES = (
    "svd(sql, json)",
    "core_ties(sql, json, tone)",
    "knots(sql, json)",
    "ties_svd(sql, json, density=0.3)",
)
"""A merge in each space but that of the factors."""
LOUDNESS = 32.0
"""Scale of the adapters: dummy weights are at most 1e-3, and what adapters add must not be lost in them."""
LOGIT_SCALE = 1e5
"""Brings the logits of dummy weights, about 1e-5, to where log-probabilities tell models apart."""


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture, Llama-3-8B by default, and the rank of its adapters."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    rank: int = 16

    def modules(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of every linear module."""
        narrow = self.kv_heads * (self.hidden // self.heads)
        wide, inner = self.hidden, self.intermediate
        layer = {
            "self_attn.q_proj": (wide, wide),
            "self_attn.k_proj": (narrow, wide),
            "self_attn.v_proj": (narrow, wide),
            "self_attn.o_proj": (wide, wide),
            "mlp.gate_proj": (inner, wide),
            "mlp.up_proj": (inner, wide),
            "mlp.down_proj": (wide, inner),
        }
        return {
            f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()
        }


@dataclass(frozen=True)
class Work:
    """What is served, how, and how often it is requested.

    flags: flags of every vLLM here.
    gpu_gib: the setting whose cost in cache is measured.
    start_seconds: how long a server may take to answer.
    invariant: whether one server runs with ``VLLM_BATCH_INVARIANT=1``.
    """

    shape: Shape
    dtype: str
    flags: tuple[str, ...]
    requests: int
    gpu_gib: float
    start_seconds: float
    invariant: bool = True


class Steps:
    """Steps that are done one after the other until the minutes are over, and recorded."""

    def __init__(self, record: Record, minutes: float) -> None:
        self._record = record
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the minutes are over."""
        return self._end - time.monotonic()

    def do(self, name: str, step: Callable[[], Mapping[str, Any]], seconds: float = 0.0) -> bool:
        """Do a step unless fewer seconds are left than it needs, and return whether nothing went wrong.

        What it returns is recorded; ``wrong`` in it lists what is not as it must be.  If it raises, the
        traceback is recorded.
        """
        if self.left < seconds:
            self._record.add("not_reached", name)
            return False
        begin, state = time.monotonic(), "ok"
        try:
            found = dict(step())
            if found.get("wrong"):
                state = WRONG
        except Exception as error:  # it is reported, and the next step is done
            first = f"{type(error).__name__}: {error}".splitlines()[0]
            state, found = FAILED, {"error": first, "text": traceback.format_exc()}
        took = time.monotonic() - begin
        self._record.add("steps", {"name": name, "state": state, "seconds": took, **found})
        print(f"  {state:8}{took:6.1f} s  {name}", flush=True)
        return state == "ok"


def has_failed(data: Mapping[str, Any]) -> bool:
    """Whether a step failed or found something wrong."""
    return any(step["state"] != "ok" for step in data["steps"])


def run(folder: Path, work: Work, minutes: float = MINUTES) -> int:
    """Do what the minutes allow and return the exit code, 1 if anything failed."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(
        folder / FILE, environment=machine.environment(), work=asdict(work), steps=[], not_reached=[]
    )

    def spend() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            Day(work, Steps(record, minutes), folder, Path(temporary)).spend()

    return record.run(spend, partial(has_failed, record.data), partial(_show, record.data))


class Day:
    """The steps, in the order of their value."""

    def __init__(self, work: Work, steps: Steps, folder: Path, made: Path) -> None:
        self._work = work
        self._steps = steps
        self._folder = folder
        self._made = made
        self._adapters: dict[str, Path] = {}

    def spend(self) -> None:
        """Do all of them."""
        do, start = self._steps.do, self._work.start_seconds / 4
        if not do("model, adapters and merges on disk", self._make):
            return
        with ExitStack() as both:
            servers: dict[str, VllmServer] = {}

            def open_server(name: str, *flags: str) -> dict[str, Any]:
                servers[name] = both.enter_context(self._server(name, *flags))
                return cache_of(servers[name])

            if do("server with the plugin", partial(open_server, "on", "--enable-merged-lora"), start):
                client = serving.connect(servers["on"])
                do("a merge beside its twin on disk, and slots that are used again", partial(answers, client))
                do("two merges in one batch", partial(in_one_batch, client))
                do("adapters in float32", partial(in_float32, client))
                do("merges in other spaces", partial(in_spaces, client))
                if do("server without the plugin", partial(open_server, "off", "--enable-lora"), start):
                    self._times(servers["on"], servers["off"])
        if self._work.invariant:
            do("server with VLLM_BATCH_INVARIANT=1", self._invariant, start)
        gib = f"--merged-lora-gpu-gib {self._work.gpu_gib:g}"
        do(f"server with {gib}", partial(self._with_gib, *gib.split()), start)

    def _times(self, on: VllmServer, off: VllmServer) -> None:
        """What ``bench serve`` measures, part by part."""
        bench = serve.Bench(serve.Work(self._work.requests), on, off, {})

        def part(measure: Callable[[], None], *names: str) -> dict[str, Any]:
            measure()
            return {name: asdict(bench.report)[name] for name in names}

        do = self._steps.do
        do("throughput of plain adapters", partial(part, bench.speeds, "speed"))
        do("warm requests and first ones", partial(part, bench.singles, "warm", "first"))
        do("stall of a stream", partial(part, bench.streams, "gaps"))

    def _server(self, name: str, *flags: str, environment: Mapping[str, str] | None = None) -> VllmServer:
        """A server of all adapters, which runs this checkout's code."""
        folders = dict(self._adapters)
        if name == "off":
            every = list(serving.NAMES)
            folders |= {f"copy{i}": folders[every[i % len(every)]] for i in range(serve.COPIES)}
        path = [str(self._made / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return VllmServer(
            self._made / "model",
            *("--load-format", "dummy", "--dtype", self._work.dtype, "--max-model-len", "512"),
            *("--max-num-seqs", "8", "--max-lora-rank", str(4 * self._work.shape.rank)),
            *("--no-enable-prefix-caching", "--max-loras", str(serve.SLOTS)),
            *("--max-cpu-loras", str(serve.SLOTS), *self._work.flags, *flags, *serving.modules(folders)),
            log=self._folder / f"server-{name}.log",
            environment={"PYTHONPATH": os.pathsep.join(path), **(environment or {})},
            start_seconds=min(self._work.start_seconds, self._steps.left),
        )

    def _make(self) -> dict[str, Any]:
        write_model(self._made / "model", self._work.shape)
        lay_out_package(self._made / "site")
        for name, adapter in random_adapters(self._work.shape).items():
            adapter.save(self._made / name)
            self._adapters[name] = self._made / name
        for name, spec in (("twin", SPEC), ("twin32", WIDE)):
            merge(spec, self._adapters).save(self._made / name)
            self._adapters[name] = self._made / name
        return {"bytes of an adapter": sum(f.stat().st_size for f in self._adapters["sql"].iterdir())}

    def _invariant(self) -> dict[str, Any]:
        environment = {"VLLM_BATCH_INVARIANT": "1"}
        with self._server("invariant", "--enable-merged-lora", environment=environment) as server:
            client = serving.connect(server)
            return cache_of(server) | answers(client) | {"batch": in_one_batch(client)}

    def _with_gib(self, *flags: str) -> dict[str, Any]:
        with self._server("gib", "--enable-merged-lora", *flags) as server:
            return cache_of(server) | answers(serving.connect(server))


def cache_of(server: VllmServer) -> dict[str, Any]:
    """The size of a server's KV cache by its metrics, and the seconds until it was ready."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as reply:
        return {**cache_size(reply.read().decode()), "ready after": server.ready_after}


def cache_size(metrics: str) -> dict[str, int]:
    """The size of the KV cache in the text that vLLM serves to Prometheus."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name.startswith("vllm:cache_config_info") else ():
            blocks, size = (int(sample.labels[name]) for name in ("num_gpu_blocks", "block_size"))
            return {"cache blocks": blocks, "cache tokens": blocks * size}
    raise LookupError("vllm:cache_config_info is not in the server's metrics")


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of log-probabilities; NaN if one is NaN."""
    return float(np.abs(np.subtract(one, other)).max())


def answers(client: OpenAI) -> dict[str, Any]:
    """Compare a merge's log-probabilities with those of its twin on disk, before and after slots were reused.

    Requests come one at a time, so the same weights must give the same numbers.
    """
    asked = [SPEC, "sql", "twin", OTHER, "json", SPEC]
    first, plain, twin, other, _, again = (serving.logprobs(client, name) for name in asked)
    same = {"merge - twin": apart(first, twin), "merge - merge after others": apart(first, again)}
    different = {"merge - plain adapter": apart(first, plain), "merge - other merge": apart(first, other)}
    wrong = [name for name, value in same.items() if value != 0]
    wrong += [f"{name} is 0" for name, value in different.items() if value == 0]
    return {"log-probabilities apart": same | different, "wrong": wrong}


def in_one_batch(client: OpenAI) -> dict[str, Any]:
    """Compare two merges in one batch with each alone: each must be nearer to itself than to the other.

    A batch of two may take other kernels than one of one, and so give other numbers; a mixed-up slot gives
    the other's.
    """
    ask = partial(serving.logprobs, client, tokens=64)
    alone = {spec: ask(spec) for spec in (SPEC, OTHER)}
    with ThreadPoolExecutor(len(alone)) as pool:
        together = dict(zip(alone, pool.map(ask, alone), strict=True))
    found, wrong = {}, []
    # Beyond the first tokens a greedy answer may go another way after one near tie.
    few = 4
    for spec, other in ((SPEC, OTHER), (OTHER, SPEC)):
        own, foreign = (apart(together[spec][:few], alone[name][:few]) for name in (spec, other))
        found[spec] = {"from itself alone": own, "from the other alone": foreign}
        if not own < foreign:
            wrong.append(spec)
    return {"log-probabilities apart": found, "wrong": wrong}


def in_float32(client: OpenAI) -> dict[str, Any]:
    """Compare a merge of float32 adapters, as PEFT trains them, with its twin, and time its first tokens."""
    first, again = (once(partial(serving.complete, client, WIDE)) for _ in range(2))
    difference = apart(serving.logprobs(client, WIDE), serving.logprobs(client, "twin32"))
    wrong = ["merge - twin"] if difference != 0 else []
    found = {"log-probabilities apart": {"merge - twin": difference}, "wrong": wrong}
    return {"first": first, "again": again, **found}


def in_spaces(client: OpenAI) -> dict[str, Any]:
    """Seconds of the first token and of one more, for a merge in each space."""
    return {
        "first and again": {
            spec: [once(partial(serving.complete, client, spec)) for _ in range(2)] for spec in SPACES
        }
    }


def random_adapters(shape: Shape) -> dict[str, Adapter]:
    """Adapters of every linear module, by name: three in bfloat16, two of them in float32 too.

    Every layer has the first one's numbers, rolled by one more column, as drawing all takes minutes.
    """
    made = {}
    first = replace(shape, layers=1).modules()
    sources = cases.random_sources(first, len(serving.NAMES), shape.rank, torch.float32)
    for name, source in zip(serving.NAMES, sources.values(), strict=True):
        for suffix, dtype in (("", torch.bfloat16), ("32", torch.float32)):
            factors = {
                module.replace("layers.0.", f"layers.{i}."): Factors(
                    f.a.to(dtype).roll(i, 1), f.b.to(dtype).roll(i, 0), LOUDNESS * f.scaling
                )
                for i in range(shape.layers)
                for module, f in source.modules.items()
            }
            made[name + suffix] = Adapter(factors, Header(base_model="dummy", task_type="CAUSAL_LM"))
    del made["json32"]
    return made


def write_model(folder: Path, shape: Shape) -> None:
    """Write the configuration of a Llama, and a tokenizer whose first 256 tokens are the bytes."""
    last = shape.vocabulary - 1
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-12,  # dummy weights are small
        "logit_scale": LOGIT_SCALE,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": last - 1,
        "eos_token_id": last,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokens = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens |= {f"<{i}>": i for i in range(len(tokens), last - 1)} | {"<bos>": last - 1, "<eos>": last}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make_tokenizer: Any = PreTrainedTokenizerFast
    make_tokenizer(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>").save_pretrained(folder)


def lay_out_package(folder: Path) -> None:
    """Lay out this checkout as if it were installed: a link to the package, and the plugin's entry point.

    With the checkout itself on PYTHONPATH, vLLM would take ``triton_kernels`` for a package of that name.
    """
    project = tomllib.loads((serving.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder.mkdir(exist_ok=True)
    (folder / "merged_lora").symlink_to(serving.ROOT / "merged_lora")
    name, version = project["name"], merged_lora.__version__
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _show(data: Mapping[str, Any]) -> None:
    """Print the short table at the end."""
    verdict = FAILED if has_failed(data) else data["state"]
    about = data["environment"]
    print(f"\n{verdict}: {about['gpu']}, vLLM {about['vllm']}, torch {about['torch']}")
    for step in data["steps"]:
        line = f"  {step['state']:8}{step['name']}"
        if "cache tokens" in step:
            line += f": {step['cache tokens']} tokens of KV cache, ready after {step['ready after']:.0f} s"
        if "log-probabilities apart" in step:
            line += f": {step['log-probabilities apart']}"
        print(line)
        if step["state"] == FAILED:
            print(f"          {step['error']}")
    for name in data["not_reached"]:
        print(f"  not reached: {name}")


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, do the steps and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m merged_lora.bench.first_day_server", description="Real servers on a GPU's first day."
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FOLDER", help="gets results and logs")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help=f"{MINUTES} by default")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="of each kind; 8 by default")
    parser.add_argument("--dtype", default="bfloat16", help="of the model; bfloat16 by default")
    parser.add_argument(
        "--flags",
        type=shlex.split,
        default=["--gpu-memory-utilization", "0.42"],
        help="of every vLLM, in one argument; --gpu-memory-utilization 0.42 by default, as two share a GPU",
    )
    parser.add_argument("--gpu-gib", type=float, default=4.0, metavar="GIB", help="4 by default")
    parser.add_argument(
        "--no-invariant",
        dest="invariant",
        action="store_false",
        help="without the server with VLLM_BATCH_INVARIANT=1, which vLLM's CPU build cannot run",
    )
    parser.add_argument("--start-seconds", type=float, default=240.0, metavar="S", help="240 by default")
    for entry in fields(Shape):
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=int,
            default=entry.default,
            metavar="N",
            help="of the model",
        )
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf or options.requests < 2:
        parser.error("--minutes must be above 0, and --requests at least 2")
    shape = Shape(**{entry.name: getattr(options, entry.name) for entry in fields(Shape)})
    work = Work(
        shape,
        options.dtype,
        tuple(options.flags),
        options.requests,
        options.gpu_gib,
        options.start_seconds,
        options.invariant,
    )
    return run(options.json, work, options.minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
