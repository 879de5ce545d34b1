"""A stand-in for a served model that speaks OpenAI's API and vLLM's, with faults on demand.

pytest's ``pythonpath`` holds this folder: ``from openai_server import OpenAIServer``.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[str, Mapping[str, Any]], tuple[int, Mapping[str, Any], Mapping[str, str]] | None]


@dataclass
class OpenAIServer:
    """A server on a port of its own.

    answers: what a model answers, by its name and the prompt; the name backwards otherwise.
    likely:  the probability of each token of an answer, by model; 0.5 otherwise.
    models:  names, each with the model that it is an adapter of.
    fault:   status, body and headers instead of an answer, by path and body; None for none.
    rates:   whether it gives log-probabilities of prompts.
    raw:     text instead of an answer, by path.
    keys:    every header ``Authorization`` that came.
    asked:   how often each model was asked, by path and name.
    most:    the largest number of requests at a time.
    """

    answers: Callable[[str, str], str] = lambda model, prompt: model[::-1]
    likely: dict[str, float] = field(default_factory=dict)
    models: dict[str, str | None] = field(
        default_factory=lambda: {"base": None, "sql": "base", "chat": "base"}
    )
    fault: Fault = lambda path, body: None
    rates: bool = True
    raw: dict[str, str] = field(default_factory=dict)
    keys: set[str | None] = field(default_factory=set)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    most: int = 0

    def __post_init__(self) -> None:
        server, lock, busy = self, threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: of two, the second waits 40 ms for the client

            def do_GET(self) -> None:
                found = [{"id": n, "object": "model", "parent": p} for n, p in server.models.items()]
                self._reply(200, {"object": "list", "data": found}, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked[self.path, body["model"]] += 1
                    busy[0] += 1
                    server.most = max(server.most, busy[0])
                try:
                    wrong = server.fault(self.path, body)
                    self._reply(*(wrong or (200, server.reply(self.path, body), {})))
                finally:
                    with lock:
                        busy[0] -= 1

            def _reply(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
                server.keys.add(self.headers["Authorization"])
                data = (server.raw.get(self.path) or json.dumps(body)).encode()
                self.send_response(status)
                kind = "text/html" if server.raw.get(self.path, "").startswith("<") else "application/json"
                for name, value in {"Content-Type": kind, **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that give up

        self._httpd = Quiet(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}/v1"
        threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request: a token is a character."""
        model = body["model"]
        if path == "/tokenize":
            text = body.get("prompt") or self._chat(body["messages"], body["add_generation_prompt"])
            return {"tokens": [ord(c) for c in text], "count": len(text)}
        if path == "/v1/chat/completions":
            text = self.answers(model, body["messages"][-1]["content"])
            return {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        choice: dict[str, Any] = {"index": 0, "text": ""}
        if isinstance(body["prompt"], str):
            choice["text"] = self.answers(model, body["prompt"])
        elif self.rates and "prompt_logprobs" in body:
            entry = {"logprob": math.log(self.likely.get(model, 0.5))}
            choice["prompt_logprobs"] = [None, *({str(token): entry} for token in body["prompt"][1:])]
        return {"id": "1", "choices": [choice]}

    @staticmethod
    def _chat(messages: list[Mapping[str, str]], asks: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}$" for m in messages) + "<assistant>" * asks

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
