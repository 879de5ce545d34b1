"""A running ``vllm serve`` with the requests that tests make of it, errors included."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from merged_lora.bench.launcher import VllmServer
from merged_lora.calibration import Exchange

PROMPT = "The quick brown fox"


class Server(VllmServer):
    """A server and a client of it; replies are pairs of a status and a body.

    api_key: the key that the server asks for and that every request carries.
    named: the keyword arguments of ``VllmServer``.
    """

    def __init__(self, model: Path, *arguments: str, api_key: str | None = None, **named: Any) -> None:
        key = [] if api_key is None else ["--api-key", api_key]
        super().__init__(model, *arguments, *key, **named)
        # A connection of its own for every request: several API servers share a port by connections.
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
            timeout=300,
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    def processes(self) -> list[int]:
        """Ids of the server's processes that are running: those of its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    def get(self, route: str) -> tuple[int, Any]:
        """Reply to a GET."""
        return self._ask("GET", route)

    def post(self, route: str, body: dict[str, Any] | bytes) -> tuple[int, Any]:
        """Reply to a POST."""
        return self._ask("POST", route, body if isinstance(body, bytes) else json.dumps(body).encode())

    def delete(self, route: str) -> tuple[int, Any]:
        """Reply to a DELETE."""
        return self._ask("DELETE", route)

    def _ask(self, method: str, route: str, body: bytes | None = None) -> tuple[int, Any]:
        reply = self._client.request(method, route, content=body)
        return reply.status_code, reply.json() if reply.text.startswith(("{", "[")) else reply.text or None

    def send(self, route: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """The whole reply to a POST, read to its end if it is a stream.

        headers: headers of the request, or others in the place of its own.
        """
        return self._client.post(route, json=body, headers=headers)

    def metrics(self) -> dict[str, float]:
        """The value of every Prometheus series, by its name and labels as they are written."""
        lines = self._client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {series: float(value) for series, value in pairs}

    def logprobs(self, model: str, prompt: str = PROMPT, **more: Any) -> list[float]:
        """Log-probabilities of eight greedy tokens.

        more: further fields of the request, or others in the place of these.
        """
        body = {"max_tokens": 8, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        status, reply = self.post("/v1/completions", {"model": model, "prompt": prompt} | body | more)
        assert status == 200, reply
        values: list[float] = reply["choices"][0]["logprobs"]["token_logprobs"]
        return values

    def exchange(self, model: str, prompt: list[int], tokens: int = 6) -> tuple[Exchange, list[float]]:
        """A prompt of token ids with a greedy answer, and the log-probabilities of its tokens."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "return_token_ids": True}
        body |= {"temperature": 0, "logprobs": 1, "ignore_eos": True}
        status, reply = self.post("/v1/completions", body)
        assert status == 200, reply
        (choice,) = reply["choices"]
        exchange = Exchange(tuple(prompt), tuple(choice["token_ids"]), fitted=False)
        return exchange, choice["logprobs"]["token_logprobs"]
