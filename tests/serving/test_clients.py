"""Clients of other projects ask a real server for a merge, in one piece and as a stream.

The OpenAI client is in the environment.  ``make clients`` installs the others into environments of their own,
with LiteLLM's proxy, which stands between a client and the server, and lm-eval.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from clients import folder_of
from fences import all_blocks, commands_of
from vllm_server import Server

pytestmark = pytest.mark.engine

USUAL = "ties(0.7*sql, 0.3*chat, density=0.4)"
PLAIN = "ties(0.7 sql + 0.3 chat; density 0.4)"
"""The same merge in the spelling for gateways."""

OPENAI = """
import json, sys
from openai import OpenAI
url, model = sys.argv[1:]
client = OpenAI(base_url=url + "/v1", max_retries=0)
asked = dict(model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0)
plain = client.chat.completions.create(**asked).choices[0].message.content
stream = client.chat.completions.create(stream=True, **asked)
print(json.dumps([plain, "".join(part.choices[0].delta.content or "" for part in stream if part.choices)]))
"""
ANTHROPIC = """
import json, sys
from anthropic import Anthropic
url, model = sys.argv[1:]
client = Anthropic(base_url=url, api_key="none", max_retries=0)
hello = [{"role": "user", "content": "hello"}]
asked = dict(model=model, messages=hello, max_tokens=4, extra_body={"temperature": 0})
plain = client.messages.create(**asked).content[0].text
with client.messages.stream(**asked) as stream:
    print(json.dumps([plain, "".join(stream.text_stream)]))
"""
LITELLM = """
import json, sys
import litellm
url, model = sys.argv[1:]
hello = [{"role": "user", "content": "hello"}]
asked = dict(messages=hello, max_tokens=4, temperature=0, api_base=url + "/v1", api_key="none")
asked["model"] = "openai/" + model
plain = litellm.completion(**asked).choices[0].message.content
stream = litellm.completion(stream=True, **asked)
print(json.dumps([plain, "".join(part.choices[0].delta.content or "" for part in stream)]))
"""
LITELLM_ROUTER = """
import json, sys
import litellm
url, model = sys.argv[1:]
to = {"model": "openai/*", "api_base": url + "/v1", "api_key": "none"}
router = litellm.Router(model_list=[{"model_name": "merges/*", "litellm_params": to}], num_retries=0)
hello = [{"role": "user", "content": "hello"}]
asked = dict(model="merges/" + model, messages=hello, max_tokens=4, temperature=0)
plain = router.completion(**asked).choices[0].message.content
stream = router.completion(stream=True, **asked)
print(json.dumps([plain, "".join(part.choices[0].delta.content or "" for part in stream)]))
"""
LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
url, model = sys.argv[1:]
asked = dict(temperature=0, max_tokens=4, max_retries=0)
client = ChatOpenAI(model=model, base_url=url + "/v1", api_key="none", **asked)
print(json.dumps([client.invoke("hello").content, "".join(part.content for part in client.stream("hello"))]))
"""
LLAMA_INDEX = """
import json, sys
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
url, model = sys.argv[1:]
asked = dict(is_chat_model=True, temperature=0, max_tokens=4, max_retries=0)
client = OpenAILike(model=model, api_base=url + "/v1", api_key="none", **asked)
hello = [ChatMessage(role="user", content="hello")]
plain = client.chat(hello).message.content
print(json.dumps([plain, "".join(part.delta or "" for part in client.stream_chat(hello))]))
"""
AI_SDK = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const [url, model] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "vllm", baseURL: url + "/v1", apiKey: "none" });
const asked = { model: provider.chatModel(model), prompt: "hello", temperature: 0 };
const limits = { maxOutputTokens: 4, maxRetries: 0 };
const plain = (await generateText({ ...asked, ...limits })).text;
let streamed = "";
for await (const part of streamText({ ...asked, ...limits }).textStream) streamed += part;
console.log(JSON.stringify([plain, streamed]));
"""
LORAX = """
import json, sys
from lorax.types import MergedAdapters
url, strategy = sys.argv[1:]
fields = dict(merge_strategy=strategy, density=0.4, majority_sign_method="total")
print(MergedAdapters(ids=["sql", "chat"], weights=[0.7, 0.3], **fields).model_dump_json())
"""

OTHERS = {
    "anthropic": ANTHROPIC,
    "langchain": LANGCHAIN,
    "litellm": LITELLM,
    "llama-index": LLAMA_INDEX,
}


def answer(server: Server, model: str, **more: object) -> str:
    """What the server itself answers."""
    hello = [{"role": "user", "content": "hello"}]
    asked = {"model": model, "messages": hello, "max_tokens": 4, "temperature": 0}
    status, reply = server.post("/v1/chat/completions", asked | more)
    assert status == 200, reply
    text: str = reply["choices"][0]["message"]["content"]
    return text


def environment(**more: str) -> dict[str, str]:
    """The environment of other projects' programs, which reach nothing but this machine."""
    home = os.environ.get("HOME", "/")
    return {"PATH": os.environ["PATH"], "HOME": home, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", **more}


def printed(command: list[str], url: str, model: str, key: str = "none") -> object:
    """The JSON that a client's program prints."""
    env = environment(OPENAI_API_KEY=key)
    done = subprocess.run([*command, url, model], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def completed(server: Server, model: str, prompt: str) -> str:
    """What the server itself answers to a prompt without a chat."""
    asked = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    status, reply = server.post("/v1/completions", asked)
    assert status == 200, reply
    text: str = reply["choices"][0]["text"]
    return text


def installed() -> Path:
    """The environment of the clients.  Skips the test if there is none."""
    folder = folder_of(Path(sys.prefix))
    if not (folder / "installed").is_file():
        pytest.skip("other projects' clients are not installed: make clients")
    return folder


@pytest.mark.parametrize("model", [USUAL, PLAIN])
def test_the_openai_client_gets_a_merge(server: Server, model: str) -> None:
    expected = answer(server, USUAL)
    assert expected != answer(server, "base")
    assert printed([sys.executable, "-c", OPENAI], server.url, model) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("model", [USUAL, PLAIN])
@pytest.mark.parametrize("client", OTHERS)
def test_a_client_in_python_gets_a_merge(server: Server, client: str, model: str) -> None:
    python = str(installed() / "bin" / "python")
    expected = answer(server, USUAL)
    assert printed([python, "-c", OTHERS[client]], server.url, model) == [expected, expected]


@pytest.mark.soak
def test_a_router_with_a_wildcard_gets_a_merge_in_the_spelling_for_gateways(server: Server) -> None:
    python = str(installed() / "bin" / "python")
    expected = answer(server, USUAL)
    assert printed([python, "-c", LITELLM_ROUTER], server.url, PLAIN) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("model", [USUAL, PLAIN])
def test_a_client_in_javascript_gets_a_merge(server: Server, model: str) -> None:
    folder, node = installed(), shutil.which("node")
    if node is None or not (folder / "node_modules").is_dir():
        pytest.skip("there is no node here, or was no npm when make clients ran")
    program = folder / "ask.mjs"
    program.write_text(AI_SDK, encoding="utf-8")
    expected = answer(server, USUAL)
    assert printed([node, str(program)], server.url, model) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_the_fields_of_loraxs_client_are_taken_as_they_are(server: Server, strategy: str) -> None:
    fields = printed([str(installed() / "bin" / "python"), "-c", LORAX], server.url, strategy)
    assert isinstance(fields, dict)
    assert set(fields) == {"ids", "weights", "merge_strategy", "density", "majority_sign_method"}
    density = "" if strategy == "linear" else ", density=0.4"
    expected = answer(server, f"{strategy}(0.7*sql, 0.3*chat{density})")
    assert answer(server, "base", merged_adapters=fields) == expected


# LiteLLM's proxy


@dataclass(frozen=True)
class Proxy:
    """A proxy between a client and the server, and the key that it asks for."""

    url: str
    key: str

    def post(self, model: str) -> httpx.Response:
        """The reply to a request for a model."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        headers = {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(trust_env=False, timeout=240) as client:
            return client.post(
                f"{self.url}/v1/chat/completions", json=body | {"temperature": 0}, headers=headers
            )


@pytest.fixture(scope="module")
def proxy(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """LiteLLM's proxy with a wildcard model, ``merges/*``, and an alias under a name of its own, ``team``."""
    program, folder = installed() / "litellm-proxy" / "bin" / "litellm", tmp_path_factory.mktemp("proxy")
    to = {"api_base": f"{server.url}/v1", "api_key": "none"}
    models = [
        {"model_name": "merges/*", "litellm_params": {"model": "openai/*", **to}},
        {"model_name": "team", "litellm_params": {"model": "openai/mix", **to}},
    ]
    (folder / "config.yaml").write_text(json.dumps({"model_list": models}), encoding="utf-8")  # JSON is YAML
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Proxy(f"http://127.0.0.1:{port}", f"sk-{secrets.token_hex(24)}")
    env = environment(LITELLM_MASTER_KEY=made.key, LITELLM_LOCAL_MODEL_COST_MAP="True")
    flags = ("--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *flags], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        wait_for(f"{made.url}/health/liveliness", process, folder / "log")
        yield made
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process answers."""
    end = time.monotonic() + 240
    while True:
        with suppress(httpx.TransportError), httpx.Client(trust_env=False) as client:
            if client.get(url).status_code == 200:
                return
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.5)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("asked", "merge"),
    [
        (f"merges/{PLAIN}", USUAL),
        ("merges/0.7*sql + 0.3*chat", "0.7*sql + 0.3*chat"),
        ("merges/mix", "mix"),
        ("team", "mix"),
    ],
)
def test_a_proxy_passes_on_names_without_a_comma(
    server: Server, proxy: Proxy, asked: str, merge: str
) -> None:
    expected = answer(server, merge)
    program = [sys.executable, "-c", OPENAI]
    assert printed(program, proxy.url, asked, proxy.key) == [expected, expected]
    assert re.match(r'"\w+";new=0;ms=', proxy.post(asked).headers["llm_provider-merged-lora"])


@pytest.mark.soak
def test_a_proxy_splits_a_name_at_its_commas(server: Server, proxy: Proxy) -> None:
    parts = proxy.post(f"merges/{USUAL}").json()  # with status 200
    assert [part["model"] for part in parts] == ["openai/ties(0.7*sql", "0.3*chat", "density=0.4)"]
    assert [part["status_code"] for part in parts] == [400, 400, 400]


# lm-eval


TASK = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"max_gen_toks": 4, "until": ["<eos>"]},
    "metric_list": [{"metric": "exact_match"}],
}


def benchmarks() -> list[list[str]]:
    """The commands of the page about evaluations, without the program's name."""
    blocks = [block for block in all_blocks("bash") if block.page == "docs/eval.md"]
    commands = [command for block in blocks for command in commands_of(block.text)]
    return [command[1:] for command in commands if command[0] == "lm-eval"]


def evaluated(folder: Path, url: str, command: list[str], questions: list[str]) -> list[str]:
    """The answers that lm-eval gets to these questions.

    folder:  for its files.
    url:     of the server, instead of that in the command.
    command: its arguments; their task is replaced by one of these questions.
    """
    lines = [json.dumps({"question": question, "answer": "-"}) for question in questions]
    (folder / "tiny.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}}}
    (folder / "tiny.yaml").write_text(json.dumps(TASK | data), encoding="utf-8")
    given = [word.replace("http://localhost:8000", url) for word in command]
    given[given.index("--tasks") + 1] = "tiny"
    program = str(installed() / "lm-eval" / "bin" / "lm-eval")
    more = ["--log_samples", "--include_path", str(folder), "--output_path", str(folder / "out")]
    env = environment(HF_HOME=str(folder / "cache"), OPENAI_API_KEY="none")
    done = subprocess.run([program, *given, *more], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (samples,) = folder.glob("out/**/samples_tiny_*.jsonl")
    found = {
        sample["doc"]["question"]: sample["resps"][0][0]
        for sample in map(json.loads, samples.read_text(encoding="utf-8").splitlines())
    }
    return [found[question] for question in questions]


QUESTIONS = ["one", "two", "three", "four"]


@pytest.mark.soak
@pytest.mark.parametrize("command", benchmarks(), ids=lambda command: command[command.index("--model") + 1])
def test_a_benchmark_of_the_page_asks_for_a_merge(server: Server, tmp_path: Path, command: list[str]) -> None:
    model = next(word for word in command if word.startswith("model=")).removeprefix("model=")
    chat = "local-chat-completions" in command
    expected = [
        answer(server, model, messages=[{"role": "user", "content": question}])
        if chat
        else completed(server, model, question)
        for question in QUESTIONS
    ]
    assert evaluated(tmp_path, server.url, command, QUESTIONS) == expected


@pytest.mark.soak
@pytest.mark.parametrize("model", [USUAL, PLAIN])
def test_an_evaluation_asks_for_a_merge(server: Server, tmp_path: Path, model: str) -> None:
    to = f"base_url={server.url}/v1/completions,tokenizer_backend=None,tokenized_requests=False"
    command = ["run", "--model", "local-completions", "--tasks", "-", "--model_args", f"model={model},{to}"]
    expected = [completed(server, USUAL, question) for question in QUESTIONS]
    assert evaluated(tmp_path, server.url, command, QUESTIONS) == expected
