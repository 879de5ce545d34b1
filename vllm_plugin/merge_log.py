"""The line in the server's log about each merge that was made: written and read here."""

from __future__ import annotations

import ast
import logging
import re
from dataclasses import dataclass

from .identity import MergeIdentity
from .rpc import Facts

logger = logging.getLogger("vllm.merged_lora")

_TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_LINE = re.compile(
    rf"merged spec=(?P<spec>{_TEXT}) digest=(?P<digest>\w+) backend=(?P<backend>\w+) rank=(?P<rank>\d+) "
    rf"modules=(?P<modules>\d+) kept_energy=(?P<kept>\S+)(?: lowest=\S+ lowest_in=(?:{_TEXT}))? "
    r"ms=(?P<ms>\S+)"
)


@dataclass(frozen=True)
class LoggedMerge:
    """What the log says of a merge.

    spec:         its canonical text.
    digest:       its digest.
    backend:      name of the backend that made it.
    rank:         largest rank of a module.
    modules:      number of modules.
    kept_energy:  share of the squared norm kept in modules whose rank was cut; 1 if none was.
    milliseconds: time to make it in the worker.
    """

    spec: str
    digest: str
    backend: str
    rank: int
    modules: int
    kept_energy: float
    milliseconds: float


def log_merge(identity: MergeIdentity, facts: Facts) -> None:
    """Write the line about a merge that was made."""
    lowest = ""
    if facts.kept_by_module:
        module, share = min(facts.kept_by_module.items(), key=lambda item: item[1])
        lowest = f" lowest={share:.4f} lowest_in={module!r}"
    logger.info(
        "merged spec=%r digest=%s backend=%s rank=%d modules=%d kept_energy=%r%s ms=%.1f",
        str(identity.spec),
        identity.digest,
        facts.backend,
        facts.rank,
        facts.modules,
        facts.kept_energy,
        lowest,
        facts.seconds * 1e3,
    )


def parse_log_line(line: str) -> LoggedMerge | None:
    """The merge that a line of the server's log is about; None if it is about something else."""
    found = _LINE.search(line)
    if found is None:
        return None
    return LoggedMerge(
        spec=ast.literal_eval(found["spec"]),
        digest=found["digest"],
        backend=found["backend"],
        rank=int(found["rank"]),
        modules=int(found["modules"]),
        kept_energy=float(found["kept"]),
        milliseconds=float(found["ms"]),
    )


def merge_milliseconds(log: str) -> dict[str, float]:
    """The milliseconds that each merge in a log took, the last time it was made, by its canonical spec."""
    found = (parse_log_line(line) for line in log.splitlines())
    return {merge.spec: merge.milliseconds for merge in found if merge is not None}
