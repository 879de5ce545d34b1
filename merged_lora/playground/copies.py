"""A merge and a request for it, as the lines that people copy into their own clients."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Self, TypeVar

from merged_lora.aliases import check_alias_name
from merged_lora.checks import Check, number, whole_number
from merged_lora.errors import MergeError
from merged_lora.spec import MergeSpec

from .forms import FieldError

T = TypeVar("T")

MAX_TOKENS = 1 << 20
ALIAS = "mix"
"""The name of an alias that got none."""
KEY = "OPENAI_API_KEY"
"""The environment variable from which OpenAI's client takes a server's key."""


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    prompt:      the text.
    chat:        whether it is the message of a user; otherwise a text that the model goes on with.
    temperature: of sampling.
    max_tokens:  largest number of tokens of the answer.
    """

    prompt: str
    chat: bool
    temperature: float
    max_tokens: int

    @classmethod
    def of(cls, body: object) -> Self:
        """The question in a JSON object with these fields; raises FieldError."""
        match body:
            case {"prompt": str(prompt), "chat": bool(chat), "temperature": warmth, "max_tokens": most}:
                return cls(
                    prompt,
                    chat,
                    _checked("temperature", number, warmth),
                    _checked("max_tokens", whole_number(1, MAX_TOKENS), most),
                )
        raise FieldError(
            "prompt", 'a question is {"prompt": "...", "chat": true, "temperature": 0, "max_tokens": 64}'
        )

    @property
    def route(self) -> str:
        """The route that answers it, below ``/v1``."""
        return "chat/completions" if self.chat else "completions"

    def body(self, model: str) -> dict[str, object]:
        """The body of the request for the answer of a model."""
        asked: dict[str, object] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        )
        return {"model": model, **asked, "temperature": self.temperature, "max_tokens": self.max_tokens}


def requests_of(spec: MergeSpec, server: str, question: Question, keyed: bool = False) -> dict[str, str]:
    """What asks a merge: ``curl``, a command, and ``python``, a program with the package ``openai``.

    server: the address of its API, which ends in ``/v1``.
    keyed:  whether the server asks for a key, which is taken from the environment.
    """
    return {
        "curl": _curl(spec, server, question, keyed),
        "python": _python(spec, server, question, keyed),
    }


def flag_of(spec: MergeSpec, alias: str = "") -> str:
    """The flag of ``vllm serve`` that gives a merge a name, :data:`ALIAS` if it is empty.

    Raises FieldError for a name that no alias can have.
    """
    if alias:
        try:
            check_alias_name(alias)
        except MergeError as error:
            raise FieldError("alias", str(error)) from None
        if "=" in alias:
            raise FieldError(
                "alias", f"the name {alias!r} has a '=', which ends it in a flag; take another name"
            )
    return f"--merged-lora-modules {shlex.quote(f'{alias or ALIAS}={spec}')}"


def _checked(field: str, check: Check[T], value: object) -> T:
    try:
        return check(value)
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def _curl(spec: MergeSpec, server: str, question: Question, keyed: bool) -> str:
    body = json.dumps(question.body(str(spec)), ensure_ascii=False, indent=2)
    key = f'-H "Authorization: Bearer ${KEY}" ' if keyed else ""
    return (
        f"curl -s {shlex.quote(f'{server}/{question.route}')} -H 'Content-Type: application/json' {key}\\\n"
        f"    -d {shlex.quote(body)}"
    )


def _python(spec: MergeSpec, server: str, question: Question, keyed: bool) -> str:
    """A program: JSON of texts, numbers, lists and objects is Python too, unless it escapes characters."""
    arguments = {"base_url": server} | ({} if keyed else {"api_key": "none"})
    create, content = (
        ("chat.completions.create", "message.content") if question.chat else ("completions.create", "text")
    )
    return (
        "from openai import OpenAI\n\n"
        f"client = OpenAI({', '.join(f'{name}={_literal(value)}' for name, value in arguments.items())})\n"
        f"reply = client.{create}(\n"
        + "".join(f"    {name}={_literal(value)},\n" for name, value in question.body(str(spec)).items())
        + f")\nprint(reply.choices[0].{content})"
    )


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
