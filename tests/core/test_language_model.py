"""A model that wears factors computes what PEFT computes, and answers with the likeliest token each time."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from fetched import Site
from making import random_adapter
from merged_lora import language_model
from merged_lora.adapters import Adapter
from merged_lora.errors import CalibrationError
from merged_lora.files.layout import Header
from merged_lora.language_model import LanguageModel
from stand_ins import COMMIT, Answer

ENDS = {"model.embed_tokens": (tiny.HIDDEN, tiny.VOCABULARY), "lm_head": (tiny.VOCABULARY, tiny.HIDDEN)}
"""The first and the last module of the tiny model, as ``name: (out, in)``."""
PROMPTS = [(5, 6, 7, 8, 9, 10), (40, 41), (1, 2, 3), (9,) * 20]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(place: Path) -> LanguageModel:
    return LanguageModel.load(place)


@pytest.fixture
def model(loaded: LanguageModel) -> Iterator[LanguageModel]:
    """The tiny model; a test may change its configuration of generation."""
    before = copy.deepcopy(loaded.model.generation_config)
    yield loaded
    loaded.model.generation_config = before


def everywhere(seed: int = 0) -> Adapter:
    """An adapter of all linear modules, the embedding and the output layer."""
    return random_adapter(
        tiny.MODULES | ENDS,
        rank=4,
        seed=seed,
        embeddings=["model.embed_tokens"],
        header=Header("tiny", "CAUSAL_LM"),
    )


@torch.inference_mode()
def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu()
    return out


def test_factors_that_are_worn_do_what_peft_does(place: Path, model: LanguageModel, tmp_path: Path) -> None:
    adapter = everywhere()
    adapter.save(tmp_path / "a")
    peft = PeftModel.from_pretrained(LanguageModel.load(place).model, tmp_path / "a")
    for ids in PROMPTS:
        bare = logits(model.model, ids)
        with model.wearing(adapter.modules):
            worn = logits(model.model, ids)
        # The two sum in another order: a few float32 roundings of the largest logit, over two layers.
        torch.testing.assert_close(
            worn, logits(peft, ids), rtol=0, atol=64 * 2**-24 * float(worn.abs().max())
        )
        assert float((worn - bare).abs().max()) > 0.1 * float(worn.abs().max())


def test_factors_of_a_model_with_transposed_weights_do_what_peft_does(tmp_path: Path) -> None:
    make: Any = GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, initializer_range=0.2)
    gpt2 = make(config).eval()
    modules = {"transformer.h.0.attn.c_attn": (96, 32), "transformer.h.0.mlp.c_proj": (32, 128)}
    adapter = random_adapter(modules, header=Header("gpt2", "CAUSAL_LM", fan_in_fan_out=True))
    adapter.save(tmp_path / "a")
    with LanguageModel(gpt2, None).wearing(adapter.modules):
        worn = logits(gpt2, (5, 6, 7))
    bare = logits(gpt2, (5, 6, 7))
    peft = logits(PeftModel.from_pretrained(gpt2, tmp_path / "a"), (5, 6, 7))
    torch.testing.assert_close(worn, peft, rtol=0, atol=64 * 2**-24 * float(worn.abs().max()))
    assert float((worn - bare).abs().max()) > 0.1 * float(worn.abs().max())


class Packed(torch.nn.Module):
    """A linear module that holds its weights in a buffer, as quantized ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.register_buffer("packed", torch.zeros(15, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 5)


def test_a_module_that_has_no_parameters_wears_factors() -> None:
    adapter = random_adapter({"0": (5, 6)})
    packed = torch.nn.Sequential(Packed())
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with LanguageModel(packed, None).wearing(adapter.modules):
        torch.testing.assert_close(
            packed(x).double(), x.double() @ adapter.modules["0"].delta().T, rtol=0, atol=1e-5
        )


def test_an_embedding_that_scales_its_outputs_scales_what_is_added(model: LanguageModel) -> None:
    adapter = random_adapter({"model.embed_tokens": ENDS["model.embed_tokens"]}, embeddings=list(ENDS))
    embedding = model.model.get_submodule("model.embed_tokens")
    ids = torch.arange(9)
    with model.wearing(adapter.modules), torch.inference_mode():
        once = embedding(ids) - embedding.weight[ids]
        embedding.embed_scale = torch.tensor(8.0)
        try:
            with model.wearing(adapter.modules):
                both = embedding(ids) - embedding.weight[ids]
        finally:
            del embedding.embed_scale
    torch.testing.assert_close(both, 9 * once, rtol=1e-5, atol=1e-5)


def test_what_was_worn_leaves_no_trace(model: LanguageModel) -> None:
    before = logits(model.model, PROMPTS[0])
    with pytest.raises(CalibrationError), model.wearing(everywhere().modules):
        model.replay((1, 2), (tiny.VOCABULARY,))
    assert torch.equal(logits(model.model, PROMPTS[0]), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def greedy(model: LanguageModel, prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The greedy answer, computed without a cache, a batch or transformers' own generation."""
    ids = prompt
    while len(ids) < len(prompt) + limit:
        ids += (int(logits(model.model, ids)[-1].argmax()),)
    return ids[len(prompt) :]


@pytest.mark.parametrize("tokens", [language_model.BATCH_TOKENS, 40, 1])
def test_answers_are_the_likeliest_tokens_in_batches_of_any_size(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(language_model, "BATCH_TOKENS", tokens)
    shares: list[float] = []
    with model.wearing(everywhere().modules):
        expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
        assert model.answers(PROMPTS, 12, shares.append) == expected
    assert sum(shares) == pytest.approx(1)
    assert len(set(expected)) == len(expected)


def test_a_models_own_ideas_of_generation_change_no_answer(model: LanguageModel) -> None:
    expected = model.answers(PROMPTS, 12, lambda _: None)
    config = model.model.generation_config
    config.update(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, no_repeat_ngram_size=1, min_length=50
    )
    assert model.answers(PROMPTS, 12, lambda _: None) == expected
    assert model.model.generation_config is config


@pytest.mark.parametrize("form", [int, lambda token: [999, token]], ids=["one", "several"])
def test_an_answer_includes_the_token_that_ends_it(model: LanguageModel, form: Any) -> None:
    free = [greedy(model, prompt, 12) for prompt in PROMPTS]
    end = free[0][4]
    model.model.generation_config.eos_token_id = form(end)
    shares: list[float] = []
    answers = model.answers(PROMPTS, 12, shares.append)
    ends = {end, model.tokenizer.eos_token_id}
    first = [next((at + 1 for at, token in enumerate(a) if token in ends), 12) for a in free]
    assert answers == [a[:length] for a, length in zip(free, first, strict=True)]
    assert len(answers[0]) <= 5
    assert sum(shares) == pytest.approx(1)


def test_prompts_of_messages_go_through_the_template_and_texts_do_not(model: LanguageModel) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert model.encode(messages) == ids("<system>be brief<eos><user>hi<eos><assistant>")
    assert model.encode("hi") == ids("hi")


def test_a_text_gets_the_first_token_of_its_tokenizer_and_a_template_brings_its_own(
    model: LanguageModel,
) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", first)]
    )
    tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}"
    other = LanguageModel(model.model, tokenizer)
    assert other.encode("hi") == (first, *model.encode("hi"))
    assert other.encode([{"role": "user", "content": "hi"}]) == (first, *model.encode("hi"))


def test_a_template_that_does_not_take_messages_is_a_line(model: LanguageModel) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(CalibrationError, match="chat template: roles must alternate"):
        LanguageModel(model.model, tokenizer).encode([{"role": "user", "content": "hi"}])
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="chat_template is not set"):
        LanguageModel(model.model, tokenizer).encode([{"role": "user", "content": "hi"}])


def test_a_replay_has_the_likelihood_of_an_answer_and_whether_it_is_kept(model: LanguageModel) -> None:
    answer = greedy(model, PROMPTS[0], 5)
    replayed = model.replay(PROMPTS[0], answer)
    table = logits(model.model, PROMPTS[0] + answer).double()
    rows = table[len(PROMPTS[0]) - 1 : -1]
    expected = sum(float(row[token] - row.logsumexp(0)) for row, token in zip(rows, answer, strict=True))
    assert (replayed.kept, replayed.tokens) == (True, 5)
    assert replayed.log_likelihood == pytest.approx(expected, rel=1e-5)
    other = model.replay(PROMPTS[0], (*answer[:-1], (answer[-1] + 1) % tiny.VOCABULARY))
    assert (other.kept, other.tokens) == (False, 5)
    assert other.log_likelihood < replayed.log_likelihood


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "lm_head"])
def test_the_sensitivity_to_a_module_is_what_differences_show(loaded: LanguageModel, name: str) -> None:
    model = LanguageModel(copy.deepcopy(loaded.model).double(), None)
    prompt, (answer,) = PROMPTS[0], (7,)
    found = model.sensitivities(prompt, (answer,), [name])
    tokens = 1 if name == "lm_head" else len(prompt)  # it runs for the answer alone
    width = {"lm_head": tiny.VOCABULARY, "model.embed_tokens": tiny.HIDDEN}.get(name) or tiny.MODULES[name][0]
    steps = 2e-3 * torch.eye(tokens * width, dtype=torch.float64).view(-1, tokens, width)

    @torch.inference_mode()
    def odds(pushed: torch.Tensor) -> torch.Tensor:
        push = model.model.get_submodule(name).register_forward_hook(lambda _, args, output: output + pushed)
        ids = torch.tensor([prompt]).expand(len(pushed), -1)
        shares = model.model(ids, logits_to_keep=1).logits[:, -1].softmax(1)[:, answer]
        push.remove()
        logs: torch.Tensor = shares.log() - (1 - shares).log()
        return logs

    gradient = (odds(steps) - odds(-steps)) / 4e-3  # by no smaller steps, because norms compute in float32
    assert found == {name: pytest.approx(float(gradient.square().sum()), rel=1e-4)}


def test_the_sensitivity_of_an_answer_is_the_sum_of_those_of_its_tokens(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(tiny.MODULES)
    prompt, answer = PROMPTS[0], (7, 30, 9)
    with model.wearing(everywhere().modules):
        each = [model.sensitivities(prompt + answer[:i], answer[i : i + 1], names) for i in range(3)]
        monkeypatch.setattr(language_model, "DRAWS", 64)
        found = model.sensitivities(prompt, answer, names)
    for name in names:
        # The signs of three tokens have four combinations, which 64 draws have nearly equally often.
        assert found[name] == pytest.approx(sum(part[name] for part in each), rel=0.25)


def test_sensitivities_need_no_weights_that_want_gradients_and_leave_nothing(model: LanguageModel) -> None:
    names = list(tiny.MODULES)
    wanting = model.sensitivities(PROMPTS[0], (7, 8), names)
    frozen = LanguageModel(copy.deepcopy(model.model).requires_grad_(False), model.tokenizer)
    assert frozen.sensitivities(PROMPTS[0], (7, 8), names) == wanting
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_module_that_no_token_reaches_has_no_sensitivity(model: LanguageModel) -> None:
    layer = model.model.get_submodule("model.layers.0.mlp")
    layer.spare = torch.nn.Linear(4, 4)
    try:
        assert list(model.sensitivities((1, 2), (3,), ["lm_head", "model.layers.0.mlp.spare"])) == ["lm_head"]
    finally:
        del layer.spare


def test_tokens_that_the_model_does_not_have_are_an_error(model: LanguageModel) -> None:
    with pytest.raises(CalibrationError, match="the model has 320 tokens, and there is no token 320"):
        model.replay((1, tiny.VOCABULARY), (2,))
    with pytest.raises(CalibrationError, match="the model has no token 320 to answer with"):
        model.replay((1, 2), (tiny.VOCABULARY,))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.2.mlp.up_proj", (160, 64), "it has no model.layers.2.mlp.up_proj"),
        (
            "model.layers.1.mlp.up_proj",
            (160, 63),
            r"up_proj is a matrix of shape \(160, 64\) there, and a matrix",
        ),
        ("model.layers.1.mlp.up_proj", (159, 64), r"and a matrix of shape \(159, 64\) in the adapter"),
        ("model.embed_tokens", (64, 320), r"is an embedding of shape \(64, 320\) there, and a matrix"),
        ("model.norm", (64, 64), "model.norm is no matrix there"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    model: LanguageModel, name: str, shape: tuple[int, int], message: str
) -> None:
    adapter = random_adapter({name: shape})
    with pytest.raises(CalibrationError, match=message), model.wearing(adapter.modules):
        pass


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_that_holds_no_model_is_a_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CalibrationError) as caught:
        LanguageModel.load(tmp_path)
    assert str(caught.value).startswith(f"cannot load the model {tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_cut_short_is_a_line(place: Path, tmp_path: Path) -> None:
    for file in place.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:5000] if file.name == "model.safetensors" else data)
    with pytest.raises(CalibrationError, match="cannot load the model"):
        LanguageModel.load(tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(hf: Site) -> None:
    hf.server.fault = lambda asked, answer: Answer(503)
    with pytest.raises(CalibrationError, match=r"^cannot load the model org/x: .* the hub does not answer"):
        LanguageModel.load("org/x")
    assert len([asked for asked in hf.server.asked if "org/x" in asked.path]) == 1


def test_a_model_that_is_neither_here_nor_on_the_hub_is_said_to_be_neither(hf: Site) -> None:
    for name in ("org/x", "folders/org/x", "./x"):
        with pytest.raises(
            CalibrationError, match=f"{name}: there is no such folder here, and no such model on the hub"
        ):
            LanguageModel.load(name)


def test_the_hub_is_not_asked_where_it_may_not_be(hf: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"may not be asked \(HF_HUB_OFFLINE\), .*; name a folder$"):
        LanguageModel.load("org/x")
    assert not hf.server.asked


def test_a_model_in_the_cache_is_loaded_if_the_hub_does_not_answer(
    hf: Site, place: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "hub" / "models--org--x"
    shutil.copytree(place, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    hf.server.fault = lambda asked, answer: Answer(503)
    loaded = LanguageModel.load("org/x")
    assert len([asked for asked in hf.server.asked if "org/x" in asked.path]) == 1
    assert loaded.model.config.vocab_size == tiny.VOCABULARY


def test_a_folder_makes_no_request(hf: Site, place: Path) -> None:
    LanguageModel.load(place)
    assert not hf.server.asked


def test_without_transformers_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CalibrationError, match=r'pip install "vllm-merged-lora\[calibrate\]"'):
        LanguageModel.load(place)
