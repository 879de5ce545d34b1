"""What several commands take, and how it is read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from merged_lora.errors import MergeError, SpecError, UnknownAdapterError
from merged_lora.grammar import meant_by
from merged_lora.locations import Location, locate
from merged_lora.names import shortened
from merged_lora.spec import MergeSpec, check_own_name, from_json, parse

from .running import UsageError

if TYPE_CHECKING:
    from merged_lora.adapters import Adapter

T = TypeVar("T")


class ExamplesFormatter(argparse.HelpFormatter):
    """Wraps a paragraph of the help, and leaves examples, which are on lines of their own, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_adapters(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--adapter",
        metavar="NAME=LOCATION",
        type=named_location,
        action="append",
        default=None if required else [],
        required=required,
        dest="adapters",
        help="where a source is, once per source: a PEFT folder, hf:org/repo[@revision][/folder], "
        "s3://bucket/folder, gs://bucket/folder or https://host/folder",
    )


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add what says which modules to merge."""
    for flag, option, what in (
        ("--only", "modules", "merge these modules alone, such as q_proj, layers.0 or '*.self_attn.*'"),
        ("--without", "without", "leave these modules out of the merge, such as o_proj"),
    ):
        parser.add_argument(
            flag,
            metavar="PATTERN",
            nargs="+",
            action="extend",
            default=[],
            help=f"{what}; the option {option} of a spec",
        )


def add_method(parser: argparse.ArgumentParser) -> None:
    """Add what says how to make a merge."""
    parser.add_argument(
        "--backend",
        default="auto",
        help="triton, cpu, numpy, or auto for the fastest that loads here (default)",
    )
    parser.add_argument(
        "--rank",
        metavar="K",
        type=int,
        help="largest rank of the result; cat and strategies on factors refuse to exceed it, "
        "all others approximate",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of the base model, or its name on the hub")


def add_reading(parser: argparse.ArgumentParser, sources: bool = True) -> None:
    """Add what says how to read adapters; ``sources``: of a merge."""
    parser.add_argument(
        "--drop",
        metavar="PART",
        nargs="+",
        action="extend",
        default=[],
        help="leave these parts out, instead of refusing adapters that have them: heads, embeddings, "
        "modules_to_save, biases, lora_bias, tokens, target_parameters, base_copies, or the name "
        "of a module that was saved whole",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read adapter_model.bin if there is nothing else; no code in it is run",
    )
    if sources:
        parser.add_argument(
            "--rename",
            metavar="FROM=TO",
            type=_renaming,
            action="append",
            default=[],
            help="replace the beginning FROM of module names by TO, in the sources that have it",
        )
        parser.add_argument(
            "--take",
            metavar="PART=NAME",
            type=_pair,
            action="append",
            default=[],
            help="take heads, embeddings or modules_to_save over from this source, and leave those of the "
            "others out",
        )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PART=NAME")
    return key, value


def _renaming(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FROM=TO")
    return old, new


def named_location(text: str) -> tuple[str, Path | str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    try:
        check_own_name(name)
        found = locate(place)
    except MergeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, place if isinstance(found, Location) else found


def add_served(parser: argparse.ArgumentParser) -> None:
    """Add what says which server to ask, and what."""
    parser.add_argument(
        "--base-url",
        metavar="URL",
        required=True,
        help="address of the server's OpenAI API, such as http://localhost:8000/v1",
    )
    parser.add_argument(
        "--data",
        metavar="TASK=FILE",
        type=named_file,
        action="append",
        required=True,
        help="examples of a task as JSON lines, once for each task, which has the name of the adapter that "
        "was trained for it",
    )
    parser.add_argument(
        "--source",
        metavar="TASK=NAME",
        type=named_value,
        action="append",
        default=[],
        dest="sources",
        help="the adapter of a task whose name is another",
    )
    parser.add_argument("--base", metavar="NAME", help="the base model, if the server lists several models")
    parser.add_argument(
        "--count", metavar="N", type=int, help="the first so many examples of each task alone"
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, default=256, help="largest number of tokens of an answer (256)"
    )
    parser.add_argument("--concurrency", metavar="N", type=int, default=8, help="requests at a time (8)")


def served(arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_served` adds, by the names of the parameters of ``evaluate`` and ``tune``."""
    return {
        "base_url": arguments.base_url,
        "data": once(arguments.data),
        "sources": once(arguments.sources),
        "base": arguments.base,
        "count": arguments.count,
        "limit": arguments.limit,
        "concurrency": arguments.concurrency,
    }


def named_value(text: str) -> tuple[str, str]:
    """What belongs to a task."""
    task, equals, value = text.partition("=")
    if not (task and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form TASK=VALUE")
    return task, value


def named_file(text: str) -> tuple[str, Path]:
    """The file that belongs to a task."""
    task, file = named_value(text)
    return task, Path(file)


def read_spec(text: str) -> MergeSpec:
    if not text.lstrip().startswith("{"):
        return parse(text)
    try:
        body = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise SpecError("the spec starts with '{' but is not valid JSON") from None
    return from_json(body)


def once(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """A JSON object, or what is named by an option; raises SpecError if a key occurs twice."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise SpecError(f'"{name[:64]}" is given twice; give it once')
        found[name] = value
    return found


def chosen(spec: MergeSpec, arguments: argparse.Namespace) -> MergeSpec:
    """The merge of the modules that --only and --without leave."""
    given = {"modules": ("--only", arguments.only), "without": ("--without", arguments.without)}
    options = [(name, " ".join(patterns)) for name, (_, patterns) in given.items() if patterns]
    for name, _ in options:
        if name in dict(spec.options):
            raise UsageError(f"{given[name][0]} and {name}=... in the spec say the same; give one of them")
    return replace(spec, options=(*spec.options, *options))


def paths_of(spec: MergeSpec, named: Sequence[tuple[str, Path | str]]) -> dict[str, Path | str]:
    """The place of each source; raises MergeError unless every source, and nothing else, is given once."""
    paths = dict(named)
    for name in spec.names:
        if name not in paths:
            term = meant_by(name, paths) or next(iter(get_close_matches(name, paths, 1)), None)
            hint = f"did you mean {term}? Otherwise, " if term else ""
            raise UnknownAdapterError(
                f"unknown adapter {name!r}; {hint}say where it is with --adapter {name}=PATH"
            )
    for name, _ in named:
        if [other for other, _ in named].count(name) > 1:
            raise UsageError(f"--adapter {name}=... is given more than once; give it once")
        if name not in spec.names:
            raise UsageError(f"--adapter {name}=... is not used by {shortened(str(spec))}")
    return paths


def load(arguments: argparse.Namespace, paths: Mapping[str, Path | str]) -> dict[str, Adapter]:
    """The sources, read as the options say."""
    from merged_lora.adapters import load_sources

    return load_sources(
        paths,
        drop=arguments.drop,
        take=once(arguments.take),
        rename=once(arguments.rename),
        allow_pickle=arguments.allow_pickle,
    )
