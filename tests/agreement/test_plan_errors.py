"""What does not fit together is refused before anything is computed, with the way out in the message."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch

from agreement.comparing import merged
from making import SMALL, random_adapter
from merged_lora.adapters import Adapter
from merged_lora.bench.cases import calibrated
from merged_lora.engine import merge
from merged_lora.errors import MergeError, PlanError, UnknownAdapterError
from merged_lora.factors import Factors
from merged_lora.files.layout import Header
from merged_lora.planning import make_plan
from merged_lora.spec import parse
from merged_lora.strategies import TABLE

Q_PROJ = next(iter(SMALL))
IN_FACTORS = [strategy.name for strategy in TABLE.values() if strategy.recipe.space == "factors"]


def pair(rank_a: int = 4, rank_b: int = 4) -> dict[str, Adapter]:
    return {"sql": random_adapter(SMALL, rank_a, seed=0), "chat": random_adapter(SMALL, rank_b, seed=1)}


def with_entry(value: float) -> Adapter:
    adapter = random_adapter(SMALL)
    f = adapter.modules[Q_PROJ]
    a = f.a.clone()
    a[1, 2] = value
    return Adapter({**adapter.modules, Q_PROJ: replace(f, a=a)})


@pytest.mark.parametrize("strategy", IN_FACTORS)
def test_different_ranks_are_refused_with_names_ranks_and_strategies_that_work(strategy: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(parse(f"{strategy}(sql, chat)"), pair(4, 6))
    message = str(caught.value)
    for part in (strategy, "4 in sql", "6 in chat", "sum, cat, svd, slerp"):
        assert part in message


@pytest.mark.parametrize("strategy", ["sum", "cat", "svd", "slerp"])
def test_the_strategies_named_there_take_different_ranks(strategy: str) -> None:
    assert merged(f"{strategy}(sql, chat)", pair(4, 6)).modules.keys() == SMALL.keys()


@pytest.mark.parametrize("strategy", IN_FACTORS)
def test_a_rank_over_the_limit_is_refused_where_the_rank_is_that_of_the_sources(strategy: str) -> None:
    with pytest.raises(PlanError, match=r"has rank 4, the limit is 3; svd can reduce the rank"):
        make_plan(parse(f"{strategy}(sql, chat)"), pair(), 3)


def test_cat_is_refused_where_the_ranks_exceed_the_limit() -> None:
    with pytest.raises(PlanError, match=r"cat needs rank 10 for .*, the limit is 9; use sum"):
        make_plan(parse("cat(sql, chat)"), pair(4, 6), 9)
    assert merged("cat(sql, chat)", pair(4, 6), limit=10).modules[Q_PROJ].rank == 10


@pytest.mark.parametrize("strategy", ["sum", "slerp"])
def test_sum_and_slerp_take_what_rank_the_limit_leaves(strategy: str) -> None:
    assert merged(f"{strategy}(sql, chat)", pair(4, 6), limit=10).energy == {}
    limited = merged(f"{strategy}(sql, chat)", pair(4, 6), limit=7)
    assert {f.rank for f in limited.modules.values()} == {7}
    assert limited.energy.keys() == SMALL.keys()


def test_svd_is_refused_where_the_rank_asked_for_exceeds_the_limit() -> None:
    with pytest.raises(PlanError, match="rank=8 is over the limit of 7"):
        make_plan(parse("svd(sql, chat, rank=8)"), pair(), 7)


def test_svd_takes_the_largest_rank_of_its_sources_within_the_limit() -> None:
    assert merged("svd(sql, chat)", pair(4, 6)).modules[Q_PROJ].rank == 6
    assert merged("svd(sql, chat)", pair(4, 6), limit=5).modules[Q_PROJ].rank == 5
    assert merged("svd(sql, chat, rank=3)", pair(4, 6), limit=5).modules[Q_PROJ].rank == 3


def test_the_energy_kept_is_reported_as_the_singular_values_say() -> None:
    adapters = pair(4, 6)
    result = merged("svd(sql, 0.5*chat, rank=3)", adapters)
    kept = asked = 0.0
    for module in SMALL:
        target = adapters["sql"].modules[module].delta() + 0.5 * adapters["chat"].modules[module].delta()
        squares = torch.linalg.svdvals(target) ** 2
        kept, asked = kept + float(squares[:3].sum()), asked + float(squares.sum())
    # float64 throughout; Gram matrices square the condition, so half of its digits count.
    assert result.kept_energy() == pytest.approx(kept / asked, rel=2.0**-26)
    metadata = merge("svd(sql, 0.5*chat, rank=3)", adapters).metadata
    assert float(metadata["merged_lora.kept_energy"]) == result.kept_energy()


@pytest.mark.parametrize("strategy", TABLE)
def test_shapes_of_different_base_models_are_refused(strategy: str) -> None:
    other = random_adapter({**SMALL, Q_PROJ: (48, 40)})
    with pytest.raises(PlanError, match=r"q_proj has delta shapes .*\(48, 32\) in .*different base models"):
        make_plan(parse(f"{strategy}(chat, sql)"), pair() | {"sql": other})


def with_heads(tokens: int, seed: int, **more: tuple[int, int]) -> Adapter:
    """An adapter of a model with that many tokens."""
    heads = {"lm_head": (tokens, 32), "model.embed_tokens": (32, tokens)}
    return random_adapter(SMALL | heads | more, seed=seed, embeddings=["model.embed_tokens"])


@pytest.mark.parametrize("options", ["", ", weights=auto"])
def test_heads_of_other_vocabularies_are_refused_with_the_reason_and_the_way_out(options: str) -> None:
    sources = {"sql": with_heads(96, 0), "chat": with_heads(100, 1)}
    with pytest.raises(PlanError) as caught:
        make_plan(parse(f"sum(sql, chat{options})"), sources)
    assert str(caught.value) == (
        "lm_head has delta shapes (100, 32) in chat, (96, 32) in sql: tokens were added before one of them "
        "was trained, or these adapters belong to different base models; to merge the other modules, leave "
        'out these: without="embed_tokens lm_head" (--without embed_tokens lm_head)'
    )
    way_out = make_plan(parse(f'sum(sql, chat, without="embed_tokens lm_head"{options})'), sources)
    assert way_out.modules.keys() == SMALL.keys()


def test_other_modules_that_differ_as_well_mean_another_base_model() -> None:
    sources = {"sql": with_heads(96, 0, q=(8, 8)), "chat": with_heads(100, 1, q=(8, 9))}
    with pytest.raises(
        PlanError, match=r"^q has delta .* in sql: these adapters belong to different base models$"
    ):
        make_plan(parse("sql + chat"), sources)


def test_heads_of_other_widths_mean_another_base_model() -> None:
    sources = {name: random_adapter({"lm_head": s}) for name, s in {"a": (96, 32), "b": (100, 40)}.items()}
    with pytest.raises(PlanError, match=r"in b: these adapters belong to different base models$"):
        make_plan(parse("a + b"), sources)


def test_an_embedding_and_a_linear_layer_of_one_shape_are_refused() -> None:
    other = random_adapter(SMALL, embeddings=[Q_PROJ])
    with pytest.raises(PlanError, match="q_proj has delta shapes"):
        make_plan(parse("linear(chat, sql)"), pair() | {"sql": other})


def test_layouts_that_differ_are_refused() -> None:
    other = random_adapter(SMALL, header=Header(fan_in_fan_out=True))
    with pytest.raises(PlanError, match="fan_in_fan_out"):
        make_plan(parse("linear(chat, sql)"), pair() | {"sql": other})


def of_bases(*bases: str | None) -> dict[str, Adapter]:
    """Adapters ``a``, ``b``, ... of base models with these names."""
    named = zip("abcde", bases, strict=False)
    return {name: random_adapter(SMALL, header=Header(base), seed=ord(name)) for name, base in named}


@pytest.mark.parametrize(
    ("bases", "expected"),
    [
        (("org/chat", "org/sql"), "org/chat"),
        (("org/x", "org/y", "org/y"), "org/y"),  # as most say
        (("./models/x", "org/x"), "org/x"),  # a name on the hub before a path
        (("/data/models/x", "C:\\models", "~/x", "org/x"), "org/x"),
        (("./x", "./x", "org/x"), "./x"),
        ((None, "./x", "./y"), "./x"),
    ],
)
def test_base_models_of_different_names_are_only_noted(bases: tuple[str | None, ...], expected: str) -> None:
    sources = of_bases(*bases)
    plan = make_plan(parse(f"linear({', '.join(sources)})"), sources)
    (note,) = plan.notes
    assert plan.header.base_model == expected
    assert f"the result takes {expected}, base_model (--base-model) chooses another" in note
    assert all(base in note for base in bases if base)
    chosen = make_plan(plan.spec, sources, base_model="org/chosen")
    assert (chosen.header.base_model, chosen.notes) == ("org/chosen", ())


def test_one_base_model_is_the_results_and_nothing_to_note() -> None:
    plan = make_plan(parse("linear(a, b, c)"), of_bases("org/x", None, "org/x"))
    assert (plan.header.base_model, plan.notes) == ("org/x", ())
    made = merge("a + b", of_bases(None, None), base_model="org/chosen")
    assert made.header.base_model == "org/chosen"


@pytest.mark.parametrize(
    "spec",
    [
        "ties(chat, sql, density=1e-8)",
        "ties_svd(chat, sql, density=1e-8)",
        "knots(chat, sql, scale=0)",
        "sum(0*chat, 0*sql)",
        "karcher(chat, sql, scale=0)",
        "sce(chat, sql, select_topk=1e-8)",
        "knots(chat, sql, density=1e-8, scope=model)",
        "ties(0*chat, sql, density=[0.5, 1e-8])",
    ],
)
def test_a_merge_of_nothing_is_noted(spec: str) -> None:
    (note,) = make_plan(parse(spec), pair()).notes
    assert "the merge is zero" in note
    assert not any(f.delta().any() for f in merged(spec, pair()).modules.values())


def without_effect(reason: str, names: Collection[str] = tuple(SMALL)) -> Adapter:
    """An adapter whose delta is zero in these modules."""
    adapter = random_adapter(SMALL, seed=1)
    change: dict[str, Callable[[Factors], Factors]] = {
        "its B holds nothing but zeros, as before training": lambda f: replace(f, b=-0.0 * f.b),
        "its A holds nothing but zeros": lambda f: replace(f, a=torch.zeros_like(f.a)),
        "its scaling is 0 (lora_alpha)": lambda f: replace(f, scaling=0.0),
    }
    return calibrated(
        Adapter({name: change[reason](f) if name in names else f for name, f in adapter.modules.items()})
    )


REASONS = (
    "its B holds nothing but zeros, as before training",
    "its A holds nothing but zeros",
    "its scaling is 0 (lora_alpha)",
)


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("strategy", TABLE)
def test_a_source_whose_delta_is_zero_is_noted_with_the_reason(strategy: str, reason: str) -> None:
    sources = pair() | {"sql": without_effect(reason)}
    for options in ("", ", weights=auto"):
        notes = make_plan(parse(f"{strategy}(chat, sql{options})"), sources).notes
        assert f"the delta of sql is zero, because {reason}" in notes
        assert not [note for note in notes if "the merge is zero" in note]


@pytest.mark.parametrize("reason", REASONS)
def test_a_merge_of_such_sources_alone_is_zero_for_that_reason(reason: str) -> None:
    notes = make_plan(parse("sum(sql)"), {"sql": without_effect(reason)}).notes
    assert notes == (
        f"the delta of sql is zero, because {reason}",
        "the merge is zero, because all its sources are",
    )


def test_a_source_with_an_effect_in_one_module_is_not_called_zero() -> None:
    first, *others = sorted(SMALL)
    for idle in (others, [first, *others[1:]]):
        sources = pair() | {"sql": without_effect(REASONS[0], idle)}
        assert make_plan(parse("chat + sql"), sources).notes == ()
    notes = make_plan(
        parse('sum(chat, sql, without="mlp")'), sources | {"sql": without_effect(REASONS[0], others)}
    )
    assert notes.notes == (f"the delta of sql is zero, because {REASONS[0]}",)


def test_a_rank_that_there_is_not_is_noted() -> None:
    rank = sum(adapter.rank for adapter in pair().values())
    assert make_plan(parse(f"core_ties(chat, sql, rank={rank})"), pair()).notes == ()
    (note,) = make_plan(parse(f"core_ties(chat, sql, rank={rank + 1})"), pair()).notes
    assert note.endswith(f"the result has rank {rank}")


def test_modules_that_some_sources_lack_are_noted_and_merged_from_the_others() -> None:
    sources = pair() | {"chat": random_adapter({Q_PROJ: SMALL[Q_PROJ]}, seed=1)}
    plan = make_plan(parse("linear(sql, chat)"), sources)
    (note,) = plan.notes
    assert note.startswith("3 of 4 modules are not in chat")
    alone, together = merged("linear(sql)", sources).modules, merged("linear(sql, chat)", sources).modules
    assert together.keys() == SMALL.keys()
    for module in SMALL:
        assert torch.equal(alone[module].a, together[module].a) == (module != Q_PROJ)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("strategy", TABLE)
def test_sources_with_nan_or_infinity_are_refused_by_name(strategy: str, value: float) -> None:
    with pytest.raises(PlanError, match=rf"sql: {Q_PROJ} holds NaN or infinity"):
        make_plan(parse(f"{strategy}(chat, sql)"), pair() | {"sql": with_entry(value)})


def test_an_unknown_adapter_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UnknownAdapterError, match=r"unknown adapter 'sqll'; known: chat, sql"):
        merge("linear(sqll, chat)", pair())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("0.5sql", "did you mean 0.5*sql? "),
        ("2sql", "did you mean 2*sql? "),
        ("1e-3sql", "did you mean 1e-3*sql? "),
        ("0.5-sql", ""),
        ("0.5json", ""),
    ],
)
def test_a_weight_without_its_star_is_found_in_the_name(name: str, hint: str) -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        merge(f"chat + {name}", pair())
    assert str(caught.value) == f"unknown adapter '{name}'; {hint}known: chat, sql"


def test_a_name_that_begins_with_a_number_is_a_name() -> None:
    sources = {"7b": random_adapter(SMALL), "b": random_adapter(SMALL, seed=1)}
    assert make_plan(parse("7b + b"), sources).spec.names == ("7b", "b")


def test_an_unknown_adapter_is_refused_where_none_is_known() -> None:
    with pytest.raises(UnknownAdapterError, match=r"unknown adapter 'a', 'b'; none is known"):
        merge("linear(a, b)", {})


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_limit_below_1_is_refused(rank: int) -> None:
    with pytest.raises(PlanError, match=f"the rank limit must be at least 1, got {rank}"):
        merge("sum(sql, chat)", pair(), rank=rank)


@pytest.mark.parametrize("strategy", ["sum", "linear"])
def test_a_weight_beyond_float32_is_refused(strategy: str) -> None:
    # linear takes the root of the product: it needs the square of what sum needs.
    spec = parse(f"{strategy}(1e30*sql, chat, scale=1e60)")
    with pytest.raises(PlanError, match="more than float32 can hold"):
        make_plan(spec, pair())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, {}), "a spec is text or a MergeSpec, not NoneType"),
        (({"ids": ["a"]}, {}), "a spec is text or a MergeSpec, not dict"),
        (("sum(a)", "folder"), "adapters are a mapping from names to folders, not str"),
        (("sum(a)", {"a": None}), "an adapter's path is text or a Path, not NoneType"),
        (("sum(a)", {"a": b"a"}), "an adapter's path is text or a Path, not bytes"),
        (("sum(a)", {1: "a"}), "an adapter's name is text, not int"),
        (("sum(a)", {}, "auto", "8"), "the rank limit must be a whole number, got '8'"),
        (("sum(a)", {}, "auto", True), "the rank limit must be a whole number, got True"),
        (("sum(a)", {}, "auto", 2.5), "the rank limit must be a whole number, got 2.5"),
        (("sum(a)", {}, "auto", None, None, 3), "the base model must be a name that is not blank, got 3"),
    ],
)
def test_arguments_of_another_type_are_refused_before_work_begins(
    arguments: tuple[object, ...], words: str
) -> None:
    with pytest.raises(MergeError, match=re.escape(words)):
        merge(*arguments)  # type: ignore[arg-type]


def test_a_module_that_is_no_pair_of_factors_is_refused() -> None:
    with pytest.raises(MergeError, match="m: a module of an adapter is Factors, not Tensor"):
        Adapter({"m": torch.zeros(2, 2)})  # type: ignore[dict-item]
