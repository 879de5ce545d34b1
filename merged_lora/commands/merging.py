"""``merged-lora merge``: adapters become a new one on disk."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merged_lora import catalog, mergekit
from merged_lora.errors import MergeError, PlanError, SpecError
from merged_lora.locations import Location, locate
from merged_lora.names import printable, shortened
from merged_lora.recipe import Option, Value
from merged_lora.spec import MergeSpec, Source, check_own_name, is_spec
from merged_lora.strategies import find

from .arguments import (
    ExamplesFormatter,
    add_adapters,
    add_choice,
    add_method,
    add_reading,
    chosen,
    load,
    paths_of,
    read_spec,
)
from .running import LOGGER, UsageError, terminated_cleanly

if TYPE_CHECKING:
    from merged_lora.backends import Result
    from merged_lora.plan import MergePlan

OWN_FLAGS = frozenset(("weights", "rank", "modules", "without"))
"""Options of strategies for which there is a flag that does more."""
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NEGATIVE = re.compile(rf"(?=-){_NUMBER.pattern}$")
_WORDS = {"true": True, "false": False}

EXAMPLES = """\
examples:
  merged-lora merge "ties(sql, 0.5*chat, density=0.3)" \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge "0.7*sql + 0.3*chat" --rank 16 \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
  merged-lora merge adapters/sql adapters/chat --strategy ties --weights 1 0.5 --density 0.3 --output merged
  # a merge of LoRAs in mergekit's YAML:
  merged-lora merge --mergekit ties.yaml --output merged
  merged-lora merge '{"ids": ["sql", "chat"], "weights": [0.7, 0.3], "merge_strategy": "linear"}' \\
      --adapter sql=adapters/sql --adapter chat=adapters/chat --output merged
"""


def add(added: Any) -> None:
    """Add the command ``merge``."""
    merge = added.add_parser(
        "merge",
        help="merge adapters into a new one",
        description="Merge adapters and write the result as a PEFT folder.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    merge._negative_number_matcher = _NEGATIVE  # argparse's own takes -1e-3 for an option
    merge.add_argument(
        "what",
        metavar="SPEC",
        nargs="*",
        help='what to merge: "ties(a, 0.5*b)", "a + b", or JSON, after "--" if it begins with a minus sign; '
        "or with --strategy the sources themselves: FOLDER, LOCATION or NAME=LOCATION",
    )
    add_adapters(merge, required=False)
    _add_strategy(merge)
    merge.add_argument(
        "--mergekit",
        metavar="FILE",
        type=Path,
        help="a merge of LoRAs in mergekit's YAML, if it means here what it means there",
    )
    merge.add_argument("--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    add_choice(merge)
    add_method(merge)
    merge.add_argument(
        "--base-model",
        metavar="NAME",
        help="the base model that the result names; by default the one that most sources name",
    )
    merge.add_argument("--overwrite", action="store_true", help="replace the adapter in DIR")
    merge.add_argument(
        "--keep-ranks",
        action="store_true",
        help="if modules differ in rank, do not pad them with zeros to the largest; the file is smaller, "
        "and not every program reads it right",
    )
    add_reading(merge)


def _add_strategy(parser: argparse.ArgumentParser) -> None:
    """Add what says how to merge sources that are not in a spec: a strategy and its options."""
    parser.add_argument("--strategy", metavar="NAME", help="how to merge sources that are given as folders")
    parser.add_argument(
        "--weights",
        metavar="W",
        nargs="+",
        help="with --strategy: the weight of each source in their order, or auto",
    )
    for option in catalog.options():
        if option.name not in OWN_FLAGS:
            switch = isinstance(option.default, bool)
            how: dict[str, Any] = (
                {"action": "store_const", "const": ["true"]}
                if switch
                else {"metavar": "X", "nargs": "+" if option.per_source else 1}
            )
            parser.add_argument(
                _flag(option.name),
                dest=f"option_{option.name}",
                help=f"with --strategy: {option.help}",
                **how,
            )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def run(arguments: argparse.Namespace) -> int:
    """Merge adapters and write the result."""
    configuration = _configuration(arguments)
    if configuration is None:
        spec, named = _asked(arguments)
    else:
        spec, named = _ranked(configuration.spec, arguments.rank), list(configuration.places.items())
    spec = chosen(spec, arguments)
    paths = paths_of(spec, named)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from merged_lora.engine import plan, run
    from merged_lora.files.writing import check_target

    started = time.perf_counter()
    with terminated_cleanly():
        check_target(arguments.output, arguments.overwrite)
        sources = load(arguments, paths)
        planned = plan(spec, sources, arguments.rank, arguments.base_model)
        if configuration is not None and configuration.everywhere:
            _check_everywhere(planned)
        # disable=None: a bar is shown only if stderr is a terminal
        bar = tqdm(total=len(planned.modules), unit="module", leave=False, disable=None)
        with bar, logging_redirect_tqdm([LOGGER]):
            made = run(planned, arguments.backend, bar.update)
        made.adapter.save(arguments.output, arguments.overwrite, keep_ranks=arguments.keep_ranks)

    parts = [
        str(spec),
        f"rank {made.adapter.rank}",
        f"{len(made.adapter.modules)} modules",
        *_kept(made.result),
        f"{time.perf_counter() - started:.1f} s",
    ]
    print(printable(f"{arguments.output}: {', '.join(parts)}"))
    return 0


def _kept(result: Result) -> list[str]:
    """How much of the squared norm is left, with the range over modules, if the rank of any was cut."""
    shares = result.kept_by_module().values()
    by_module = f" ({min(shares):.2%} to {max(shares):.2%} by module)" if len(shares) > 1 else ""
    return [f"{result.kept_energy():.2%} of the squared norm kept{by_module}"] if shares else []


def _asked(arguments: argparse.Namespace) -> tuple[MergeSpec, Sequence[tuple[str, Path | str]]]:
    """The merge that the arguments of ``merge`` ask for, and where its sources are; raises UsageError."""
    given = _given(arguments)
    if arguments.strategy is None:
        return _asked_by_spec(arguments, given)
    if arguments.adapters:
        raise UsageError("with --strategy, the sources are given without --adapter: NAME=PATH or PATH")
    named = _named_sources(_sources_among(arguments.what, given))
    weights = [1.0] * len(named)
    if "weights" in given and given["weights"] != ["auto"]:
        weights = _weights(given.pop("weights"), len(named))
    _check_flags(arguments.strategy, given)
    options = {name: _option_value(texts) for name, texts in given.items()}
    sources = tuple(Source(name, weight) for (name, _), weight in zip(named, weights, strict=True))
    spec = MergeSpec(arguments.strategy, sources, tuple(options.items()))
    return _ranked(spec, arguments.rank), named


def _ranked(spec: MergeSpec, rank: int | None) -> MergeSpec:
    """The merge with this rank, if its strategy takes one; the rank limits others all the same."""
    if rank is None or find(spec.strategy).option("rank") is None:
        return spec
    return replace(spec, options=(*spec.options, ("rank", rank)))


def _configuration(arguments: argparse.Namespace) -> mergekit.Configuration | None:
    """The merge in a file of mergekit, if one is given; raises UsageError or SpecError."""
    if arguments.mergekit is None:
        return None
    if arguments.what or arguments.adapters or arguments.strategy or _given(arguments):
        raise UsageError(
            "--mergekit says what to merge and how; leave out a SPEC, --adapter, --strategy and options"
        )
    try:
        with arguments.mergekit.open("rb") as file:
            content = file.read(mergekit.MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{arguments.mergekit}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{arguments.mergekit} is no text in UTF-8") from None
    try:
        return mergekit.read(text)
    except SpecError as error:
        raise SpecError(f"{arguments.mergekit}: {error}") from None


def _check_everywhere(planned: MergePlan) -> None:
    """Raise PlanError if a source lacks a module that others have."""
    for name, module in planned.modules.items():
        if len(module.present) < len(planned.spec.sources):
            lacking = [s for i, s in enumerate(planned.spec.names) if i not in module.present]
            raise PlanError(
                f"{name} is not in {lacking[0]}: mergekit takes a delta of zeros there, and "
                f"{planned.spec.strategy} the other sources alone; --only and --without choose modules"
            )


def _given(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The values of each flag of an option, by the option's name."""
    given = {
        name.removeprefix("option_"): texts
        for name, texts in vars(arguments).items()
        if name.startswith("option_") and texts is not None
    }
    return given if arguments.weights is None else given | {"weights": arguments.weights}


def _asked_by_spec(
    arguments: argparse.Namespace, given: Mapping[str, Sequence[str]]
) -> tuple[MergeSpec, Sequence[tuple[str, Path | str]]]:
    """The merge of a spec, whose sources have an ``--adapter`` each."""
    if given:
        raise UsageError(
            f"{_flag(next(iter(given)))} goes with --strategy and folders; a spec holds its options and "
            'weights itself: "ties(0.7*a, b, density=0.3)"'
        )
    if not arguments.what:
        raise UsageError(
            "say what to merge: a SPEC, or folders and --strategy (see merged-lora merge --help)"
        )
    if len(arguments.what) > 1 or not arguments.adapters:
        if any(Path(text).is_dir() for text in arguments.what):
            raise UsageError("folders are merged with --strategy NAME, such as --strategy ties")
        if len(arguments.what) > 1:
            raise UsageError(
                f"one spec is expected, not {len(arguments.what)} arguments; put it in quotes, and give "
                "each source an --adapter of its own"
            )
        raise UsageError("say where the sources are: --adapter NAME=PATH for each of them")
    return read_spec(arguments.what[0]), arguments.adapters


def _sources_among(what: Sequence[str], given: dict[str, list[str]]) -> Sequence[str]:
    """The sources in their order, also if a flag in front of them took them for values of its own.

    given: the values of each flag, which keeps those that it can have.
    """
    if what:
        return what
    found = []
    for name, texts in given.items():
        count = next((i for i, text in enumerate(texts) if i and not _NUMBER.fullmatch(text)), len(texts))
        if count < len(texts):
            found.append(texts[count:])
            given[name] = texts[:count]
    if len(found) > 1:
        raise UsageError("the sources are in several places, and their order counts; write them side by side")
    if not found:
        raise UsageError("say what to merge: with --strategy, the folders of the sources")
    return found[0]


def _named_sources(texts: Sequence[str]) -> list[tuple[str, Path | str]]:
    """Sources with their names, no two of which are the same; raises UsageError."""
    places: dict[str, str] = {}
    named = []
    for text in texts:
        name, place = _named_source(text)
        if name in places:
            raise UsageError(
                f"{shortened(places[name])} and {shortened(text)} would both be called {name!r}; "
                "name them: NAME=PATH"
            )
        places[name] = text
        named.append((name, place))
    return named


def _named_source(text: str) -> tuple[str, Path | str]:
    """A source as an argument names it: NAME=LOCATION, or a location whose last part is its name."""
    name, equals, place = text.partition("=")
    own = bool(equals and name and "/" not in name)
    place = place if own else text
    try:
        found = locate(place)
    except MergeError as error:
        raise UsageError(str(error)) from None
    if not own:
        name = _last_part(found)
        if is_spec(text) and isinstance(found, Path) and not found.exists():
            raise UsageError(
                f"{shortened(text)} is no folder; --strategy goes with folders, and a spec has its strategy "
                "in itself"
            )
    try:
        check_own_name(name)
    except MergeError as error:
        raise UsageError(f"{shortened(text)}: {error}; name the source: NAME=PATH") from None
    return name, place if isinstance(found, Location) else found


def _last_part(found: Location | Path) -> str:
    """The last part of a location; for the file of an adapter, its folder's."""
    if isinstance(found, Location):
        return (found.folder or found.place).rpartition("/")[2]
    folder = found.parent if found.is_file() else found
    return os.path.basename(os.path.abspath(folder))  # noqa: PTH100, PTH119 - resolve() would follow links


def _weights(texts: Sequence[str], count: int) -> list[float]:
    """A weight for each of ``count`` sources; raises UsageError."""
    unfit = next((text for text in texts if not _NUMBER.fullmatch(text)), None)
    if unfit is not None:
        raise UsageError(
            f"--weights takes a number for each source, or auto alone; {shortened(unfit)!r} is neither"
        )
    if len(texts) != count:
        raise UsageError(
            f"--weights has {len(texts)} value{'s' * (len(texts) > 1)} for {count} sources; give one for each"
        )
    return [float(text) for text in texts]


def _check_flags(strategy: str, given: Mapping[str, object]) -> None:
    """Raise UsageError for a flag of another strategy's option."""
    taken = find(strategy).options
    for name in given:
        if name not in [option.name for option in taken]:
            flags = [_flag(option.name) for option in taken if _has_flag(option)]
            raise UsageError(f"{_flag(name)} does not go with {strategy}, which takes {', '.join(flags)}")


def _has_flag(option: Option) -> bool:
    return option.name not in OWN_FLAGS or option.name in ("weights", "rank")


def _option_value(texts: Sequence[str]) -> Value:
    """The value of an option, which its strategy checks: numbers, words, and a number for each source."""
    found = [_value(text) for text in texts]
    return found[0] if len(found) == 1 else tuple(found)  # type: ignore[arg-type]


def _value(text: str) -> Value:
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)  # a seed may have more digits than a float holds
    return float(text) if _NUMBER.fullmatch(text) else _WORDS.get(text, text)
