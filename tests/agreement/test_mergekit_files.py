"""What is read from mergekit's YAML merges adapters as mergekit 0.1.5 merges the whole models.

mergekit adds each LoRA to the base model and merges the sums.  Its arithmetic on whole weights is stated here
in NumPy, from its documented formulas, and the base model is subtracted from what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml

from agreement.comparing import merged
from merged_lora import mergekit
from merged_lora.adapters import Adapter
from merged_lora.errors import SpecError
from merged_lora.factors import Factors
from merged_lora.spec import MergeSpec
from merged_lora.strategies import find

Array = npt.NDArray[np.float64]
ROWS, COLUMNS, RANK = 24, 40, 4
NAMES = ("one", "two", "three")


def factors(seed: int, scale: float) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((RANK, COLUMNS), (ROWS, RANK)))
    return Factors(a * scale, b, 0.5)


LORAS = {name: factors(i, 0.5 + i) for i, name in enumerate(NAMES)}
BASE: Array = np.random.default_rng(0).normal(size=(ROWS, COLUMNS))


def delta_of(lora: Factors) -> Array:
    return np.asarray(lora.b.double() @ lora.a.double() * lora.scaling)


WHOLE = {name: BASE + delta_of(lora) for name, lora in LORAS.items()}
"""The whole models, as PEFT's ``merge_and_unload`` makes them."""


def kept(delta: Array, method: str, density: float, gamma: float) -> Array:
    """The entries of a delta that a method of mergekit keeps."""
    if density >= 1.0 or method == "task_arithmetic":
        return delta
    order = np.argsort(np.abs(delta), axis=None)  # ascending
    count = int(density * delta.size)
    skipped = 0 if method == "ties" else int(gamma * delta.size)
    begin = max(0, delta.size - count - skipped)
    mask = np.zeros(delta.size)
    mask[order[begin : begin + count]] = 1
    return delta * mask.reshape(delta.shape)


def agreeing(deltas: Array) -> npt.NDArray[np.bool_]:
    """Where the entries of each delta have the sign of the sum over all; a sum of 0 counts as plus."""
    elected = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    return np.asarray(np.sign(deltas) == elected)


def generalized(
    body: Mapping[str, object], models: Sequence[Array], each: Sequence[Mapping[str, float]]
) -> Array:
    """Task arithmetic and its kin: ``base + lambda * sum w x / sum w``, with what each method leaves out."""
    method, shared = str(body["merge_method"]), parameters(body)
    weights = np.array([settings["weight"] for settings in each])[:, None, None]
    deltas = np.stack(
        [
            kept(model - BASE, method, settings.get("density", 1.0), settings.get("gamma", 0.01))
            for model, settings in zip(models, each, strict=True)
        ]
    )
    deltas = deltas * weights
    mask = (
        agreeing(deltas)
        if method in ("ties", "breadcrumbs_ties", "dare_ties", "della")
        else np.ones(deltas.shape)
    )
    total, divisor = (deltas * mask).sum(axis=0), (weights * mask).sum(axis=0)
    if shared.get("normalize", method in ("ties", "della")):
        total = total / np.where(divisor == 0, 1, divisor)
    return np.asarray(BASE + float(shared.get("lambda", 1.0)) * total)


def angle_mean(vectors: Array, shares: Array) -> Array:
    """mergekit's Multi-SLERP of flat vectors: one step from the mean of the directions."""
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / (norms + 1e-8)[:, None]
    mean = shares @ units
    mean /= np.linalg.norm(mean)
    tangent = shares @ (units - (units @ mean)[:, None] * mean)
    length = np.linalg.norm(tangent) + 1e-8
    return np.asarray((mean * np.cos(length) + tangent * np.sin(length) / length) * (shares @ norms))


def parameters(entry: Mapping[str, object]) -> dict[str, float]:
    found = entry.get("parameters") or {}
    assert isinstance(found, dict)
    return found


def by_mergekit(body: Mapping[str, object], without: str | None = None) -> Array:
    """What mergekit makes of one weight of the whole models; one LoRA may leave it as it is in the base."""
    entries = body["models"]
    assert isinstance(entries, list)
    models, each = [], []
    for entry in entries:
        _, _, lora = entry["model"].partition("+")
        models.append(WHOLE[lora] if lora and lora != without else BASE)
        each.append(parameters(body) | parameters(entry))
    method = body["merge_method"]
    if method == "linear":
        weights = [settings["weight"] for settings in each]
        if body.get("base_model") and "base" not in [entry["model"] for entry in entries]:
            models.append(BASE)  # mergekit adds it, with the weight of the whole merge
            weights.append(parameters(body)["weight"])
        total = sum(w * model for w, model in zip(weights, models, strict=True))
        return np.asarray(total / sum(weights) if parameters(body).get("normalize", True) else total)
    chosen = [i for i, entry in enumerate(entries) if entry["model"] != body["base_model"]]
    models, each = [models[i] for i in chosen], [each[i] for i in chosen]
    deltas = np.stack([model - BASE for model in models])
    flat = deltas.reshape(len(deltas), -1)
    if method == "sce":
        share = parameters(body).get("select_topk", 1.0)
        if share < 1:
            variance = deltas.var(axis=0)
            count = int(np.count_nonzero(variance) * share)
            deltas = deltas * (variance >= np.sort(variance, axis=None)[-count])
        energy = (deltas**2).mean(axis=(1, 2))
        weights = (energy / energy.sum())[:, None, None] * agreeing(deltas)
        return np.asarray(BASE + (deltas * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-6))
    if method == "model_stock":
        units = flat / np.maximum(np.linalg.norm(flat, axis=1), 1e-3)[:, None]
        n = len(units)
        cosine = (units @ units.T)[np.triu_indices(n, 1)].mean()
        t = n * cosine / (1 + (n - 1) * cosine)
        return np.asarray(t * sum(models) / n + (1 - t) * BASE)
    if method == "multislerp":
        shares = np.array([settings["weight"] for settings in each])
        return BASE + angle_mean(flat, shares / shares.sum()).reshape(BASE.shape)
    if method == "nuslerp":
        weights = [settings["weight"] for settings in each]
        t = weights[1] / sum(weights)
        units = flat / np.maximum(np.linalg.norm(flat, axis=1), 1e-7)[:, None]
        cosine = units[0] @ units[1]
        theta = np.arccos(cosine)
        return np.asarray(
            BASE + (np.sin((1 - t) * theta) * deltas[0] + np.sin(t * theta) * deltas[1]) / np.sin(theta)
        )
    return generalized(body, models, each)


def ours(text: str, backend: str, without: str | None = None) -> Array:
    """What is made of the same file here, with nothing cut away by a rank; one LoRA may lack the module."""
    read = mergekit.read(text)
    spec = read.spec
    if find(spec.strategy).option("rank"):
        spec = MergeSpec(spec.strategy, spec.sources, (*spec.options, ("rank", ROWS)))
    adapters = {
        name: Adapter({"other" if name == without else "m": LORAS[str(place)]})
        for name, place in read.places.items()
    }
    return np.asarray(merged(str(spec), adapters, backend).modules["m"].delta().double())


def file(method: str, *each: str, shared: str = "", base: str | None = None, over: bool = True) -> str:
    """A file of mergekit, with parameters in YAML's short form.

    each:   those of each LoRA.
    shared: those of the whole merge.
    base:   those of the base model as one of the models, None if it is none of them.
    over:   whether the base model is named as ``base_model``.
    """
    entries = [("base", base)] if base is not None else []
    entries += [(f"base+{name}", text) for name, text in zip(NAMES, each, strict=False)]
    return "\n".join(
        [
            f"merge_method: {method}",
            *(["base_model: base"] if over else []),
            f"parameters: {{{shared}}}",
            "models:",
            *(f"  - model: {model}\n    parameters: {{{text}}}" for model, text in entries),
        ]
    )


THREE = ("", "", "")
FILES = {
    "a mean": file("linear", "weight: 1", "weight: 2", "weight: 0.5", over=False),
    "a mean with the base model": file("linear", "weight: 1", "weight: 2", base="weight: 3", over=False),
    "a mean with a base model that is added": file("linear", "weight: 1", "weight: 2", shared="weight: 0.5"),
    "weights that add up to 1": file(
        "linear", "weight: 0.7", "weight: 0.5", shared="normalize: false", base="weight: -0.2", over=False
    ),
    "task arithmetic": file(
        "task_arithmetic", "weight: 1", "weight: -0.5", "weight: 0.25", shared="lambda: 0.7"
    ),
    "task arithmetic, normalized": file(
        "task_arithmetic", "weight: 1", "weight: 2", shared="normalize: true, lambda: 1e-1"
    ),
    "TIES": file(
        "ties", "", "density: 0.7", "", shared="weight: 1, density: 0.4, int8_mask: true", base="density: 0.1"
    ),
    "TIES with equal weights and a factor": file(
        "ties", *THREE, shared="weight: 0.3, density: 0.5, lambda: 1.5"
    ),
    "TIES without trimming": file("ties", *THREE, shared="weight: 1, rescale: true"),
    "breadcrumbs": file(
        "breadcrumbs",
        "weight: 1",
        "weight: 0.5, gamma: 0.1",
        "weight: -2, density: 0.98",
        shared="density: 0.6, gamma: 0.05",
    ),
    "breadcrumbs, normalized": file(
        "breadcrumbs", "weight: 1", "weight: 0.5", shared="density: 0.6, normalize: true"
    ),
    "breadcrumbs with TIES, divided": file(
        "breadcrumbs_ties", *THREE, shared="density: 0.6, weight: 0.7, normalize: true"
    ),
    "DARE that drops nothing": file("dare_linear", "weight: 1", "weight: 0.5"),
    "DARE with TIES that drops nothing": file("dare_ties", *THREE, shared="weight: 1, normalize: true"),
    "DELLA that drops nothing": file("della", *THREE, shared="weight: 0.5, epsilon: 0.1"),
    "DELLA without votes that drops nothing": file("della_linear", "weight: 1", "weight: 0.5"),
    "SCE": file("sce", *THREE, shared="select_topk: 0.4"),
    "SCE of everything": file("sce", *THREE),
    "NuSLERP": file("nuslerp", "weight: 0.7", "weight: 0.4"),
    "Multi-SLERP": file("multislerp", "weight: 1", "weight: 0.5", "weight: 0.2"),
    "Model Stock": file("model_stock", *THREE),
}
ANYWHERE = [name for name, text in FILES.items() if not mergekit.read(text).everywhere]


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_merges_adapters_as_mergekit_merges_whole_models(name: str, backend: str) -> None:
    text = FILES[name]
    expected = by_mergekit(yaml.safe_load(text)) - BASE
    # Factors are rounded to float32, and merged entries are sums of a few products.
    assert np.linalg.norm(ours(text, backend) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_lora_without_the_module_counts_as_one_that_changes_nothing(name: str) -> None:
    text = FILES[name]
    expected = by_mergekit(yaml.safe_load(text), without="two") - BASE
    assert np.linalg.norm(ours(text, "cpu", without="two") - expected) <= 1e-5 * np.linalg.norm(expected)


def test_methods_of_which_that_is_not_true_need_every_module_of_every_lora() -> None:
    assert set(FILES) - set(ANYWHERE) == {"SCE", "NuSLERP"}
    for name in ("SCE", "NuSLERP"):
        expected = by_mergekit(yaml.safe_load(FILES[name]), without="two") - BASE
        got = ours(FILES[name], "cpu", without="two")
        assert np.linalg.norm(got - expected) > 0.01 * np.linalg.norm(expected)


def test_every_method_that_is_read_is_compared() -> None:
    assert {str(yaml.safe_load(text)["merge_method"]) for text in FILES.values()} == set(mergekit.READERS)


DIFFERENT = {
    "weights that differ": (
        file("ties", "weight: 1", "weight: 0.5", "weight: 1"),
        "ties_svd(one, 0.5*two, three, density=1, elect=weighted, rank=24)",
    ),
    "sums that are not divided": (
        file("breadcrumbs_ties", *THREE, shared="weight: 1"),
        "breadcrumbs_ties_svd(one, two, three, density=1, rank=24)",
    ),
    "a base model that is multiplied": (
        file("linear", "weight: 1", "weight: 1", shared="normalize: false", over=False),
        "one + two",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_refused_would_be_another_merge(name: str) -> None:
    text, spec = DIFFERENT[name]
    expected = by_mergekit(yaml.safe_load(text)) - BASE
    adapters = {name: Adapter({"m": lora}) for name, lora in LORAS.items()}
    got = np.asarray(merged(spec, adapters).modules["m"].delta().double())
    assert np.linalg.norm(got - expected) > 0.1 * np.linalg.norm(expected)
    with pytest.raises(SpecError, match="is not read"):
        mergekit.read(text)


def test_names_of_places_are_found_without_looking_at_a_disk() -> None:
    assert mergekit.read(FILES["a mean"]).places["two"] == Path("two")
