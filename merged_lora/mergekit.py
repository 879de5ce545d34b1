"""mergekit's YAML of a merge of LoRAs: from its text to a spec and the places of its sources.

    base_model: BASE
    merge_method: ties
    models:
      - {model: BASE+LORA, parameters: {weight: 0.5, density: 0.4}}

mergekit adds each LoRA to the base model and merges whole weights.  A configuration is read if the result is
the base model plus what one of our strategies makes of the deltas, and refused otherwise, with the reason.
Facts are those of mergekit 0.1.5.  Knows nothing of adapters: it reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

from .errors import SpecError
from .locations import Location, locate
from .names import shortened
from .recipe import Value
from .spec import MAX_SOURCES, MergeSpec, Source, check_own_name

MAX_BYTES = 65_536
"""Size of a file: 256 models with their parameters. PyYAML takes about a second for it."""
MAX_DEPTH = 12
"""Lists and mappings around a value; mergekit's own are six deep."""
CANCELLING = 1e-8
"""Weights whose sum is smaller are not divided by it in mergekit."""

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
REFUSED = {
    "slices": "it builds a model from layers of several, and an adapter cannot",
    "modules": "merges of some modules are those of --only and --without here",
    "tokenizer_source": "an adapter has no tokenizer; leave it out, and the base model's stays",
    "tokenizer": "an adapter has no tokenizer; leave it out, and the base model's stays",
    "chat_template": "an adapter has no chat template; leave it out, and the base model's stays",
}
DTYPES = ("float16", "bfloat16", "float32", "float64")

ON_WHOLE_WEIGHTS = "whose result depends on the base model's own weights, which an adapter does not hold"
OTHERS = {
    "slerp": f"it interpolates between whole models on a sphere, {ON_WHOLE_WEIGHTS}; "
    "slerp and nuslerp here do so between deltas, as mergekit's nuslerp does with a base_model",
    "karcher": f"it is a mean of whole models on a sphere, {ON_WHOLE_WEIGHTS}; karcher here is one of deltas",
    "arcee_fusion": f"it compares softmaxes of whole rows, {ON_WHOLE_WEIGHTS}; ours takes deltas",
    "nearswap": f"it moves towards another model by distance, {ON_WHOLE_WEIGHTS}",
    "passthrough": "it copies a model and merges nothing",
    "ram": "no strategy here computes it",
    "ramplus_tl": "no strategy here computes it",
}
"""Methods of mergekit that are none of ours, with the reason."""


@dataclass(frozen=True)
class Configuration:
    """A merge that mergekit's YAML describes.

    spec:       the merge; strategies on entries make the best approximation of what mergekit computes.
    places:     where each source is, by name.
    everywhere: whether it means what mergekit means only if every source has every module.
    """

    spec: MergeSpec
    places: Mapping[str, Path | str]
    everywhere: bool = False


@dataclass(frozen=True)
class Sparse:
    """A method of mergekit that adds up parts of the deltas.

    keep:      what is kept of each: everything, the largest entries, those in the middle, or some at random.
    elects:    whether only entries of the elected sign are added up.
    normalize: the default of ``normalize``: divide by the sum of the weights that were added up.
    rescale:   the default of ``rescale``: bring what is kept back to the length it had, in the L1 norm.
    """

    keep: str
    elects: bool
    normalize: bool
    rescale: bool


SPARSE = {
    "task_arithmetic": Sparse("all", elects=False, normalize=False, rescale=False),
    "ties": Sparse("largest", elects=True, normalize=True, rescale=False),
    "breadcrumbs": Sparse("middle", elects=False, normalize=False, rescale=False),
    "breadcrumbs_ties": Sparse("middle", elects=True, normalize=False, rescale=False),
    "dare_linear": Sparse("random", elects=False, normalize=False, rescale=True),
    "dare_ties": Sparse("random", elects=True, normalize=False, rescale=True),
    "della_linear": Sparse("graded", elects=False, normalize=False, rescale=True),
    "della": Sparse("graded", elects=True, normalize=True, rescale=True),
}


def read(text: str) -> Configuration:
    """The merge that a YAML text of mergekit describes; raises SpecError for what means nothing of ours."""
    body = _parsed(text)
    if not isinstance(body, dict):
        raise SpecError("mergekit's YAML is a mapping with merge_method and models")
    _check_keys(body)
    method = str(body.get("merge_method"))
    if method in OTHERS:
        _refuse(f"merge_method: {method}", OTHERS[method])
    if method not in READERS:
        raise SpecError(f"merge_method: {_shown(method)} is none of {', '.join(READERS)}")
    return READERS[method](_Document(method, body))


def _parsed(text: str) -> Any:
    """The values in a YAML text without anchors, deep nesting or a key twice; raises SpecError."""
    try:
        import yaml
    except ImportError:
        raise SpecError(
            "mergekit's YAML needs PyYAML, which is not installed; pip install 'vllm-merged-lora[mergekit]'"
        ) from None
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise SpecError(f"the YAML is longer than {MAX_BYTES} bytes")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
                what = "an alias (*)" if isinstance(event, yaml.AliasEvent) else "too much nesting"
                raise SpecError(f"line {event.start_mark.line + 1} of the YAML: {what}; write values out")
        _check_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1} of the YAML: " if error.problem_mark else ""
        raise SpecError(f"{line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML has not; a number too long
        raise SpecError(f"the YAML cannot be read: {' '.join(str(error).split())[:200]}") from None


def _check_twice(root: Any) -> None:
    """Raise SpecError if a mapping below this node of YAML has a key twice."""
    nodes = [root] if root is not None else []
    while nodes:
        node = nodes.pop()
        if node.id == "sequence":
            nodes += node.value
        elif node.id == "mapping":
            keys = [key.value for key, _ in node.value if key.id == "scalar"]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                line = node.start_mark.line + 1
                raise SpecError(f"line {line} of the YAML: {shortened(twice)!r} is given twice; give it once")
            nodes += [value for _, value in node.value]


def _check_keys(body: Mapping[object, object]) -> None:
    for key, value in body.items():
        if value is None and key in (*KEYS, *REFUSED):
            continue
        if key in REFUSED:
            _refuse(str(key), REFUSED[str(key)])
        if key not in KEYS:
            raise SpecError(f"unknown key {_shown(key)}; known: {', '.join(KEYS)}")
        if key in ("dtype", "out_dtype") and str(value).removeprefix("torch.") not in DTYPES:
            raise SpecError(f"{key}: {_shown(value)} is none of {', '.join(DTYPES)}")


def _refuse(what: str, why: str) -> NoReturn:
    raise SpecError(f"{what} is not read: {why}")


def _shown(value: object) -> str:
    return repr(shortened(str(value)))


class _Document:
    """What a configuration says, read part by part; everything raises SpecError.

    method: the merge method.
    body:   its mapping, with known keys alone.
    loras:  the models that hold a LoRA, in order, each with its parameters.
    """

    def __init__(self, method: str, body: Mapping[str, Any]) -> None:
        self.method = method
        self.shared = self._mapping(body.get("parameters"), "parameters")
        base = body.get("base_model")
        self.base = None if base is None else self._text(base, "base_model")
        if self.base is not None and "+" in self.base:
            _refuse("base_model", "it holds a LoRA, and deltas here are over the base model itself")
        self.loras: list[tuple[str, dict[str, Any]]] = []
        self.plain: list[tuple[str, dict[str, Any]]] = []
        models = body.get("models")
        if not isinstance(models, list) or not models:
            raise SpecError("models is a list of BASE+LORA, each with its parameters")
        if len(models) > MAX_SOURCES + 1:
            raise SpecError(f"{len(models)} models; a merge takes at most {MAX_SOURCES} sources")
        for i, entry in enumerate(models):
            self._add(entry, f"models[{i}]")
        self._check_bases()

    def _add(self, entry: object, where: str) -> None:
        found = self._mapping(entry, where)
        unknown = next((key for key in found if key not in ("model", "parameters")), None)
        if unknown is not None:
            raise SpecError(f"{where}: unknown key {_shown(unknown)}; known: model, parameters")
        model = self._text(found.get("model"), f"{where}.model")
        parameters = self._mapping(found.get("parameters"), f"{where}.parameters")
        if model.count("+") > 1:
            raise SpecError(f"{where}.model: {_shown(model)} is not of the form BASE+LORA")
        if model in [other for other, _ in (*self.loras, *self.plain)]:
            raise SpecError(f"{where}.model: {_shown(model)} is given twice; give it one weight")
        (self.loras if "+" in model else self.plain).append((model, parameters))

    def _check_bases(self) -> None:
        """Every LoRA has one base model, and no other whole model takes part."""
        bases = list(dict.fromkeys(model.partition("+")[0] for model, _ in self.loras))
        if not bases:
            raise SpecError("no model has a LoRA; models are written BASE+LORA, where LORA is an adapter")
        base = bases[0] if self.base is None else self.base
        for other in bases:
            if other != base:
                _refuse(
                    f"a LoRA of {_shown(other)}",
                    f"others are over {_shown(base)}, and all need one base model",
                )
        for other, _ in self.plain:
            if other != base:
                _refuse(f"the model {_shown(other)}", "it is a whole model, and adapters alone are merged")

    @property
    def base_parameters(self) -> dict[str, Any] | None:
        """The parameters of the base model as one of the models; None if it is none of them.

        mergekit adds ``base_model`` to the models if it is not among them.
        """
        if self.plain:
            return self.plain[0][1]
        return None if self.base is None else {}

    def require_base(self) -> None:
        """Raise SpecError without a base model, over which mergekit takes deltas."""
        if self.base is None:
            _refuse(
                f"{self.method} without base_model",
                f"mergekit then merges whole models, {ON_WHOLE_WEIGHTS}; name the base model",
            )

    def check_parameters(self, shared: Sequence[str], each: Sequence[str] = ()) -> None:
        """Raise SpecError for a parameter that the method does not take at its place.

        shared: those of the whole merge.
        each:   those of each model, which may be given for all of them as well.
        """
        for key in self.shared:
            if key not in (*shared, *each):
                self._refuse_parameter("parameters", key, (*shared, *each))
        for model, parameters in (*self.loras, *self.plain):
            for key in parameters:
                if key in shared:
                    raise SpecError(
                        f"{_shown(model)}: {key} is a parameter of the whole merge; move it there"
                    )
                if key not in each:
                    self._refuse_parameter(_shown(model), key, each)

    def _refuse_parameter(self, where: str, key: str, known: Sequence[str]) -> NoReturn:
        taken = ", ".join(known) or "none"
        raise SpecError(f"{where}: {self.method} has no parameter {_shown(key)} there; it has: {taken}")

    def flag(self, name: str, default: bool) -> bool:
        """A parameter of the whole merge that is true or false."""
        value = self.shared.get(name, default)
        if not isinstance(value, bool):
            raise SpecError(f"parameters.{name} is true or false, got {_shown(value)}")
        return value

    def number(self, name: str, default: float) -> float:
        """A parameter of the whole merge that is a number."""
        return self._number(self.shared.get(name, default), f"parameters.{name}")

    def numbers(self, name: str, default: float | None = None) -> list[float]:
        """A parameter of each LoRA: its own, or that of the whole merge, or the default; None for none."""
        return [self.number_of(model, parameters, name, default) for model, parameters in self.loras]

    def number_of(
        self, model: str, parameters: Mapping[str, Any], name: str, default: float | None = None
    ) -> float:
        """A parameter of one model."""
        value = parameters.get(name, self.shared.get(name, default))
        if value is None:
            raise SpecError(f"{_shown(model)} has no {name}, which {self.method} needs")
        return self._number(value, f"{_shown(model)}: {name}")

    def configuration(
        self,
        strategy: str,
        weights: Sequence[float] | None = None,
        options: Mapping[str, Value] | None = None,
        everywhere: bool = False,
    ) -> Configuration:
        """The merge of the LoRAs by one of our strategies; weights of 1 without any."""
        places: dict[str, Path | str] = {}
        for model, _ in self.loras:
            place = _place(model.partition("+")[2])
            places[_free_name(place, places)] = str(place) if isinstance(place, Location) else place
        chosen = weights or [1.0] * len(places)
        sources = tuple(Source(name, weight) for name, weight in zip(places, chosen, strict=True))
        return Configuration(MergeSpec(strategy, sources, tuple((options or {}).items())), places, everywhere)

    @staticmethod
    def _mapping(value: object, where: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise SpecError(f"{where} is a mapping with names as keys, got {_shown(value)}")
        return value

    @staticmethod
    def _text(value: object, where: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise SpecError(f"{where} is the text BASE or BASE+LORA, got {_shown(value)}")
        return value

    @staticmethod
    def _number(value: object, where: str) -> float:
        """A number, also as a text, which 1e-3 is in YAML."""
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
            _refuse(where, "it has a filter by names of tensors, and there is one value for all modules here")
        if isinstance(value, list):
            _refuse(
                where, "a list is a gradient over the layers, and there is one value for all of them here"
            )
        try:
            found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise SpecError(f"{where} is a number, got {_shown(value)}")
        return found


def _place(lora: str) -> Location | Path:
    """The place of a LoRA: a folder, or a repository on the hub if there is no such folder."""
    place = locate(lora)
    if isinstance(place, Path) and "@" in lora:
        raise SpecError(f"{_shown(lora)} is a folder with a revision; mergekit takes what follows @ for one")
    return place


def _free_name(place: Location | Path, taken: Mapping[str, object]) -> str:
    """A name for a source: the last part of its place, with a number behind it if that is taken."""
    path = (place.folder or place.place) if isinstance(place, Location) else place.absolute().as_posix()
    name = path.rstrip("/").rpartition("/")[2]
    try:
        check_own_name(name)
    except SpecError:
        name = "lora"
    names = chain((name,), (f"{name}_{i}" for i in count(2)))
    return next(free for free in names if free not in taken)


def _linear(document: _Document) -> Configuration:
    """The weighted mean of whole models; the base model may be one of them, with a weight and no delta."""
    document.check_parameters(("normalize",), ("weight",))
    weights = document.numbers("weight")
    total = math.fsum(weights)
    base = document.base_parameters
    if base is not None:
        if "weight" not in (base | document.shared):
            raise SpecError(
                "linear counts base_model as one of its models; give it a weight, or leave it out"
            )
        total += document.number_of("base_model", base, "weight")
    if document.flag("normalize", True):
        if abs(total) < CANCELLING:
            raise SpecError("linear divides by the sum of the weights, which is 0; change the weights")
        if base is None:
            return document.configuration("sum", weights, {"normalize": True})
        return document.configuration("sum", [weight / total for weight in weights])
    if not math.isclose(total, 1.0, rel_tol=1e-9):
        _refuse(
            "linear without normalize",
            f"the weights add up to {total:g}, and the base model's own weights would be multiplied by that",
        )
    return document.configuration("sum", weights)


def _sparse(document: _Document) -> Configuration:
    """The sum of what is kept of each delta, over the base model."""
    method = SPARSE[document.method]
    own = {"middle": ("gamma",), "graded": ("epsilon",)}.get(method.keep, ())
    document.check_parameters(("int8_mask", "normalize", "rescale", "lambda"), ("weight", "density", *own))
    document.require_base()
    document.flag("int8_mask", False)  # the type of a mask, which changes no value
    weights, densities = document.numbers("weight"), document.numbers("density", 1.0)
    whole = method.keep == "all" or set(densities) == {1.0}  # nothing is left out
    if not whole:
        _check_sparse(document, method)
    options: dict[str, Value] = {"scale": document.number("lambda", 1.0)}
    if not whole or method.elects:
        options["density"] = tuple(densities)
    if method.keep == "middle" and not whole:
        options["gamma"] = tuple(document.numbers("gamma", 0.01))
    normalize = document.flag("normalize", method.normalize)
    if method.elects:
        _check_mean(document, weights, normalize)
        strategy = "ties_svd" if whole or method.keep == "largest" else "breadcrumbs_ties_svd"
        return document.configuration(strategy, None, options)
    if normalize:
        if abs(math.fsum(weights)) < CANCELLING:
            raise SpecError("the weights add up to 0, by which mergekit does not divide; leave normalize out")
        options["normalize"] = True
    return document.configuration("sum" if whole else "breadcrumbs_svd", weights, options)


def _check_sparse(document: _Document, method: Sparse) -> None:
    """Raise SpecError if what is left out, or made of the rest, is not ours."""
    rescales = document.flag("rescale", method.rescale)
    if method.keep in ("random", "graded"):
        ours = "its probability" if method.keep == "random" else "its own probability"
        theirs = "all of them by one factor that brings the L1 norm back" if rescales else "none of them"
        _refuse(
            f"{document.method} with a density below 1",
            f"entries are dropped at random by other random numbers, and mergekit multiplies {theirs}, while "
            f"each kept entry is divided by {ours} here; close to it is {document.method}_svd",
        )
    if rescales:
        _refuse(
            f"{document.method} with rescale",
            "it brings what is kept back to the L1 norm of the delta, which no strategy here does",
        )


def _check_mean(document: _Document, weights: Sequence[float], normalize: bool) -> None:
    """Raise SpecError if the mean of those that agree is not divided by their number."""
    if not normalize:
        _refuse(
            f"{document.method} without normalize",
            "mergekit does not divide the sum of those that agree, and here it is divided by their number; "
            "with normalize: true and equal weights both are the same",
        )
    if len(set(weights)) > 1 or weights[0] <= 0:
        _refuse(
            f"{document.method} with these weights",
            "mergekit divides the sum of those that agree by the sum of their weights, and here it is "
            "divided by their number; with equal weights over 0 both are the same",
        )


def _sce(document: _Document) -> Configuration:
    document.check_parameters(("int8_mask", "select_topk"))
    document.require_base()
    document.flag("int8_mask", False)
    share = document.number("select_topk", 1.0)
    return document.configuration("sce_svd", None, {"select_topk": share}, everywhere=share < 1.0)


def _nuslerp(document: _Document) -> Configuration:
    document.check_parameters(("nuslerp_row_wise", "nuslerp_flatten"), ("weight",))
    document.require_base()
    document.flag("nuslerp_row_wise", False)  # without a meaning if tensors are flattened
    if not document.flag("nuslerp_flatten", True):
        _refuse(
            "nuslerp_flatten: false", "it interpolates row by row, and here whole deltas are interpolated"
        )
    weights = document.numbers("weight")
    if abs(math.fsum(weights)) < 1e-6:
        _refuse("nuslerp with weights that add up to 0", "mergekit takes the middle between the two then")
    return document.configuration("nuslerp", weights, everywhere=True)


def _multislerp(document: _Document) -> Configuration:
    document.check_parameters(("normalize_weights", "eps"), ("weight",))
    document.require_base()
    if document.number("eps", 1e-8) != 1e-8:
        _refuse("eps", "nothing is added to lengths here before they divide")
    weights = document.numbers("weight")
    total = math.fsum(weights)
    if not document.flag("normalize_weights", True) and not math.isclose(total, 1.0, rel_tol=1e-9):
        _refuse(
            "multislerp without normalize_weights",
            f"the weights add up to {total:g}, and they are divided by their sum here",
        )
    return document.configuration("multislerp", weights)


def _model_stock(document: _Document) -> Configuration:
    document.check_parameters(("filter_wise",))
    document.require_base()
    if document.flag("filter_wise", False):
        _refuse("filter_wise: true", "it has one angle for each row, and here each module has one")
    return document.configuration("model_stock")


READERS: dict[str, Callable[[_Document], Configuration]] = {
    "linear": _linear,
    **dict.fromkeys(SPARSE, _sparse),
    "sce": _sce,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "model_stock": _model_stock,
}
"""How each method of mergekit is read, by its name."""
