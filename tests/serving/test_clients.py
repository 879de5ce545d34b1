"""Clients of other projects ask a real server for a merge, in one piece and as a stream.

The OpenAI client is in the environment.  ``make clients`` installs the others into one of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients import folder_of
from vllm_server import Server

pytestmark = pytest.mark.engine

USUAL = "ties(0.7*sql, 0.3*chat, density=0.4)"
PLAIN = "ties(0.7 sql + 0.3 chat; density 0.4)"
"""The same merge in the spelling for gateways."""

OPENAI = """
import json, sys
from openai import OpenAI
url, model = sys.argv[1:]
client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
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


def printed(command: list[str], server: Server, model: str) -> object:
    """The JSON that a client's program prints."""
    quiet = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [*command, server.url, model], capture_output=True, text=True, timeout=240, env=quiet
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
    assert printed([sys.executable, "-c", OPENAI], server, model) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("model", [USUAL, PLAIN])
@pytest.mark.parametrize("client", OTHERS)
def test_a_client_in_python_gets_a_merge(server: Server, client: str, model: str) -> None:
    python = str(installed() / "bin" / "python")
    expected = answer(server, USUAL)
    assert printed([python, "-c", OTHERS[client]], server, model) == [expected, expected]


@pytest.mark.soak
def test_a_router_with_a_wildcard_gets_a_merge_in_the_spelling_for_gateways(server: Server) -> None:
    python = str(installed() / "bin" / "python")
    expected = answer(server, USUAL)
    assert printed([python, "-c", LITELLM_ROUTER], server, PLAIN) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("model", [USUAL, PLAIN])
def test_a_client_in_javascript_gets_a_merge(server: Server, model: str) -> None:
    folder, node = installed(), shutil.which("node")
    if node is None or not (folder / "node_modules").is_dir():
        pytest.skip("there is no node here, or was no npm when make clients ran")
    program = folder / "ask.mjs"
    program.write_text(AI_SDK, encoding="utf-8")
    expected = answer(server, USUAL)
    assert printed([node, str(program)], server, model) == [expected, expected]


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_linear", "dare_ties"])
def test_the_fields_of_loraxs_client_are_taken_as_they_are(server: Server, strategy: str) -> None:
    fields = printed([str(installed() / "bin" / "python"), "-c", LORAX], server, strategy)
    assert isinstance(fields, dict)
    assert set(fields) == {"ids", "weights", "merge_strategy", "density", "majority_sign_method"}
    density = "" if strategy == "linear" else ", density=0.4"
    expected = answer(server, f"{strategy}(0.7*sql, 0.3*chat{density})")
    assert answer(server, "base", merged_adapters=fields) == expected
