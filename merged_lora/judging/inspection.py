"""What is known of adapters before they are merged, and how it is shown: text, tables and JSON.

Knows nothing of how it was found.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from merged_lora.errors import PlanError, listed

from .comparing import Comparison
from .hosting import Serving, max_lora_rank
from .tables import Report, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIKE, OPPOSED = 0.9, -0.3
"""Cosines of whole adapters from which on they count as nearly the same, and as opposed."""
SHARED = 0.5
"""Share of the row spaces in common from which on two adapters count as begun with the same A."""
UNEVEN = 2.0
"""Ratio of lengths from which on the longer adapter drowns the shorter one."""


@dataclass(frozen=True)
class Fact:
    """What one source is.

    name:        of the source.
    place:       its folder or location, as it was given.
    refused:     why it cannot be merged; all that follows is then empty.
    base_model:  the model that it names.
    modules:     number of modules.
    kinds:       last parts of their names, such as ``q_proj``.
    ranks:       smallest and largest rank.
    scalings:    smallest and largest scaling.
    dtypes:      of the factors.
    nbytes:      of the factors.
    length:      Frobenius norm of all deltas together.
    zero:        number of modules whose delta is zero.
    calibration: whether one is there, or why it is not used.
    vllm:        what vLLM makes of it.
    misfit:      why it does not fit the base model that was given.
    named:       whether it names that model; None if no model was given.
    """

    name: str
    place: str
    refused: str | None = None
    base_model: str | None = None
    modules: int = 0
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, int] = (0, 0)
    scalings: tuple[float, float] = (0.0, 0.0)
    dtypes: tuple[str, ...] = ()
    nbytes: int = 0
    length: float = 0.0
    zero: int = 0
    calibration: bool | str = False
    vllm: Serving | None = None
    misfit: str | None = None
    named: bool | None = None


@dataclass(frozen=True)
class Fit:
    """Whether a merge can be made.

    spec:    its text.
    refused: why it cannot.
    rank:    of the result, by the sources' own ranks.
    notes:   what a user should know of it.
    """

    spec: str
    refused: str | None
    rank: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Inspection(Report):
    """What was found.

    facts:      of each source.
    refused:    why those that could be read do not go together.
    fits:       of usual merges.
    comparison: numbers of each module; None if there are not two sources that go together.
    density:    share of entries whose signs were compared.
    model:      the base model that was given.
    """

    facts: tuple[Fact, ...]
    refused: str | None
    fits: tuple[Fit, ...]
    comparison: Comparison | None
    density: float
    model: str | None = None

    def lengths(self, kind: str | None = None) -> torch.Tensor:
        """Frobenius norm of the deltas of each source, float64 ``[N]``.

        kind: last part of the names of the modules to look at, None for all; so too in the other methods.
        """
        return self._total("inner", kind).diagonal().clamp(min=0.0).sqrt()

    def cosines(self, kind: str | None = None) -> torch.Tensor:
        """Cosines between deltas, of all modules together, float64 ``[N, N]``; NaN beside zero."""
        lengths = self.lengths(kind)
        return self._total("inner", kind) / (lengths[:, None] * lengths)

    def conflicts(self, kind: str | None = None) -> torch.Tensor:
        """The share of entries with opposite signs, among those that both keep, ``[N, N]``; NaN if none."""
        return self._total("opposite", kind).double() / self._total("both", kind).double()

    def overlaps(self, kind: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares of the row and of the column spaces in common, the mean of the modules that both have."""
        chosen, compared = self._chosen(kind), self.compared
        present = compared.present[chosen].double()
        both = torch.einsum("mi,mj->ij", present, present)
        return compared.rows[chosen].sum(0) / both, compared.columns[chosen].sum(0) / both

    def energy(self, kind: str | None = None) -> torch.Tensor:
        """The share of the squared norm that a sum of all keeps at rank 1, 2, ..., float64 ``[R]``."""
        squares = self._total("squares", kind)
        return squares.cumsum(0) / squares.sum()

    def disturbances(self, kind: str | None = None) -> torch.Tensor:
        """What source j adds to the outputs of source i, relative to what i adds itself, float64 ``[N, N]``.

        Both are root mean squares over the inputs of i, and modules count by how much its answers depend on
        them.
        NaN for a source i without a calibration.
        """
        squares = self._total("outputs", kind)
        return (squares / squares.diagonal()[:, None]).sqrt()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Last parts of the names of all modules, in the order of the first."""
        return tuple(dict.fromkeys(map(kind_of, self.compared.modules)))

    @property
    def compared(self) -> Comparison:
        """The numbers of each module; raises PlanError if nothing was compared."""
        if self.comparison is None:
            raise PlanError("there are not two sources that go together, so nothing was compared")
        return self.comparison

    def _chosen(self, kind: str | None) -> torch.Tensor:
        return torch.tensor([kind in (None, kind_of(name)) for name in self.compared.modules])

    def _total(self, values: str, kind: str | None) -> torch.Tensor:
        found: torch.Tensor = getattr(self.compared, values)[self._chosen(kind)]
        return found.nansum(0) if values == "outputs" and not found.isnan().all() else found.sum(0)

    def tables(self) -> list[Table]:
        """All that was found, as tables."""
        found = [self._facts_table(), self._vllm_table()]
        if self.comparison is not None:
            found += [self._pairs_table(), self._kinds_table(), self._energy_table()]
        if self.fits:
            rows = tuple(
                (fit.spec, *(("-", "refused") if fit.refused else (str(fit.rank), _flag(fit.rank))))
                for fit in self.fits
            )
            found.append(Table("usual merges", ("spec", "rank", "--max-lora-rank"), rows))
        return found

    @property
    def specs(self) -> tuple[str, ...]:
        """The merges that fit, the one that keeps most in docs/quality.md first."""
        return tuple(fit.spec for fit in self.fits if fit.refused is None)

    def verdict(self) -> list[str]:
        """What to know and to do, a sentence or two each."""
        found = [f"{f.name} cannot be merged: {f.refused}" for f in self.facts if f.refused]
        if self.refused:
            found.append(f"The sources do not go together: {self.refused}")
        found += self._about_model()
        found += [f"{fit.spec} is refused: {fit.refused}" for fit in self.fits if fit.refused]
        if self.comparison is not None:
            found += self._about_pairs() + self._about_lengths() + self._about_calibrations()
        return found

    @property
    def fails(self) -> bool:
        """Whether a source cannot be merged with the others, or does not fit the base model."""
        return self.refused is not None or any(f.refused or f.misfit for f in self.facts)

    def plot(self) -> Figure:
        """The cosines of each two sources, and the disturbances if known, by layer and kind of module.

        Raises MergeError.  Needs matplotlib, of the extra ``plot``.
        """
        from .figures import heat_map

        return heat_map(self)

    def as_dict(self) -> dict[str, Any]:
        """All that was found, for JSON: what is not known is None."""
        found: dict[str, Any] = {
            "sources": [asdict(f) for f in self.facts],
            "model": self.model,
            "refused": self.refused,
            "density": self.density,
            "merges": [asdict(fit) for fit in self.fits],
            "verdict": self.verdict(),
            "specs": list(self.specs),
        }
        if self.comparison is not None:
            compared = self.comparison
            each = {
                "inner": compared.inner,
                "squares": compared.squares,
                "row_overlap": compared.rows,
                "column_overlap": compared.columns,
                "sign_conflicts": compared.opposite / compared.both.double(),
                "outputs": compared.outputs,
            }
            found["all"] = self._numbers(None)
            found["kinds"] = {kind: self._numbers(kind) for kind in self.kinds}
            found["modules"] = {
                name: {
                    "shape": compared.shapes[i],
                    **{key: _plain(values[i]) for key, values in each.items()},
                }
                for i, name in enumerate(compared.modules)
            }
        return found

    def sections(self) -> list[Section]:
        """The verdict, and the specs that fit."""
        return [Section("verdict", self.verdict()), Section("specs that fit", self.specs, prose=False)]

    def _numbers(self, kind: str | None) -> dict[str, Any]:
        rows, columns = self.overlaps(kind)
        return {
            "length": _plain(self.lengths(kind)),
            "cosine": _plain(self.cosines(kind)),
            "sign_conflicts": _plain(self.conflicts(kind)),
            "row_overlap": _plain(rows),
            "column_overlap": _plain(columns),
            "energy": _plain(self.energy(kind)),
            "disturbance": _plain(self.disturbances(kind)),
        }

    def _facts_table(self) -> Table:
        headings = (
            "source",
            "base model",
            "modules",
            "rank",
            "scaling",
            "dtype",
            "MB",
            "length",
            "calibration",
        )
        rows = [
            (
                f.name,
                f.base_model or "-",
                f"{f.modules} of {len(f.kinds)} kinds" if len(f.kinds) > 1 else str(f.modules),
                _range(*f.ranks),
                _range(*f.scalings),
                ", ".join(f.dtypes),
                f"{f.nbytes / 1e6:.1f}",
                f"{f.length:.3g}",
                "not used" if isinstance(f.calibration, str) else "yes" if f.calibration else "none",
            )
            if f.refused is None
            else (f.name, f"refused: {f.refused}", *[""] * 7)
            for f in self.facts
        ]
        return Table("sources", headings, tuple(rows))

    def _vllm_table(self) -> Table:
        rows = []
        for f in self.facts:
            if f.vllm is not None:
                fits = () if self.model is None else ("no" if f.misfit else "yes",)
                shown = (listed(f.vllm.flags, 8), ", ".join(f.vllm.packed), "; ".join(f.vllm.limits))
                rows.append((f.name, *fits, *(each or "-" for each in shown)))
        fits_model = () if self.model is None else ("fits the model",)
        headings = ("source", *fits_model, "flags it needs", "packed in", "refused or on a condition")
        return Table("in vLLM", headings, tuple(rows))

    def _pairs_table(self) -> Table:
        cosines, conflicts, disturbed = self.cosines(), self.conflicts(), self.disturbances()
        overlaps = self.overlaps()
        names = self.compared.sources
        rows = [
            (
                f"{names[i]}, {names[j]}",
                f"{cosines[i, j]:+.3f}",
                _percent(conflicts[i, j]),
                _percent(overlaps[0][i, j]),
                _percent(overlaps[1][i, j]),
                _percent(disturbed[i, j]),
                _percent(disturbed[j, i]),
            )
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ]
        headings = (
            "pair",
            "cosine",
            f"opposite signs ({self.density:g})",
            "rows shared",
            "columns shared",
            "1st disturbed",
            "2nd disturbed",
        )
        return Table("pairs, all modules together", headings, tuple(rows))

    def _kinds_table(self) -> Table:
        names = self.compared.sources
        headings = ("modules", *(f"length of {name}" for name in names), "largest cosine", "opposite signs")
        rows = []
        for kind in self.kinds:
            off = ~torch.eye(len(names), dtype=torch.bool)
            cosines = self.cosines(kind)[off].nan_to_num(0.0)
            conflicts = self.conflicts(kind)[off]
            known = conflicts[~conflicts.isnan()]
            rows.append(
                (
                    kind,
                    *(f"{length:.3g}" for length in self.lengths(kind).tolist()),
                    f"{cosines[cosines.abs().argmax()]:+.3f}",
                    _percent(known.max()) if len(known) else "-",
                )
            )
        return Table("kinds of modules", headings, tuple(rows))

    def _energy_table(self) -> Table:
        energy = self.energy()
        ranks = sorted({r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r < len(energy)} | {len(energy)})
        rows = tuple((str(rank), _percent(energy[rank - 1])) for rank in ranks)
        return Table("what a sum of all keeps of its squared norm", ("rank", "kept"), rows)

    def _about_model(self) -> list[str]:
        found = [f"{f.name} does not fit the base model: {f.misfit}" for f in self.facts if f.misfit]
        found += [
            f"{f.name} names {f.base_model or 'no base model'} and not {self.model}, whose modules have the "
            "same names and shapes: make sure that it was trained on that model."
            for f in self.facts
            if f.named is False and f.misfit is None
        ]
        bases = sorted({f.base_model for f in self.facts if f.base_model})
        if self.model is None and len(bases) > 1:
            found.append(
                f"The sources name different base models: {listed(bases)}. Merge them only if these are "
                "copies of one model."
            )
        return found

    def _about_pairs(self) -> list[str]:
        names, cosines, rows = self.compared.sources, self.cosines(), self.overlaps()[0]
        found = []
        for i, first in enumerate(names):
            for j, second in list(enumerate(names))[i + 1 :]:
                cosine = float(cosines[i, j])
                if cosine >= ALIKE:
                    found.append(
                        f"{first} and {second} are nearly the same (cosine {cosine:.2f}): a sum counts twice "
                        "what they learned; merge one of them."
                    )
                elif cosine <= OPPOSED:
                    found.append(
                        f"{first} and {second} are opposed (cosine {cosine:.2f}): each undoes what the other "
                        "learned."
                    )
                elif rows[i, j] >= SHARED:
                    found.append(
                        f"{first} and {second} share {rows[i, j]:.0%} of the directions of their A, as after "
                        "trainings with one seed: linear and its kin add up what does not belong together; "
                        "sum does not."
                    )
        return found

    def _about_lengths(self) -> list[str]:
        lengths = dict(zip(self.compared.sources, self.lengths().tolist(), strict=True))
        zero = [name for name, length in lengths.items() if not length]
        found = [f"{name} changes nothing: its delta is zero." for name in zero]
        heard = {name: length for name, length in lengths.items() if length}
        if len(heard) > 1:
            longest, shortest = max(heard, key=heard.__getitem__), min(heard, key=heard.__getitem__)
            ratio = heard[longest] / heard[shortest]
            if ratio >= UNEVEN:
                found.append(
                    f"{longest} is {ratio:.1f} times as long as {shortest} and may drown it: give {shortest} "
                    "a larger weight, or take weights=auto."
                )
        return found

    def _about_calibrations(self) -> list[str]:
        without = [f.name for f in self.facts if f.refused is None and f.calibration is not True]
        if without:
            return [
                f"{listed(without)} {'has' if len(without) == 1 else 'have'} no calibration. No strategy is "
                "safe without: make one of each with merged-lora calibrate, and then merge with regmean."
            ]
        disturbed = self.disturbances()
        names = self.compared.sources
        others = disturbed.masked_fill(torch.eye(len(names), dtype=torch.bool), 0.0)
        i, j = divmod(int(others.argmax()), len(names))
        if not math.isfinite(float(others[i, j])):
            return []
        return [
            f"{names[i]} is disturbed most: on its inputs, {names[j]} adds {_percent(others[i, j])} of what "
            f"{names[i]} adds. regmean takes that into account; check what is left with merged-lora check."
        ]


def kind_of(module: str) -> str:
    """The last part of a module's name without the number of an expert."""
    return re.sub(r"\[\d+\]$", "", module.rpartition(".")[2])


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in; None for one outside layers."""
    number = re.search(r"\.(\d+)\.", module)
    return int(number[1]) if number else None


def _plain(values: torch.Tensor) -> Any:
    """The values as lists, with None for NaN, which JSON lacks."""
    if values.ndim:
        return [_plain(each) for each in values]
    value = float(values)
    return value if math.isfinite(value) else None


def _flag(rank: int) -> str:
    return str(max_lora_rank(rank) or "none")


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _percent(value: torch.Tensor) -> str:
    return f"{float(value):.0%}" if math.isfinite(float(value)) else "-"
