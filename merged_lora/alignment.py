"""Sources of one merge under names that agree, where classes of models name the same modules differently.

Knows nothing of strategies or of files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, combinations, permutations, product, takewhile
from typing import NamedTuple

from .adapters import Adapter
from .calibration import Calibration
from .errors import PlanError, listed
from .files.parts import HEADS
from .projections import place, split_projections

logger = logging.getLogger(__name__)


Rewrite = Callable[[str], str | None]
"""From a module's name to that in another class, or None if that class has no place for it."""


Layers = list[set[str]]
"""What layers are called (``model.layers``): the main ones, those of towers, and modules outside layers.

In this order they show a class: towers and heads may have the same names in classes that differ otherwise.
"""


class Spelling(NamedTuple):
    """How the names of a class's parts begin; None if the class lacks the part.

    text: the layers and the embedding of the language model.
    head: its head.
    rest: all other parts, such as the vision tower.
    """

    text: str
    head: str | None
    rest: str | None


SPELLINGS = (
    Spelling("model.language_model.", "", "model."),  # text and images, since transformers 4.52
    Spelling("language_model.model.", "language_model.", ""),  # before that, and in vLLM
    Spelling("model.", "", ""),  # text alone; Qwen2-VL before transformers 4.52
    Spelling("language_model.", None, ""),  # text and images without a head
    Spelling("thinker.model.", "thinker.", "thinker."),  # Qwen's Omni as a whole
    Spelling("model.text_model.", "", "model."),  # Emu3, since transformers 4.52
    Spelling("text_model.model.", "text_model.", ""),  # before that
    Spelling("backbone.", "", None),  # Mamba, Nemotron-H
    Spelling("", None, None),  # text alone without a head
)

_TEXT_ALONE = frozenset(each for each in SPELLINGS if each.text in ("model.", "backbone.", ""))
"""Spellings of classes of which some have text alone."""

_TEXT = frozenset(("layers", "embed_tokens"))
_HEAD = frozenset(HEADS)
_REST = (
    "audio_encoder", "audio_tower", "connector", "embed_audio", "embed_vision", "image_tower",
    "mm_projector", "multi_modal_projector", "projector", "video_tower", "vision_embed_tokens",
    "vision_encoder", "vision_model", "vision_tower", "visual", "vqmodel",
)  # fmt: skip

BASES = (
    "albert", "backbone", "beit", "bert", "clip", "deberta", "deit", "dinov2", "distilbert", "electra",
    "encoder_decoder", "gpt_neox", "hubert", "led", "longformer", "mobilebert", "model", "mpnet",
    "rembert", "roberta", "rwkv", "siglip", "splinter", "swin", "swinv2", "text_model", "transformer",
    "vision_model", "vit", "vivit", "wav2vec2", "wavlm",
)  # fmt: skip
"""What classes with a head call the model without one (``base_model_prefix`` in transformers)."""

_VIT = (
    ("encoder.layer", "layers"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
"""Names within vision transformers, before and since transformers 5."""

_SIBLINGS = (
    "audio_tower", "decoder", "encoder", "image_encoder", "language_model", "talker", "text_encoder",
    "text_encoder_2", "text_encoder_3", "text_model", "thinker", "transformer", "unet", "vision_model",
    "vision_tower", "visual",
)  # fmt: skip
"""Parts that one model has beside each other, and whose modules may well have the same names."""

_STACK = re.compile(r"(?P<front>(?:.*?\.)??)(?P<layers>[^.]+)\.\d+\..+")
"""A module in a numbered layer: what the name begins with, and the name of the layers."""


def align(
    sources: Mapping[str, Adapter],
    chosen: Callable[[str], bool] = lambda _: True,
    left_out: Callable[[str], bool] = lambda _: False,
) -> dict[str, Adapter]:
    """The sources under names that agree; those that agree already stay as they are.

    Sources that share no layers, and would share some under the names of another class, get the names that
    most sources have, or those of the first source if none lead; so do sources of different parts that no
    class has beside each other.  A class without the parts that a source adapts is not taken.  Projections
    that are fused in one source and apart in another are split.  What was done is logged as a warning.
    Digests stay those of what was read.  A source whose names are meant as they are (``Header.named``) keeps
    them.

    sources: by name.
    chosen:  whether a module takes part in the merge; one that does not need not be split.
    left_out: whether a module is left out by its name; it is not split.

    Raises PlanError if names may mean different modules of another source, if two sources share no layers
    and differ by an unknown prefix, or if fused projections cannot be split exactly.
    """
    free = {name: adapter for name, adapter in sources.items() if not adapter.header.named}
    while len(free) > 1 and (step := _one_step(free, chosen)) is not None:
        free = step
    aligned = {name: free.get(name, adapter) for name, adapter in sources.items()}
    if len(aligned) > 1:
        aligned = split_projections(aligned, chosen, left_out)
    _check_prefixes({name: adapter for name, adapter in aligned.items() if name in free}, chosen)
    return aligned


def _one_step(sources: Mapping[str, Adapter], chosen: Callable[[str], bool]) -> dict[str, Adapter] | None:
    """The sources after those of one group got the names of another; None if there is nothing to do.

    Raises PlanError if there are several ways to do it, and no other pair of groups shows which is meant.
    """
    groups = sorted(_groups(sources), key=len, reverse=True)  # stable: among equals the first source decides
    found = [
        (like, names, _fitting([sources[n] for n in names], [sources[n] for n in like], chosen))
        for like, names in permutations(groups, 2)
    ]
    for names in groups:
        ways = [(like, way) for like, others, own in found if others is names for way in own]
        made = [_layers(_rewritten(m, way) for n in names for m in sources[n].modules) for _, way in ways]
        if any(each[0] for each in made) and not all(each[0] for each in made):  # a tower, or something else
            raise _ambiguous(names[0], sources[names[0]], ways)
    for like, names, own in found:
        if len(own) == 1 and not _moves_into_tower(own[0], names, like, sources):
            return {n: _renamed(n, a, own[0], like) if n in names else a for n, a in sources.items()}
    for like, names, own in found:
        if own:
            raise _ambiguous(names[0], sources[names[0]], [(like, way) for way in own])
    return None


def _groups(sources: Mapping[str, Adapter]) -> list[list[str]]:
    """The sources in groups: those of one agree on names, directly or by way of others."""
    groups = [([name], _layers(adapter.modules)) for name, adapter in sources.items()]
    while pair := next((p for p in combinations(groups, 2) if _agree(p[0][1], p[1][1])), None):
        (names, layers), (more, theirs) = pair
        joined = (
            sorted(names + more, key=list(sources).index),
            [a | b for a, b in zip(layers, theirs, strict=True)],
        )
        groups[groups.index(pair[0])] = joined
        groups.remove(pair[1])
    return [names for names, _ in groups]


def _layers(names: Iterable[str]) -> Layers:
    found: Layers = [set(), set(), set()]
    for layers, name in _samples(names).items():
        found[2 if layers == name else 1 if _has_rest([layers]) else 0].add(layers)
    return found


def _samples(names: Iterable[str]) -> dict[str, str]:
    """A module of all layers that are called alike, by what they are called; others by their own names."""
    stacks = ((name, _STACK.fullmatch(name)) for name in names)
    return {match["front"] + match["layers"] if match else name: name for name, match in stacks}


def _agree(one: Layers, two: Layers) -> bool:
    """Whether the first kind of layers that both have is called the same, or else a class has all names.

    Modules outside layers show nothing if there are layers: heads have the same name in many classes.
    """
    for ones, twos in zip(one[:2], two[:2], strict=True):
        if ones and twos:
            return not ones.isdisjoint(twos)
    return not _spellings(one).isdisjoint(_spellings(two))


def _spellings(layers: Layers) -> set[Spelling]:
    """The spellings under which every name has a place."""
    names = set().union(*layers)
    return {each for each in SPELLINGS if all(_respelled(each, each, name) is not None for name in names)}


def _fitting(
    adapters: Sequence[Adapter], reference: Sequence[Adapter], chosen: Callable[[str], bool]
) -> list[Rewrite]:
    """How the names of adapters become those of the reference's class, each way with other names.

    A way fits if all names have a place there, both agree then, and shared modules of layers that take part
    in the merge have the same shapes.
    """
    shapes = {name: f.shape for adapter in adapters for name, f in adapter.modules.items()}
    wanted = {name: f.shape for adapter in reference for name, f in adapter.modules.items()}
    ours, layers = _layers(shapes), _layers(wanted)
    samples = _samples(shapes).values()
    known = _spellings(layers)
    if _has_rest(shapes) and not _has_rest(wanted) and (not known or known.intersection(_TEXT_ALONE)):
        return []
    compared = [name for name in shapes if _STACK.fullmatch(name) and chosen(name)]
    places = dict(place(*each) for each in wanted.items() if chosen(each[0]))
    fitting: dict[tuple[str, ...], Rewrite] = {}  # by the new names of a module of every kind of layer
    by_class = set(_CLASSES)
    for rewrite in chain.from_iterable(takewhile(lambda _: not fitting, (_CLASSES, *_PREFIXES))):
        brief = tuple(new for name in samples if (new := rewrite(name)) is not None)
        if len(brief) < len(samples) or brief in fitting:
            continue
        theirs = _layers(brief)
        shared = any(a and b for a, b in zip(theirs[:2], layers[:2], strict=True))
        if not shared and rewrite not in by_class:
            continue  # a prefix fits any name and does not show a class
        if not _agree(theirs, layers) or not (shared or bool(ours[0]) == bool(theirs[0])):
            continue
        made = {name: new for name in shapes if (new := rewrite(name)) is not None}
        here = dict(place(made[name], shapes[name]) for name in compared)
        same = all(here[each] == places[each] for each in here.keys() & places.keys())
        if same and len(set(made.values())) == len(shapes):
            fitting[brief] = rewrite
    return list(fitting.values())


def _moves_into_tower(
    way: Rewrite, names: Sequence[str], reference: Sequence[str], sources: Mapping[str, Adapter]
) -> bool:
    """Whether layers would become those of a tower, although the reference has other layers, too."""
    modules, known = ([m for n in group for m in sources[n].modules] for group in (names, reference))
    made = _layers(_rewritten(module, way) for module in modules)
    return bool(_layers(modules)[0] and _layers(known)[0] and not made[0])


def _ambiguous(name: str, adapter: Adapter, ways: Sequence[tuple[Sequence[str], Rewrite]]) -> PlanError:
    module = next(m for m in adapter.modules if any(_rewritten(m, way) != m for _, way in ways))
    made = list(dict.fromkeys(_rewritten(module, way) for _, way in ways))
    references = dict.fromkeys(source for like, _ in ways for source in like)
    stack = _STACK.fullmatch(module)
    front = module[: stack.end("layers") + 1] if stack else module
    new = made[0].removesuffix(module[len(front) :])
    return PlanError(
        f"{name}: {module} may be {' or '.join(made)}, beside {listed(references)}; say which is meant, such "
        f"as with --rename {front}={new}"
    )


def _has_rest(names: Iterable[str]) -> bool:
    return any(not set(_REST).isdisjoint(name.split(".")) for name in names)


def _respelled(old: Spelling, new: Spelling, name: str) -> str | None:
    for before, after, parts in zip(old, new, (_TEXT, _HEAD, _REST), strict=True):
        if before is not None and name.startswith(before):
            rest = name[len(before) :]
            if rest.partition(".")[0] in parts:
                return None if after is None else after + rest
    return None


def _below(base: str, name: str) -> str | None:
    return name if name.partition(".")[0] in _HEAD else base + name


def _above(base: str, name: str) -> str | None:
    return name[len(base) :] if name.startswith(base) else None


def _substituted(pairs: Iterable[tuple[str, str]], name: str) -> str:
    for old, new in pairs:
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def _renamed(name: str, adapter: Adapter, rewrite: Rewrite, reference: Sequence[str]) -> Adapter:
    """The adapter of that name with other names of modules, also in its calibration and its header."""
    modules = {_rewritten(module, rewrite): factors for module, factors in adapter.modules.items()}
    old, new = next(
        (pair for pair in zip(adapter.modules, modules, strict=True) if pair[0] != pair[1]), ("", "")
    )
    if not old:
        return adapter
    logger.warning(
        "%s: %s is taken for %s, as in %s, and so are all like it", name, old, new, listed(reference)
    )
    known = adapter.calibration.inputs if isinstance(adapter.calibration, Calibration) else ()
    header, whole = adapter.header, adapter.whole.values()
    others = (
        *known,
        *header.parameters,
        *header.base_copies,
        *(name for tensors in whole for name in tensors),
    )
    names = {module: (_rewritten(module, rewrite),) for module in (*adapter.modules, *others)}
    return adapter.renamed(modules, names)


def _rewritten(module: str, rewrite: Rewrite) -> str:
    new = rewrite(module)
    return module if new is None else new


def _check_prefixes(sources: Mapping[str, Adapter], chosen: Callable[[str], bool]) -> None:
    """Raise PlanError if sources share no layers, and would if their names began otherwise."""
    layers = {name: _layers(filter(chosen, adapter.modules)) for name, adapter in sources.items()}
    fronts = {name: _fronts(adapter, chosen) for name, adapter in sources.items()}
    for (one, ones), (two, twos) in combinations(fronts.items(), 2):
        if _agree(layers[one], layers[two]):
            continue
        for here, there in product(ones, twos):
            if any(here in each and there in each for each in fronts.values()):
                continue  # one source has both, so they are two parts of the model
            shared = ones[here].keys() & twos[there].keys()
            if here == there or not shared or any(ones[here][each] != twos[there][each] for each in shared):
                continue
            new, old = _difference(here, there)
            if _are_siblings(old, new):
                continue
            example = f"{there + min(shared)} of {two}"
            better = _is_known(there) and not _is_known(here)
            if new.startswith(old) or (better and not old.startswith(new)):
                new, old = old, new  # or else names of the other source would be renamed, too
                example = f"{here + min(shared)} of {one}"
            raise PlanError(
                f"{one} and {two} share no layers, but {len(shared)} modules would be the same, such as "
                f"{example}, if names began with {new!r} instead of {old!r}; if they mean the "
                f"same modules, merge with --rename {old}={new}, otherwise with --rename {old}={old}"
            )


def _fronts(adapter: Adapter, chosen: Callable[[str], bool]) -> dict[str, dict[str, tuple[int, ...]]]:
    """For every beginning of names, up to the layers, what follows it with the shapes of its modules."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, factors in adapter.modules.items():
        if chosen(name) and (match := _STACK.fullmatch(name)):
            found.setdefault(match["front"], {})[name[match.end("front") :]] = factors.shape
    return found


def _difference(one: str, two: str) -> tuple[str, str]:
    """Two beginnings without the parts that they end with alike."""
    ones, twos = one.split("."), two.split(".")
    while len(ones) > 1 and len(twos) > 1 and ones[-2:] == twos[-2:]:
        del ones[-2], twos[-2]
    return ".".join(ones), ".".join(twos)


def _is_known(front: str) -> bool:
    """Whether the names of layers begin so in a class of transformers."""
    return front in {spelling.text for spelling in SPELLINGS} or front.rstrip(".") in BASES


def _are_siblings(one: str, two: str) -> bool:
    ones, twos = (set(_SIBLINGS).intersection(each.split(".")) for each in (one, two))
    return bool(ones and twos and ones != twos)


_CLASSES: list[Rewrite] = [partial(_respelled, old, new) for old, new in permutations(SPELLINGS, 2)]
"""From the names of one known class to those of another, which is certain."""
_PREFIXES: list[list[Rewrite]] = [
    [partial(change, base + ".") for base in BASES for change in (_below, _above)],
    [partial(_substituted, _VIT), partial(_substituted, tuple((new, old) for old, new in _VIT))],
]
"""From names without a class's own prefix to those with it, and back; between ages of transformers."""
