"""Which of its sources' own answers a merge still gives.

Every calibration holds prompts with the adapter's own answers.  One teacher-forced pass of the merge over
them shows which answers stay as they were.  Knows nothing of models or servers, which make that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .adapters import Adapter, calibrations_of
from .calibration import Exchange
from .errors import CalibrationError
from .strategies import find

LOST = 0.5
"""A source of which a merge keeps less than this share of answers is reported as lost."""


@dataclass(frozen=True)
class Replayed:
    """How a merge takes one exchange.

    kept:     whether every token of the answer is still the most likely one.
    log_likelihood: sum over the tokens of the answer, in nats.
    tokens:   number of tokens of the answer.
    """

    kept: bool
    log_likelihood: float
    tokens: int


@dataclass(frozen=True)
class Survival:
    """How much of what a source says is left in a merge.

    source: its name.
    kept:   number of its answers that stay as they were.
    total:  number of its answers that were replayed.
    nll:    mean negative log-likelihood of a token of its answers, in nats.
    """

    source: str
    kept: int
    total: int
    nll: float

    @property
    def lost(self) -> bool:
        """Whether less than LOST of its answers survive."""
        return self.kept < LOST * self.total

    def __str__(self) -> str:
        return f"{self.source}: {self.kept} of {self.total} of its answers survive"


def survival(source: str, replayed: Sequence[Replayed]) -> Survival:
    """The sum of all exchanges of a source."""
    tokens = sum(each.tokens for each in replayed)
    return Survival(
        source=source,
        kept=sum(each.kept for each in replayed),
        total=len(replayed),
        nll=-sum(each.log_likelihood for each in replayed) / tokens,
    )


def exchanges_of(source: str, adapter: Adapter, strategy: str) -> tuple[Exchange, ...]:
    """The exchanges to replay with a merge; raises CalibrationError if the adapter has none.

    Merges that were fitted to the inputs of an adapter are replayed on exchanges that took no part in that.

    source:   name of the adapter, for the error.
    strategy: of the merge.
    """
    (calibration,) = calibrations_of({source: adapter}, "a check")
    fitted = find(strategy).recipe.space == "outputs"
    chosen = tuple(e for e in calibration.exchanges if not (fitted and e.fitted))
    if not chosen:
        kind = " that the merge was not fitted to" if calibration.exchanges else ""
        raise CalibrationError(
            f"{source}: its calibration holds no answers{kind}; calibrate it again without --no-replay"
        )
    return chosen
