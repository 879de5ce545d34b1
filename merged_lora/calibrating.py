"""Measures the inputs of an adapter's modules, and records how the adapter answers.

The model runs with the adapter on a few prompts and on the adapter's own greedy answers to them.  No right
answers are needed.  For Llama-3-8B and an adapter of all linear modules, the sketches of the inputs take
0.9 GB beside the model, and the file 58 MB: arithmetic from the shapes, for 32 components.  A pass backward
keeps 10 MB for each token of a prompt and its answer: counted on the meta device, in bfloat16.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .adapters import Adapter
from .calibration import CALIBRATION_NAME, Calibration, Exchange, Inputs, write_calibration
from .checks import whole_number
from .errors import CalibrationError
from .factors import Factors
from .files.opening import find
from .language_model import LanguageModel, Progress, one_line
from .locations import check_path
from .prompts import read_prompts
from .sketch import Sketch, TokenCounts

logger = logging.getLogger(__name__)

ANSWERING = 0.35
"""The share of the work that goes into answering the prompts, on a CPU."""
STRENGTHS = (0.0, 0.5, 1.0)
"""The inputs are measured with the adapter at each of these, because in a merge they lie in between."""


def calibrate(
    model: str | os.PathLike[str] | LanguageModel,
    adapter: str | os.PathLike[str],
    prompts: str | os.PathLike[str],
    *,
    count: int = 16,
    answers: int = 64,
    components: int = 32,
    replay: bool = True,
    drop: Iterable[str] = (),
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """The calibration of an adapter, which is also written into its folder, in place of an older one.

    model:      folder or name of the base model, or one that is loaded.
    adapter:    PEFT folder of the adapter; what is in it stays as it is.
    prompts:    file of JSON lines: ``{"messages": [...]}``, ``{"prompt": "..."}`` or ``"..."``.
    count:      how many prompts to use: the first that are distinct and fit the model's context.
    answers:    largest number of tokens of an answer.
    components: how many eigenpairs to keep of the inputs of each module.
    replay:     store the prompts and answers, and keep every second of them back for replays of merges that
                are fitted to the inputs.  Without it, the inputs are measured on all of them and none is
                stored.
    drop:       parts to leave out of the adapter, as :meth:`Adapter.load` takes them.
    allow_pickle: read pickled weights if there are no others.
    progress:   called with the share of the work that was done since the last call.

    Needs transformers, of the extra ``calibrate``.  Logs a warning if there are fewer prompts than asked
    for, or prompts that are too long.  Raises MergeError.
    """
    for name, value, low in (
        ("count", count, 1 + replay),
        ("answers", answers, 1),
        ("components", components, 1),
    ):
        try:
            whole_number(low, 65536)(value)
        except ValueError as error:
            raise CalibrationError(f"{name} {error}, got {value!r}") from None
    check_path(adapter)
    if not isinstance(prompts, str | os.PathLike):
        raise CalibrationError(f"the prompts are a file, not {type(prompts).__name__}")
    folder = find(Path(adapter))[0]
    source = Adapter.load(adapter, drop, calibration=False, allow_pickle=allow_pickle)
    if not os.access(folder, os.W_OK):
        raise CalibrationError(f"cannot write {folder / CALIBRATION_NAME}: the folder is read-only")
    next(read_prompts(Path(prompts)), None)  # a file that cannot be read says so before a model is loaded
    loaded = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    report = progress or (lambda _: None)
    loaded.check_fits(source.modules)
    chosen = _choose(loaded, Path(prompts), count, answers, 1 + replay)
    with loaded.wearing(source.modules):
        replies = loaded.answers(chosen, answers, lambda share: report(ANSWERING * share))
    exchanges = [
        Exchange(prompt, reply, fitted=not (replay and i % 2))
        for i, (prompt, reply) in enumerate(zip(chosen, replies, strict=True))
    ]
    fitted = [exchange for exchange in exchanges if exchange.fitted]
    inputs = measure(loaded, source.modules, fitted, components, lambda s: report((1 - ANSWERING) * s))
    calibration = Calibration(
        inputs=inputs,
        adapter=source.digest,
        base_model=source.header.base_model,
        prompts=len(fitted),
        tokens=(sum(len(each.prompt) for each in fitted), sum(len(each.answer) for each in fitted)),
        exchanges=tuple(exchanges) if replay else (),
    )
    write_calibration(folder / CALIBRATION_NAME, calibration)
    return calibration


def measure(
    model: LanguageModel,
    modules: Mapping[str, Factors],
    exchanges: Sequence[Exchange],
    components: int,
    progress: Progress,
) -> dict[str, Inputs]:
    """The inputs that a model's linear modules have while it runs over exchanges, by module name.

    All of them are measured, because a merge may change those that the adapter leaves alone.  The output
    layer, embeddings and experts are measured only if the adapter has them.  The model wears the adapter at
    each of STRENGTHS in turn.

    Half of the weight is the mean over the tokens of all prompts, half the mean over the positions that
    predict the tokens of all answers.  The result is multiplied by the root of how much the answers, per
    token, depend on the outputs of the module (``LanguageModel.sensitivities``).

    Modules that are given the same tensor share one object.  One that no token reaches has zeros.

    model:      without the adapter.
    modules:    of the adapter.
    exchanges:  to run over, one at a time.
    components: how many eigenpairs to keep.
    progress:   called with the share of the exchanges that were run since the last call.
    """
    asked = sum(len(each.prompt) for each in exchanges)
    answered = sum(len(each.answer) for each in exchanges)
    widths = {name: (factors.shape[1], factors.embedding) for name, factors in modules.items()}
    widths |= {name: (width, False) for name, width in model.linear_modules() if name not in modules}
    recorder = _Recorder(widths, components)
    head = model.model.get_output_embeddings()
    # The output layer is the largest of all. It runs for all tokens only if its inputs are asked for.
    keep = 0 if any(model.model.get_submodule(name) is head for name in modules) else 1
    done = 1 / (len(exchanges) * (len(STRENGTHS) + 1))
    for strength in STRENGTHS:
        # An embedding is given the same tokens at every strength. They count once.
        watched = [name for name, (_, embedding) in widths.items() if strength == 1.0 or not embedding]
        with model.wearing(modules, strength), model.watching(watched, recorder.see):
            for each in exchanges:
                weights = torch.zeros(len(each.prompt) + len(each.answer) - 1, dtype=torch.float64)
                weights[: len(each.prompt)] += 0.5 / asked
                weights[len(each.prompt) - 1 :] += 0.5 / answered
                recorder.begin(weights / len(STRENGTHS))
                model.run(each.prompt + each.answer[:-1], keep)
                progress(done)
    inputs = recorder.inputs()
    total = dict.fromkeys(inputs.values(), 0.0)
    with model.wearing(modules):
        for each in exchanges:
            try:
                found = model.sensitivities(each.prompt, each.answer, widths)
            except RuntimeError as error:  # no memory, or no way back through the model's kernels
                raise CalibrationError(
                    f"the model cannot be run backward over {len(each.prompt) + len(each.answer)} tokens "
                    f"of a prompt and its answer: {one_line(error)}"
                ) from None
            for name, sensitivity in found.items():
                total[inputs[name]] += sensitivity / answered
            progress(done)
    if not math.isfinite(sum(total.values())):
        raise CalibrationError(
            "the gradients of the answers hold NaN or infinity, which float16 often brings about; "
            "load the model in bfloat16 or float32"
        )
    scaled = {
        x: Inputs(sensitivity**0.5 * x.values, x.vectors, sensitivity**0.5 * x.rest)
        for x, sensitivity in total.items()
    }
    return {name: scaled[x] for name, x in inputs.items()}


class _Recorder:
    """A sketch for each distinct input of a model's modules.

    widths:     number of inputs of each module, and whether it is an embedding.
    components: how many eigenpairs to keep.
    """

    def __init__(self, widths: Mapping[str, tuple[int, bool]], components: int) -> None:
        self.widths = widths
        self.components = components
        self.sketches: dict[str, Sketch | TokenCounts] = {}
        self.leaders: dict[str, str] = {}
        self.begin(torch.zeros(0))

    def begin(self, weights: torch.Tensor) -> None:
        """Expect inputs for tokens of these weights, float64 ``[tokens]``."""
        self.weights = weights
        self.last: tuple[torch.Tensor | None, str] = (None, "")

    def see(self, name: str, x: torch.Tensor) -> None:
        """Take in the input of a module."""
        tensor, leader = self.last
        if tensor is not x:  # q, k and v are given one tensor, one after the other
            leader = name
            self.last = (x, name)
        if self.leaders.setdefault(name, leader) != leader:
            raise CalibrationError(f"{name} has the inputs of {self.leaders[name]} at some times only")
        if leader != name:
            return
        size, embedding = self.widths[name]
        if name not in self.sketches:
            self.sketches[name] = (
                TokenCounts(size, x.device) if embedding else Sketch(size, self.components, x.device)
            )
        rows = x.reshape(-1) if embedding else x.reshape(-1, x.shape[-1])
        weights = self.weights.to(x.device)
        if len(rows) != len(weights):  # an expert has some of the tokens, and it is not known which
            weights = weights.mean().expand(len(rows))
        self.sketches[name].add(rows, weights)

    def inputs(self) -> dict[str, Inputs]:
        """What was seen of the inputs of each module; raises CalibrationError."""
        found: dict[str, Inputs] = {}
        for name in self.widths:
            leader = self.leaders.get(name, name)
            if leader not in found:
                try:
                    found[leader] = self._result(leader)
                except CalibrationError as error:
                    raise CalibrationError(f"the inputs of {name} hold {error}") from None
            found[name] = found[leader]
        return {name: found[name] for name in self.widths}

    def _result(self, leader: str) -> Inputs:
        if leader in self.sketches:
            return self.sketches[leader].result()
        width, _ = self.widths[leader]
        return Inputs(torch.zeros(0), torch.zeros(0, width, dtype=torch.float16), torch.zeros(width))


def _choose(model: LanguageModel, file: Path, count: int, answers: int, least: int) -> list[tuple[int, ...]]:
    """The token ids of the first distinct prompts of a file that fit the model's context."""
    chosen: dict[tuple[int, ...], None] = {}
    long = 0
    for line, prompt in read_prompts(file):
        try:
            ids = model.encode(prompt)
        except CalibrationError as error:
            raise CalibrationError(f"{file}, line {line}: {error}") from None
        if len(ids) + answers > model.context:
            long += 1
        elif ids:
            chosen.setdefault(ids)
        if len(chosen) == count:
            break
    skipped = (
        f"{_number(long, 'prompt is', 'prompts are')} too long and {'was' if long == 1 else 'were'} skipped: "
        f"the model takes {model.context} tokens, {answers} of them the answer"
    )
    if len(chosen) < least:
        raise CalibrationError(
            f"{file}: {_number(len(chosen), 'usable prompt', 'usable prompts')}, "
            f"and at least {least} are needed"
            + (": one is kept back for replays, unless you say --no-replay" if len(chosen) == 1 else "")
            + (f"; {skipped}" if long else "")
        )
    if long:
        logger.warning("%s: %s", file, skipped)
    if len(chosen) < count:
        logger.warning("%s: %d distinct prompts are used, %d were asked for", file, len(chosen), count)
    return list(chosen)


def _number(count: int, one: str, many: str) -> str:
    return f"{count or 'no'} {one if count == 1 else many}"
