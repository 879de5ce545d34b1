"""What each command of ``merged-lora`` does with its arguments, which ``cli.py`` parses.

Each returns the exit code, or raises MergeError.  torch is imported only by those that need it.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import catalog
from .errors import MergeError, SpecError, UnknownAdapterError
from .grammar import meant_by
from .locations import Location, locate
from .names import shortened
from .recipe import Value
from .spec import MergeSpec, Source, check_own_name, from_json, parse

if TYPE_CHECKING:
    from .adapters import Adapter
    from .backends import Result
    from .inspection import Inspection

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "false": False}
LOGGER = logging.getLogger("merged_lora")
SKILL_LOST = 3
"""Exit code of a check that found a source of which most is lost."""
NOT_TOGETHER = 3
"""Exit code of an inspection of adapters that cannot be merged."""


class UsageError(MergeError):
    """The command line itself is wrong."""


def strategies(arguments: argparse.Namespace) -> int:
    """Print the table of strategies."""
    if arguments.json:
        print(json.dumps(catalog.as_json(), indent=2))
    else:
        print(catalog.as_markdown() if arguments.markdown else catalog.as_text(), end="")
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge adapters and write the result."""
    spec, named = _asked(arguments)
    spec = _chosen(spec, arguments)
    paths = _paths(spec, named)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .engine import plan, run
    from .files.writing import check_target

    started = time.perf_counter()
    with terminated_cleanly():
        check_target(arguments.output, arguments.overwrite)
        sources = _load(arguments, paths)
        planned = plan(spec, sources, arguments.rank, arguments.base_model)
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


def calibrate(arguments: argparse.Namespace) -> int:
    """Calibrate an adapter and write the file beside it."""
    from .calibrating import calibrate
    from .calibration import CALIBRATION_NAME
    from .files.opening import find

    started = time.perf_counter()
    _, folder = arguments.adapter
    with terminated_cleanly(), _shares() as progress:
        made = calibrate(
            arguments.model,
            folder,
            arguments.prompts,
            count=arguments.count,
            answers=arguments.answers,
            components=arguments.components,
            replay=arguments.replay,
            drop=arguments.drop,
            allow_pickle=arguments.allow_pickle,
            progress=progress,
        )
    file = find(folder)[0] / CALIBRATION_NAME
    asked, answered = made.tokens
    kept_back = (
        [f"{sum(not e.fitted for e in made.exchanges)} more kept back for replays"] if made.exchanges else []
    )
    parts = [
        f"{made.prompts} prompts with {asked} tokens and {answered} tokens of answers",
        *kept_back,
        f"{arguments.components} components",
        f"{file.stat().st_size / 1e6:.1f} MB",
        f"{time.perf_counter() - started:.1f} s",
    ]
    print(printable(f"{file}: {', '.join(parts)}"))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Print which of their answers the sources of a merge keep."""
    spec = _chosen(_read_spec(arguments.spec), arguments)
    paths = _paths(spec, arguments.adapters)

    from .checking import check

    with terminated_cleanly(), _shares() as progress:
        found = check(
            spec,
            _load(arguments, paths),
            arguments.model,
            backend=arguments.backend,
            rank=arguments.rank,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps([asdict(each) | {"lost": each.lost} for each in found], indent=2))
    else:
        for each in found:
            print(f"{each}, {each.nll:.3f} nats per token")
    return SKILL_LOST if any(each.lost for each in found) else 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print what is to be known of adapters before they are merged."""
    paths = _once(arguments.adapters)

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .adapters import Adapter
    from .figures import check_path, heat_map, save
    from .inspecting import inspect

    if arguments.plot is not None:
        check_path(arguments.plot)
    load = partial(Adapter.load, drop=arguments.drop, allow_pickle=arguments.allow_pickle)
    bar = tqdm(unit="module", leave=False, disable=None)  # None: only if stderr is a terminal
    with terminated_cleanly(), bar, logging_redirect_tqdm([LOGGER]):
        found = inspect(paths, density=arguments.density, load=load, progress=bar.update)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found)
    if arguments.plot is not None:
        save(heat_map(found), arguments.plot)
    return NOT_TOGETHER if found.refused or any(fact.refused for fact in found.facts) else 0


@contextmanager
def _shares() -> Iterator[Callable[[float], object]]:
    """Show a bar for work of which shares are reported, on a terminal, and none of transformers' own."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with suppress(ImportError):
        import transformers

        quieted: Any = transformers.utils.logging
        quieted.disable_progress_bar()
        quieted.set_verbosity_error()
    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=1.0, bar_format=layout, leave=False, disable=None)  # None: only if stderr is a terminal
    with bar, logging_redirect_tqdm([LOGGER]):
        yield bar.update


def _show(found: Inspection) -> None:
    """Print an inspection: tables as wide as the terminal, or as plain text into a pipe."""
    if not sys.stdout.isatty():
        print(found)
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in found.tables():
        console.print(table.rich())
    for heading, lines in (("verdict", found.verdict()), ("specs that fit", found.specs)):
        if lines:
            console.print(heading, style="italic")
        for line in lines:
            console.print(printable(line), markup=False, soft_wrap=heading != "verdict")


def _kept(result: Result) -> list[str]:
    """How much of the squared norm is left, with the range over modules, if the rank of any was cut."""
    shares = result.kept_by_module().values()
    by_module = f" ({min(shares):.2%} to {max(shares):.2%} by module)" if len(shares) > 1 else ""
    return [f"{result.kept_energy():.2%} of the squared norm kept{by_module}"] if shares else []


def _asked(arguments: argparse.Namespace) -> tuple[MergeSpec, Sequence[tuple[str, Path | str]]]:
    """The merge that the arguments of ``merge`` ask for, and where its sources are; raises UsageError."""
    given = {
        name.removeprefix("option_"): texts
        for name, texts in vars(arguments).items()
        if name.startswith("option_") and texts is not None
    }
    if arguments.strategy is None:
        if given or arguments.weights is not None:
            flag = "weights" if not given else next(iter(given)).replace("_", "-")
            raise UsageError(
                f"--{flag} goes with --strategy and folders; a spec holds its options and weights itself: "
                '"ties(0.7*a, b, density=0.3)"'
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
        return _read_spec(arguments.what[0]), arguments.adapters
    if arguments.adapters:
        raise UsageError("with --strategy, the sources are given without --adapter: NAME=PATH or PATH")
    named = [_named_source(text) for text in arguments.what]
    weights, options = [1.0] * len(named), {name: _option_value(texts) for name, texts in given.items()}
    if arguments.weights == ["auto"]:
        options["weights"] = "auto"
    elif arguments.weights is not None:
        weights = [_weight(text) for text in arguments.weights]
        if len(weights) != len(named):
            raise UsageError(f"--weights gives {len(weights)} of them for {len(named)} sources")
    sources = tuple(Source(name, weight) for (name, _), weight in zip(named, weights, strict=True))
    return MergeSpec(arguments.strategy, sources, tuple(options.items())), named


def _named_source(text: str) -> tuple[str, Path | str]:
    """A source as an argument names it: NAME=LOCATION, or a location whose last part is its name."""
    name, equals, place = text.partition("=")
    if not (equals and name and "/" not in name):
        place = text
        name = re.split(r"[/:]", place.partition("@")[0].rstrip("/"))[-1] or Path(place).resolve().name
    try:
        check_own_name(name)
        found = locate(place)
    except MergeError as error:
        raise UsageError(f"{shortened(text)}: {error}; name the source: NAME=PATH") from None
    return name, place if isinstance(found, Location) else found


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--weights takes numbers, or auto; {shortened(text)!r} is neither") from None


def _option_value(texts: Sequence[str]) -> Value:
    """The value of an option, which its strategy checks: numbers, words, and a number for each source."""
    found = [float(text) if _NUMBER.fullmatch(text) else _WORDS.get(text, text) for text in texts]
    return found[0] if len(found) == 1 else tuple(found)  # type: ignore[return-value]


def _read_spec(text: str) -> MergeSpec:
    if not text.lstrip().startswith("{"):
        return parse(text)
    try:
        body = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise SpecError("the spec starts with '{' but is not valid JSON") from None
    return from_json(body)


def _once(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """A JSON object, or what is named by an option; raises SpecError if a key occurs twice."""
    found: dict[str, T] = {}
    for name, value in pairs:
        if name in found:
            raise SpecError(f'"{name[:64]}" is given twice; give it once')
        found[name] = value
    return found


def _chosen(spec: MergeSpec, arguments: argparse.Namespace) -> MergeSpec:
    """The merge of the modules that --only and --without leave."""
    given = {"modules": ("--only", arguments.only), "without": ("--without", arguments.without)}
    options = [(name, " ".join(patterns)) for name, (_, patterns) in given.items() if patterns]
    for name, _ in options:
        if name in dict(spec.options):
            raise UsageError(f"{given[name][0]} and {name}=... in the spec say the same; give one of them")
    return replace(spec, options=(*spec.options, *options))


def _paths(spec: MergeSpec, named: Sequence[tuple[str, Path | str]]) -> dict[str, Path | str]:
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


def _load(arguments: argparse.Namespace, paths: Mapping[str, Path | str]) -> dict[str, Adapter]:
    """The sources, read as the options say."""
    from .adapters import load_sources

    return load_sources(
        paths,
        drop=arguments.drop,
        take=_once(arguments.take),
        rename=_once(arguments.rename),
        allow_pickle=arguments.allow_pickle,
    )


@contextmanager
def terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, which removes scratch folders and stops servers."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def printable(text: str) -> str:
    """The text on one line: names and paths may contain line ends, terminal codes or undecodable bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
