"""Asks a served model for answers, and how likely right ones are; speaks OpenAI's API, and vLLM's beyond it.

Knows nothing of tasks or of merges: a model is a name.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from merged_lora.errors import EvaluationError, listed
from merged_lora.names import shortened
from merged_lora.prompts import Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ATTEMPTS = 6
"""How often the client asks again after status 408, 409, 429 or one from 500, or if the connection broke."""
TIMEOUT = 600.0
"""Seconds for an answer with all attempts, which a new merge may have to be made for."""


class RefusedError(EvaluationError):
    """The server refuses this model, or this prompt; others may do."""


class NoLikelihoodError(EvaluationError):
    """The server cannot say how likely an answer is."""


@dataclass(frozen=True)
class Likelihood:
    """How likely an answer is.

    log_likelihood: sum over its tokens, in nats.
    tokens:         their number, with the one that ends the answer.
    """

    log_likelihood: float
    tokens: int


def check_number(what: str, number: object) -> None:
    """Raise EvaluationError unless this is a whole number of at least 1."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise EvaluationError(f"the number of {what} must be at least 1, got {number!r}")


class Served:
    """A server.

    base_url:    of OpenAI's API, such as ``http://localhost:8000/v1``.
    api_key:     None for that in the environment variable OPENAI_API_KEY.
    concurrency: requests at a time.
    requests:    how many it has answered.

    Raises EvaluationError without the package openai, of the extra ``eval``.
    """

    def __init__(self, base_url: str, api_key: str | None = None, concurrency: int = 8) -> None:
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise EvaluationError(
                f"asking a server needs the package openai, which cannot be imported ({error}): "
                "pip install 'vllm-merged-lora[eval]'"
            ) from None
        split = urlsplit(base_url)
        if split.scheme not in ("http", "https") or not split.netloc:
            raise EvaluationError(f"{base_url!r} is no address of a server, such as http://localhost:8000/v1")
        check_number("requests at a time", concurrency)
        self.base_url = base_url.rstrip("/")
        self._root = f"{split.scheme}://{split.netloc}{split.path.rstrip('/').removesuffix('/v1')}"
        self._client: AsyncOpenAI = AsyncOpenAI(
            base_url=self.base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=ATTEMPTS,
            timeout=Timeout(None, connect=10.0),  # that of all attempts together is in _asking
        )
        self._free = asyncio.Semaphore(concurrency)
        self.requests = 0
        self._tokens: dict[str, tuple[list[int], list[int]]] = {}

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def models(self) -> Mapping[str, str | None]:
        """The names that the server lists, each with the model that it is an adapter of."""
        hasty: Any = self._client.with_options(max_retries=0)  # a mistaken address is known at once
        try:
            async with self._asking("the list of models", attempts=0):
                found = await hasty.models.list()
                return {each.id: getattr(each, "parent", None) for each in found.data}
        except RefusedError as error:
            raise EvaluationError(
                f"{self.base_url} has no list of models ({error}); the address of a server ends in /v1"
            ) from None

    async def answer(self, model: str, prompt: Prompt, limit: int) -> str:
        """What a model answers, greedily.

        limit: largest number of tokens.

        Raises RefusedError if the server refuses the model or the prompt, and EvaluationError if it fails.
        """
        client: Any = self._client
        async with self._asking(model):
            if isinstance(prompt, str):
                reply = await client.completions.create(
                    model=model, prompt=prompt, max_tokens=limit, temperature=0.0
                )
                return str(reply.choices[0].text or "")
            reply = await client.chat.completions.create(
                model=model, messages=prompt, max_tokens=limit, temperature=0.0
            )
            return str(reply.choices[0].message.content or "")

    async def tokens(self, model: str, prompt: Prompt, answer: str) -> tuple[list[int], list[int]]:
        """The token ids of a prompt, and of the answer with the token that ends it in a chat.

        Raises NoLikelihoodError if the server does not tokenize.
        """
        if isinstance(prompt, str):
            asked = await self._tokenize(model, prompt=prompt)
            return asked, await self._tokenize(model, prompt=answer, add_special_tokens=False)
        asked = await self._tokenize(model, messages=prompt, add_generation_prompt=True)
        reply = {"role": "assistant", "content": answer}
        whole = await self._tokenize(model, messages=[*prompt, reply], add_generation_prompt=False)
        alone = await self._tokenize(model, prompt=answer, add_special_tokens=False)
        given = whole[len(asked) :]
        if whole[: len(asked)] != asked or given[: len(alone)] != alone:
            return asked, alone  # a template that changes an answer, or the prompt
        return asked, given[: len(alone) + 1]

    async def likelihood(self, model: str, asked: Sequence[int], answer: Sequence[int]) -> Likelihood:
        """How likely an answer to a prompt is, both as token ids.

        Raises RefusedError and EvaluationError as :meth:`answer` does, and NoLikelihoodError if the server
        gives no log-probabilities of prompts, or if the answer has no tokens.
        """
        if not answer:
            raise NoLikelihoodError("an answer without any token has no likelihood")
        client: Any = self._client
        async with self._asking(model):
            reply = await client.completions.create(
                model=model,
                prompt=[*asked, *answer],
                max_tokens=1,
                temperature=0.0,
                extra_body={"prompt_logprobs": 0},
            )
            rated = getattr(reply.choices[0], "prompt_logprobs", None)
            if not isinstance(rated, list) or len(rated) != len(asked) + len(answer):
                raise NoLikelihoodError(f"{self.base_url} gives no log-probabilities of prompts")
            own = zip(answer, rated[len(asked) :], strict=True)
            return Likelihood(
                sum(float(entries[str(token)]["logprob"]) for token, entries in own), len(answer)
            )

    async def likelihood_of(self, model: str, prompt: Prompt, answer: str) -> Likelihood:
        """How likely an answer to a prompt is; their tokens, the same for all models, are asked for once.

        Raises what :meth:`tokens` and :meth:`likelihood` raise.
        """
        key = json.dumps([prompt, answer])
        if key not in self._tokens:
            self._tokens[key] = await self.tokens(model, prompt, answer)
        return await self.likelihood(model, *self._tokens[key])

    async def _tokenize(self, model: str, **body: object) -> list[int]:
        client: Any = self._client
        try:
            async with self._asking(model):
                reply = await client.post(
                    f"{self._root}/tokenize", body={"model": model, **body}, cast_to=object
                )
                return [int(token) for token in reply["tokens"]]
        except RefusedError as error:
            raise NoLikelihoodError(f"{self.base_url} does not tokenize ({error})") from None

    @asynccontextmanager
    async def _asking(self, model: str, attempts: int | None = None) -> AsyncIterator[None]:
        """Wait for a free place and ask; raises EvaluationError with what is to be known of a failure.

        attempts: how often the client asks again.
        """
        import openai

        try:
            async with self._free, asyncio.timeout(TIMEOUT):
                yield
            self.requests += 1
        except TimeoutError:
            raise EvaluationError(
                f"{self.base_url} does not answer within {TIMEOUT:g} s for {shortened(model)}"
            ) from None
        except openai.APIStatusError as error:
            status, words = error.status_code, _words(error)
            if status in (400, 404, 422):
                raise RefusedError(f"{shortened(model)}: {words}") from None
            if status in (401, 403):
                raise EvaluationError(
                    f"{self.base_url} refuses access ({words}); give its key in OPENAI_API_KEY"
                ) from None
            again = ATTEMPTS if attempts is None else attempts
            again *= status in (408, 409, 429) or status >= 500
            raise EvaluationError(
                f"{self.base_url} answers status {status} for {shortened(model)}"
                + (f", after {again} more attempts" if again else "")
                + f": {words}"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise EvaluationError(f"no server answers at {self.base_url} ({cause})") from None
        except (openai.OpenAIError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{self.base_url} answers what OpenAI's API does not: {type(error).__name__}: {error}"
            ) from None


def base_among(
    models: Mapping[str, str | None], adapters: Collection[str], base_url: str, base: str | None = None
) -> str:
    """The base model of some adapters, among what a server lists; raises EvaluationError if one is not there.

    models: as :meth:`Served.models` gives them.
    base:   its name; by default the model that the server says the adapters belong to, or the only one that
            belongs to no other.
    """
    missing = sorted({*adapters, *([base] if base else [])} - models.keys())
    if missing:
        raise EvaluationError(
            f"{base_url} serves no {listed(map(repr, missing))}; it lists {listed(models)}; say which "
            "adapter belongs to a task with --source TASK=NAME, and the base model with --base NAME"
        )
    if base:
        return base
    parents = {models[name] for name in adapters} & models.keys()
    roots = {name for name, parent in models.items() if parent is None} - set(adapters)
    for found in (parents, roots):
        if len(found) == 1:
            return str(*found)
    raise EvaluationError(
        f"{base_url} does not say which is the base model; name it with --base: {listed(roots)}"
    )


def _words(error: Any) -> str:
    """What the server says of an error."""
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    text = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else None
    return " ".join(str(text or error.message).split())[:1000]
