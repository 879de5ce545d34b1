"""A causal language model of transformers that runs with factors added to its modules.

The factors are added by hooks, as PEFT adds them, so that the weights of the model are never changed and a
merge can be run before it is written.  Knows nothing of calibrations.  transformers is imported when a
model is loaded.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional

from .errors import CalibrationError, listed
from .factors import Factors
from .replay import Replayed

BATCH_TOKENS = 16384
"""Tokens of all rows of a batch that is answered: it bounds the memory for keys and values."""

DRAWS = 1
"""Passes backward for an estimate of the sensitivities to modules."""

Progress = Callable[[float], object]
"""Called with the share of the work that was done since the last call."""

Text = str | Sequence[Mapping[str, str]]
"""A prompt as it is, or messages for the chat template."""


class LanguageModel:
    """A causal language model and its tokenizer.

    model:     of transformers, in evaluation mode, on one device or several.
    tokenizer: of transformers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._logits_to_keep = "logits_to_keep" in signature(model.forward).parameters

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> LanguageModel:
        """The model in a folder or of a name on the hub: on a GPU in its own dtype, or on the CPU in float32.

        A model that the hub has is downloaded into its cache, and taken from there if the hub is silent.
        Raises CalibrationError.
        """
        transformers, place = _found(name)
        make_tokenizer: Any = transformers.AutoTokenizer
        make_model: Any = transformers.AutoModelForCausalLM
        on_gpu = torch.cuda.is_available()
        try:
            tokenizer = make_tokenizer.from_pretrained(place)
            model = make_model.from_pretrained(place, dtype="auto" if on_gpu else torch.float32)
            model = model.to("cuda" if on_gpu else "cpu").eval()  # which may not fit into the GPU's memory
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise CalibrationError(f"cannot load the model {os.fspath(name)}: {one_line(error)}") from None
        return cls(model, tokenizer)

    @property
    def context(self) -> int:
        """The largest number of tokens that the model takes."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit or self.tokenizer.model_max_length)

    def encode(self, text: Text) -> tuple[int, ...]:
        """The token ids of a prompt.  Raises CalibrationError if the chat template does not take it.

        Messages go through the chat template, up to where the answer begins.  A text gets what the
        tokenizer adds by itself, and no template.
        """
        if isinstance(text, str):
            return tuple(self.tokenizer(text, verbose=False)["input_ids"])
        try:
            text = self.tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise CalibrationError(f"the model's chat template: {one_line(error)}") from None
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def check_fits(self, modules: Mapping[str, Factors]) -> None:
        """Raise CalibrationError unless the model has all of these modules, with the same shapes."""
        missing = [name for name in modules if self._find(name) is None]
        if missing:
            raise CalibrationError(f"the model does not fit: it has no {listed(missing, limit=3)}")
        for name, factors in modules.items():
            there, embedding = _shape(self._find(name))
            if (there, embedding) != (factors.shape, factors.embedding):
                raise CalibrationError(
                    f"the model does not fit: {name} is {_kind(there, embedding)} there, "
                    f"and {_kind(factors.shape, factors.embedding)} in the adapter"
                )

    def linear_modules(self) -> Iterator[tuple[str, int]]:
        """Name and number of inputs of each linear module but the output layer and those in experts."""
        head = self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            shape, embedding = _shape(module)
            if shape is not None and not embedding and module is not head and ".experts." not in name:
                yield name, shape[1]

    @contextmanager
    def wearing(self, modules: Mapping[str, Factors], strength: float = 1.0) -> Iterator[None]:
        """Add these deltas, times ``strength``, to the outputs of the model's modules, in float32.

        Raises CalibrationError.
        """
        self.check_fits(modules)
        with ExitStack() as hooks:
            for name, factors in modules.items() if strength else ():
                module = self._find(name)
                added = _addition(factors, module, strength)
                handle = module.register_forward_hook(
                    lambda _, args, output, added=added: output + added(args[0]).to(output.dtype)
                )
                hooks.callback(handle.remove)
            yield

    @contextmanager
    def watching(self, names: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Call ``see`` with the name and the input of each of these modules whenever it runs."""
        with ExitStack() as hooks:
            for name in names:
                handle = self._find(name).register_forward_pre_hook(
                    lambda _, args, name=name: see(name, args[0])
                )
                hooks.callback(handle.remove)
            yield

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[tuple[int, ...]], limit: int, progress: Progress
    ) -> list[tuple[int, ...]]:
        """The greedy answer to each prompt as token ids, with the token that ends it unless it is cut.

        prompts:  token ids.
        limit:    largest number of tokens of an answer.
        progress: called with the share of the work that was done since the last call.
        """
        import transformers

        ends = self._ends()
        make_config: Any = transformers.GenerationConfig
        config = make_config(
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        batches = _batches(prompts, limit)
        found: dict[int, tuple[int, ...]] = {}
        # Generation takes what it is not given from the model's configuration: penalties for repetition, say.
        before, self.model.generation_config = self.model.generation_config, config
        try:
            for batch in batches:
                rows = [prompts[i] for i in batch]
                width = max(map(len, rows))
                ids = torch.tensor([(config.pad_token_id,) * (width - len(row)) + row for row in rows])
                mask = torch.tensor([(0,) * (width - len(row)) + (1,) * len(row) for row in rows])
                steps = _Steps(limit, lambda share: progress(share / len(batches)))
                made = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    stopping_criteria=[steps],
                )
                steps.finish()
                for i, answer in zip(batch, made[:, width:].tolist(), strict=True):
                    end = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
                    found[i] = tuple(answer[:end])
        finally:
            self.model.generation_config = before
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def run(self, ids: tuple[int, ...], keep: int) -> torch.Tensor:
        """The logits ``[keep, vocabulary]`` after the last of these tokens; raises CalibrationError.

        ids:  token ids.
        keep: for how many of the last tokens the output layer runs, 0 for all of them.
        """
        return self._logits(ids, keep)

    def _logits(self, ids: tuple[int, ...], keep: int) -> torch.Tensor:
        known = self.model.get_input_embeddings().num_embeddings
        if max(ids) >= known:
            raise CalibrationError(
                f"the model has {known} tokens, and there is no token {max(ids)} among them"
            )
        keeping = {"logits_to_keep": keep} if self._logits_to_keep else {}
        out = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False, **keeping)
        logits: torch.Tensor = out.logits[0, -keep:]
        return logits

    def replay(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Replayed:
        """How the model, with the factors that it wears, takes an answer; raises CalibrationError."""
        logits = self.run(prompt + answer[:-1], len(answer)).float()
        expected = torch.tensor(answer, device=logits.device)
        if max(answer) >= logits.shape[1]:
            raise CalibrationError(f"the model has no token {max(answer)} to answer with")
        likelihood = logits.log_softmax(1).gather(1, expected[:, None]).sum()
        return Replayed(bool((logits.argmax(1) == expected).all()), float(likelihood), len(answer))

    @torch.enable_grad()
    def sensitivities(
        self, prompt: tuple[int, ...], answer: tuple[int, ...], names: Iterable[str]
    ) -> dict[str, float]:
        """How much an answer depends on the outputs of each of these modules, by name.

        That is ``sum_t |d m_t / d y|^2``, where y are the outputs of the module for all tokens, and m_t the
        log-odds of token t of the answer.  It is estimated by the gradients of DRAWS sums of all m_t with
        random signs, which are always the same.  Modules that no token reaches are left out.

        The activations of all tokens are in memory at the same time, as in training.
        """
        outputs: list[tuple[str, torch.Tensor]] = []
        first = self.model.get_input_embeddings()
        with ExitStack() as hooks:
            # If the weights want no gradient, nothing does unless the outputs of the first module do.
            begin = first.register_forward_hook(lambda _, args, output: output.detach().requires_grad_())
            hooks.callback(begin.remove)
            for name in names:
                handle = self._find(name).register_forward_hook(
                    lambda _, args, output, name=name: outputs.append((name, output))
                )
                hooks.callback(handle.remove)
            logits = self._logits(prompt + answer[:-1], len(answer)).float()
        own = torch.tensor(answer, device=logits.device)[:, None]
        margins = logits.gather(1, own) - logits.scatter(1, own, -torch.inf).logsumexp(1, keepdim=True)
        generator = torch.Generator().manual_seed(0)
        found = {name: 0.0 for name, _ in outputs}
        for draw in range(DRAWS):
            signs = torch.randint(0, 2, margins.shape, generator=generator).to(margins) * 2 - 1
            gradients = torch.autograd.grad(
                (margins * signs).sum(),
                [output for _, output in outputs],
                retain_graph=draw + 1 < DRAWS,
                materialize_grads=True,
            )
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                found[name] += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 / DRAWS
        return found

    def _find(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        named = {*ends} if isinstance(ends, list | tuple) else {ends}
        return {int(token) for token in named | {self.tokenizer.eos_token_id} if token is not None}


class _Steps:
    """A criterion that never stops the generation, and reports each token of it."""

    def __init__(self, limit: int, progress: Progress) -> None:
        self.limit, self.progress, self.done = limit, progress, 0

    def __call__(self, ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self.done += 1
        self.progress(1 / self.limit)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def finish(self) -> None:
        self.progress(1 - self.done / self.limit)


def outline(name: str | os.PathLike[str]) -> Any:
    """A model of transformers without weights, on the device ``meta``: its configuration alone is read.

    name: folder or name on the hub, as :meth:`LanguageModel.load` takes it.

    Raises CalibrationError.
    """
    transformers, place = _found(name)
    try:
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        own = getattr(transformers, str(next(iter(config.architectures or ()), "")), None)
        with torch.device("meta"):
            if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
                return own(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, LookupError, AttributeError, ArithmeticError, ValueError, TypeError, RuntimeError,
            ImportError) as error:  # fmt: skip
        raise CalibrationError(f"cannot read the model {os.fspath(name)}: {one_line(error)}") from None


def matrices_of(model: Any) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """Name, shape ``(out, in)`` and whether it is an embedding, of each matrix that may have factors.

    An expert in a parameter has the parameter's name, and its number in brackets.
    """
    for name, module in model.named_modules():
        shape, embedding = _shape(module)
        if shape is not None:
            yield name, shape, embedding
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and ".experts." in name:
            for expert in range(parameter.shape[0]):
                yield f"{name}[{expert}]", (parameter.shape[1], parameter.shape[2]), False


def _found(name: str | os.PathLike[str]) -> tuple[Any, str | os.PathLike[str]]:
    """transformers, and a place from which it loads the model of that name; raises CalibrationError."""
    if not isinstance(name, str | os.PathLike):
        raise CalibrationError(f"a model is a folder or a name on the hub, not {type(name).__name__}")
    try:
        import transformers
    except ImportError as error:
        raise CalibrationError(
            "running a model needs transformers; install it with: "
            f'pip install "vllm-merged-lora[calibrate]" ({error})'
        ) from None
    return transformers, name if Path(name).exists() else _on_hub_or_cached(os.fspath(name))


def _on_hub_or_cached(name: str) -> str:
    """The name of a model that the hub has, or its folder in the hub's cache if the hub does not answer.

    transformers asks a hub that does not answer a dozen times, with pauses of a minute in all.  Raises
    CalibrationError if there is no such model.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    failed = f"cannot load the model {name}: there is no such folder here, "
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return name
    except errors.GatedRepoError:  # a kind of the next one
        return name  # transformers says what to do
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise CalibrationError(
            f"{failed}and no such model on the hub, unless it is private and needs a token (HF_TOKEN)"
        ) from None
    except (OSError, getattr(errors, "HTTPError", errors.HfHubHTTPError)):
        pass  # the cache may have it
    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        silent = "may not be asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "does not answer"
        raise CalibrationError(
            f"{failed}the hub {silent}, and its cache {constants.HF_HUB_CACHE} lacks the model; name a folder"
        ) from None


def _batches(prompts: Sequence[tuple[int, ...]], limit: int) -> list[list[int]]:
    """Indices of prompts of similar length, as many together as BATCH_TOKENS allows."""
    batches: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        longest = len(prompts[batches[-1][0]]) + limit if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def one_line(error: Exception) -> str:
    """What another library says, on one line and not at length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shape(module: Any) -> tuple[tuple[int, int] | None, bool]:
    """Shape ``(out, in)`` of a module's weights, and whether it is an embedding."""
    if isinstance(module, torch.nn.Embedding):
        return (module.embedding_dim, module.num_embeddings), True
    for rows, columns in (("out_features", "in_features"), ("nf", "nx")):  # the second is GPT-2's Conv1D
        if hasattr(module, rows) and hasattr(module, columns):
            return (getattr(module, rows), getattr(module, columns)), False
    return None, False


def _kind(shape: tuple[int, int] | None, embedding: bool) -> str:
    return f"{'an embedding' if embedding else 'a matrix'} of shape {shape}" if shape else "no matrix"


def _addition(factors: Factors, module: Any, strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the input of a module to what the factors add to its output, in float32."""
    device = next(itertools.chain(module.parameters(), module.buffers())).device  # quantized, only buffers
    a = factors.a.to(device, torch.float32)
    b = strength * factors.scaling * factors.b.to(device, torch.float32)
    if not factors.embedding:
        return lambda x: functional.linear(functional.linear(x.float(), a), b)
    # Some models scale their embeddings, and with them what PEFT adds.
    table, scale = a.T.contiguous(), getattr(module, "embed_scale", 1.0)
    return lambda ids: functional.linear(functional.embedding(ids, table), b) * scale
