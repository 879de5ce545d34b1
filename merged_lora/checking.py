"""Runs a merge over its sources' own answers, to see which of them survive. Knows nothing of servers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from .adapters import Adapter
from .engine import merge, sources_of
from .language_model import LanguageModel, Progress
from .replay import Survival, exchanges_of, survival
from .spec import MergeSpec, parse

logger = logging.getLogger(__name__)


def check(
    spec: str | MergeSpec,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    model: str | os.PathLike[str] | LanguageModel,
    *,
    backend: str = "auto",
    rank: int | None = None,
    progress: Progress | None = None,
) -> list[Survival]:
    """How many of its own answers each source of a merge keeps, the one that keeps the smallest share first.

    The merge is made in memory and nothing is written.  It is run over the prompts and answers in the
    calibration of each source.  A merge that is fitted to inputs is run over those alone that it was not
    fitted to.

    spec:     the merge.
    adapters: for every source name a PEFT folder with a calibration, or an :class:`Adapter`.
    model:    folder or name of the base model, or one that is loaded.
    backend:  ``triton``, ``cpu``, ``numpy`` or ``auto``.
    rank:     largest rank of the result, None for any.
    progress: called with the share of the answers that were run since the last call.

    Needs transformers, of the extra ``calibrate``.  Logs a warning for every source that keeps less than
    half of its answers.  Raises MergeError.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    sources = sources_of(spec, adapters)
    exchanges = {name: exchanges_of(name, source, spec.strategy) for name, source in sources.items()}
    merged = merge(spec, sources, backend, rank)
    loaded = model if isinstance(model, LanguageModel) else LanguageModel.load(model)
    total = sum(map(len, exchanges.values()))
    found = []
    with loaded.wearing(merged.modules):
        for name, own in exchanges.items():
            replayed = []
            for each in own:
                replayed.append(loaded.replay(each.prompt, each.answer))
                if progress is not None:
                    progress(1 / total)
            found.append(survival(name, replayed))
    found.sort(key=lambda each: (each.kept / each.total, -each.nll))
    for survived in found:
        if survived.lost:
            logger.warning("%s: %s", spec, survived)
    return found
