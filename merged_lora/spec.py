"""The name of a merge: from text or JSON to one canonical :class:`MergeSpec`, and its digest.

    ties(0.7*sql, 0.3*chat, density=0.5)        a call: sources, then options by keyword
    ties(0.7 sql + 0.3 chat; density 0.5)       the same, without the characters that gateways change
    0.7*sql + 0.3*chat - 0.2*toxic              a sum, short for sum(0.7*sql, 0.3*chat, -0.2*toxic)

``grammar.py`` reads the text, and ``lorax.py`` the JSON.  Knows nothing of files: a source is a name, and
other modules decide which adapter it refers to.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import grammar, lorax
from .errors import SpecError, UnknownAdapterError
from .grammar import BARE, CALL
from .names import check_characters, check_text, checked_name, shortened
from .recipe import DENSITY, EPSILON, MEANS, Option, Parts, Strategy, Value
from .strategies import TABLE, find

MAX_TEXT = 65_536
"""Characters of a spec: 256 sources with weights and names of 200 characters. A server accepts fewer."""
MAX_SOURCES = 256

CANCELLING_AS_WRITTEN = 1e-12
"""Weights whose sum is at most this share of the sum of their magnitudes add up to 0, except for rounding."""
LIST_HINTS = {
    "weights": "; write a source's weight before its name: 0.5*a",
    **dict.fromkeys(("modules", "without"), '; write all patterns in one text: "q_proj v_proj"'),
}
"""What to write instead of a list of values."""


@dataclass(frozen=True)
class Source:
    """A source of a merge: the name of an adapter, and its weight."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        name = self.name if BARE.fullmatch(self.name) else json.dumps(self.name)
        return name if self.weight == 1.0 else f"{number_text(self.weight)}*{name}"


@dataclass(frozen=True)
class MergeSpec:
    """A merge in canonical form, however it was written: ``str(spec)`` is the only text for it.

    strategy: name of the strategy.
    sources:  the sources, sorted by name unless their order matters.
    options:  the options that differ from their defaults, by name.

    Construction checks everything that can be checked without the adapters, and raises SpecError.
    """

    strategy: str
    sources: tuple[Source, ...]
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        strategy = find(self.strategy)
        sources = tuple(Source(checked_name(s.name), _checked_weight(s)) for s in self.sources)
        _check_sources(strategy, sources)
        options: dict[str, Value] = {}
        for name, value in self.options:
            if name in options:
                raise SpecError(f"option {name!r} is given twice; give it once")
            options[name] = _checked_option(strategy, name, value, len(sources))
        ordered = strategy.ordered or options.get("compat") == "lorax"
        _check_weights(strategy, sources, options)
        _check_epsilon(strategy, options, len(sources))
        if not ordered:
            order = sorted(range(len(sources)), key=lambda i: sources[i].name)
            sources = tuple(sources[i] for i in order)
            options = {
                k: tuple(v[i] for i in order) if isinstance(v, tuple) else v for k, v in options.items()
            }
        kept = {k: _collapsed(v) for k, v in options.items()}
        defaults = {option.name: option.default for option in strategy.options}
        object.__setattr__(self, "sources", sources)
        object.__setattr__(
            self, "options", tuple(sorted((k, v) for k, v in kept.items() if v != defaults[k]))
        )
        check_length(str(self))  # names are escaped here, so it can be longer than what was written

    def __str__(self) -> str:
        options = [f"{name}={value_text(value)}" for name, value in self.options]
        return f"{self.strategy}({', '.join([str(s) for s in self.sources] + options)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources, in order."""
        return tuple(source.name for source in self.sources)

    def option(self, name: str) -> Value | None:
        """The value of an option: the given one, or else the strategy's default."""
        given = dict(self.options)
        if name in given:
            return given[name]
        option = find(self.strategy).option(name)
        return option.default if option is not None else None

    def without(self, name: str) -> MergeSpec:
        """The same merge with an option at its default."""
        return replace(self, options=tuple(given for given in self.options if given[0] != name))

    def per_source(self, name: str) -> tuple[float, ...]:
        """The value of a per-source option for each source, in order."""
        value = self.option(name)
        return value if isinstance(value, tuple) else (float(value),) * len(self.sources)  # type: ignore[arg-type]

    @property
    def choice(self) -> tuple[str, str | None]:
        """The patterns of the modules that are merged, and of those that are left out; None for none."""
        modules, without = self.option("modules"), self.option("without")
        return str(modules), None if without is None else str(without)

    @property
    def automatic(self) -> bool:
        """Whether weights are computed for each module; means compute lengths and angles themselves."""
        return self.option("weights") == "auto" and not find(self.strategy).recipe.balances

    def weights(self) -> tuple[float, ...]:
        """The weight of each source, in order; divided by their sum if that is asked for or implied.

        They do not include ``scale``.
        """
        relative = self.option("normalize") or find(self.strategy).recipe.blend in MEANS
        total = math.fsum(s.weight for s in self.sources) if relative else 1.0
        return tuple(s.weight / total for s in self.sources)

    def to_json(self) -> dict[str, object]:
        """The JSON form, with the field names of LoRAX's ``merged_adapters``."""
        body: dict[str, object] = {
            "ids": list(self.names),
            "weights": [s.weight for s in self.sources],
            "merge_strategy": self.strategy,
        }
        # The option ``weights`` replaces the list: it is "auto" then, and all weights in the list are 1.
        return body | {k: list(v) if isinstance(v, tuple) else v for k, v in self.options}

    def digest(self, contents: Mapping[str, str]) -> str:
        """Identity of the result: blake2b of the canonical text and of the content of every source.

        contents: content digest of each source, by name.

        Returns 32 hexadecimal characters.  Raises UnknownAdapterError if a digest is missing.
        """
        h = hashlib.blake2b(digest_size=16)
        h.update(str(self).encode())
        for name in self.names:
            if name not in contents:
                raise UnknownAdapterError(f"no content digest for source {name!r}")
            h.update(b"\0" + contents[name].encode())
        return h.hexdigest()


def parse(text: str) -> MergeSpec:
    """The merge that a text names; raises SpecError, which says what was expected and where."""
    if not isinstance(text, str):
        raise SpecError(f"a spec is text, not {type(text).__name__}")
    check_length(text)
    return _spec_of(grammar.parts_of(text, may_be_name=not is_spec(text)))


def check_length(text: str, limit: int = MAX_TEXT) -> None:
    """Raise SpecError for the text of a spec that has more than ``limit`` characters."""
    if len(text) > limit:
        raise SpecError(f"the spec has {len(text)} characters; at most {limit} are accepted")


def canonical(spec: str | MergeSpec) -> str:
    """The canonical text of a merge: ``parse(canonical(spec)) == spec``."""
    return str(parse(spec) if isinstance(spec, str) else spec)


def cancels(weights: Sequence[float], tolerance: float) -> bool:
    """Whether the sum of the weights is 0 within a tolerance, relative to the sum of their magnitudes."""
    return abs(math.fsum(weights)) <= tolerance * math.fsum(map(abs, weights))


def is_spec(text: str) -> bool:
    """Whether a text is meant as a merge and not as a plain name; it may still be malformed."""
    return len(text) > MAX_TEXT or bool(re.search(r'[()*+"]|^\s*-|\s-\s', text))


def from_json(body: object) -> MergeSpec:
    """The merge in a JSON object with the field names of LoRAX; raises SpecError.

    ``ids`` and ``weights`` are lists of the same length (weights default to 1, and may be ``"auto"``).
    ``merge_strategy`` defaults to ``linear``.  Every other field is an option of the strategy; null means its
    default.  With LoRAX's own strategies, LoRAX's fields that the strategy does not use are ignored.
    """
    return _spec_of(lorax.parts_of(body))


def check_own_name(name: str) -> None:
    """Raise SpecError for the name of an adapter or an alias that reads as something else.

    Such a name is blank, holds a character that cannot be seen, or is the text of a merge, of which a request
    that names it would not tell whether the adapter or the merge is meant.
    """
    check_text(name)
    shown = repr(shortened(name))
    if not name.strip():
        raise SpecError(f"the name {shown} is blank")
    check_characters(name)
    if name != name.strip():
        raise SpecError(f"the name {shown} begins or ends with white space")
    call = CALL.match(name)
    if (call and call[1] in TABLE) or _reads_as_merge(name):
        raise SpecError(f"the name {shown} reads as a merge; take another name")


def _spec_of(parts: Parts) -> MergeSpec:
    strategy, sources, options = parts
    return MergeSpec(strategy, tuple(Source(name, weight) for name, weight in sources), tuple(options))


def _reads_as_merge(name: str) -> bool:
    try:
        return is_spec(name) and bool(parse(name))
    except SpecError:
        return False


def _checked_weight(source: Source) -> float:
    try:
        weight = float(source.weight)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight) or (weight and not 1e-30 <= abs(weight) <= 1e30):
        raise SpecError(f"the weight of {source.name!r} must be 0 or a number of size 1e-30 to 1e30")
    return weight + 0.0


def _check_sources(strategy: Strategy, sources: tuple[Source, ...]) -> None:
    count = len(sources)
    if count > MAX_SOURCES:
        raise SpecError(f"{count} sources; a merge takes at most {MAX_SOURCES}")
    if count < strategy.sources_min or (strategy.sources_max is not None and count > strategy.sources_max):
        bound = (
            f"exactly {strategy.sources_min}" if strategy.sources_max else f"at least {strategy.sources_min}"
        )
        raise SpecError(
            f"{strategy.name} takes {bound} source{'s' * (strategy.sources_min > 1)}, got {count}"
        )
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SpecError(f"source {twice[0]!r} is named more than once; give it one weight")


def _check_weights(strategy: Strategy, sources: tuple[Source, ...], options: Mapping[str, Value]) -> None:
    weights = [source.weight for source in sources]
    if options.get("weights") == "auto" and any(weight != 1.0 for weight in weights):
        raise SpecError('weights="auto" finds the weights; give none to the sources, or leave it out')
    if options.get("weights") == "auto" and options.get("normalize"):
        raise SpecError('weights="auto" finds the weights; leave normalize out')
    if options.get("weights") == "auto" and options.get("compat") == "lorax":
        raise SpecError('weights="auto" depends on the length of each delta, which compat="lorax" changes')
    relative = strategy.recipe.blend in MEANS
    if (relative or options.get("normalize")) and cancels(weights, CANCELLING_AS_WRITTEN):
        who = strategy.name if relative else "normalize=true"
        raise SpecError(f"{who} divides by the sum of the weights, which is 0; change the weights")


def _check_epsilon(strategy: Strategy, options: Mapping[str, Value], count: int) -> None:
    if strategy.option("epsilon") is None:
        return
    given = [options.get(option.name, option.default) for option in (DENSITY, EPSILON)]
    lists = [value if isinstance(value, tuple) else (value,) * count for value in given]
    for density, epsilon in zip(*lists, strict=True):
        if not (density - epsilon > 0.0 and density + epsilon <= 1.0) and density < 1.0:
            raise SpecError(
                f"{strategy.name}: density - epsilon must be over 0 and density + epsilon at most 1, "
                f"got density {density} and epsilon {epsilon}"
            )


def _checked_option(strategy: Strategy, name: str, value: object, count: int) -> Value:
    option = strategy.option(name)
    if option is None:
        taken = ", ".join(option.name for option in strategy.options)
        fits = name == "rank" and strategy.recipe.rank == "fit"
        hint = "; its rank is the sum of the sources', or the limit" if fits else ""
        raise SpecError(f"{strategy.name} takes no option {name[:64]!r}; it takes: {taken}{hint}")
    if isinstance(value, list | tuple):
        if not option.per_source:
            raise SpecError(f"{strategy.name}: {name} takes one value, not a list{LIST_HINTS.get(name, '')}")
        if len(value) != count:
            raise SpecError(f"{strategy.name}: {name} has {len(value)} values for {count} sources")
        return tuple(float(_checked_value(strategy, option, item)) for item in value)  # type: ignore[arg-type]
    return _checked_value(strategy, option, value)


def _checked_value(strategy: Strategy, option: Option, value: object) -> Value:
    try:
        return option.check(value)
    except ValueError as error:
        raise SpecError(f"{strategy.name}: {option.name} {error}, got {reprlib.repr(value)}") from None


def _collapsed(value: Value) -> Value:
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def number_text(number: float | int) -> str:
    """A number as a spec writes it."""
    text = repr(number)
    return text.removesuffix(".0")


def value_text(value: Value) -> str:
    """The value of an option as a spec writes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(number_text(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) else number_text(value)
