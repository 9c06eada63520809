"""Sources whose probabilities are known: `prepare.source: {kind: markov, ...}` draws a corpus of records from one.

All its numbers go into the manifest, so that whatever reads the corpus can say the probability of a record under the
source itself: cross-entropy minus the sample's own -ln p is an estimate of KL(p || q) that owes nothing to the luck of
the draw. Parameters that are not given are drawn with `seed`; records are drawn with it too, so a larger corpus begins
with the smaller one's parameters, not with its records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data.chains import Hidden, Markov, table
from lmtrain.data.fields import Bernoulli, Gaussians, Ising
from lmtrain.data.record_sources import Opened, Piece
from lmtrain.meaning import Known

_OWN: dict[str, set[str]] = {
    "markov": {"alphabet", "order", "length", "concentration"},
    "hmm": {"alphabet", "order", "length", "concentration", "states"},
    "bernoulli": {"length", "p"},
    "ising": {"size", "coupling", "field"},
    "gaussians": {"weights", "means", "deviations"},
}
KINDS = tuple(_OWN)
_NEEDED = {"gaussians": ("means", "deviations"), "ising": ("size",)}
_PIECE = 1 << 16
"""Records that are drawn at a time."""


class KnownSource(Config):
    """Records drawn from a source with known probabilities."""

    kind: Literal["markov", "hmm", "bernoulli", "ising", "gaussians"] = Field(
        description="markov, hmm: chains; bernoulli: independent bits; ising: spins on a grid; gaussians: a mixture"
    )
    records: int = Field(10_000, ge=3, description="how many are drawn")
    valid: float = Field(
        0.1, gt=0, lt=1, description="share of them that is valid; by number, since equal records are common"
    )
    test: float = Field(0.1, gt=0, lt=1, description="share of them that is test")
    seed: int = Field(0, ge=0, lt=2**63, description="of the parameters that are not given, and of the records")
    alphabet: int = Field(4, ge=2, le=256, description="markov, hmm: symbols")
    order: int = Field(1, ge=0, le=10, description="markov: symbols looked back on; hmm: hidden ones, 1 or more")
    length: int = Field(64, ge=1, description="markov, hmm, bernoulli: symbols of a record")
    states: int = Field(3, ge=1, le=64, description="hmm: hidden symbols")
    concentration: float = Field(0.5, gt=0, description="markov, hmm: rows are Dirichlet draws with this parameter")
    p: tuple[float, ...] | None = Field(
        None, description="bernoulli: chance of each 1; null: `length` uniform draws from 0.05 to 0.95"
    )
    size: tuple[int, int] | None = Field(None, description="ising: height and width; the width is at most 10")
    coupling: float = Field(0.3, description="ising: of neighbours; at 0.4407 large grids order themselves")
    field: float = Field(0.0, description="ising: pull towards 1")
    weights: tuple[float, ...] | None = Field(None, description="gaussians: of each component; null = equal ones")
    means: tuple[tuple[float, ...], ...] | None = Field(None, description="gaussians: a row for each component")
    deviations: tuple[tuple[float, ...], ...] | None = Field(None, description="gaussians: the same shape, above 0")

    @model_validator(mode="after")
    def _fits(self) -> KnownSource:
        own = _OWN[self.kind]
        for key, info in type(self).model_fields.items():
            if key not in {"kind", "records", "seed", "valid", "test", *own} and getattr(self, key) != info.default:
                where = " or ".join(kind for kind, keys in _OWN.items() if key in keys)
                raise ValueError(f"{key} belongs to the kind {where}, not {self.kind}; leave it out")
        if self.valid + self.test >= 1 or not all(self._counts.values()):
            raise ValueError(
                f"records = {self.records}, valid = {self.valid:g}, test = {self.test:g} leave a split empty"
            )
        for key in _NEEDED.get(self.kind, ()):
            if getattr(self, key) is None:
                raise ValueError(f"kind {self.kind} needs {key}")
        if self.kind in ("markov", "hmm") and self.order > self.length:
            raise ValueError(f"order = {self.order} looks back further than length = {self.length} symbols")
        if self.kind == "hmm" and not self.order:
            raise ValueError("kind hmm needs order 1 or more")
        if self.p is not None and not all(0 <= p <= 1 for p in self.p):
            raise ValueError("p is a list of probabilities, from 0 to 1")
        if self.size is not None and not (self.size[0] >= 1 and 1 <= self.size[1] <= 10):
            raise ValueError(f"size = {list(self.size)}: the height is 1 or more, the width from 1 to 10")
        if self.means is not None and self.deviations is not None:
            shapes = {tuple(map(len, rows)) for rows in (self.means, self.deviations)}
            widths = {len(row) for row in self.means}
            if len(shapes) > 1 or len(widths) > 1 or widths == {0}:
                raise ValueError("means and deviations are rows of equal length, one for each component")
            if not all(value > 0 for row in self.deviations for value in row):
                raise ValueError("deviations are above 0")
            if self.weights is not None and (len(self.weights) != len(self.means) or min(self.weights) <= 0):
                raise ValueError("weights are numbers above 0, one for each component")
        return self

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """Height, width, channels of a grid of spins."""
        return None if self.size is None else (*self.size, 1)

    @property
    def _counts(self) -> dict[str, int]:
        """Records of each split."""
        held = {"valid": round(self.records * self.valid), "test": round(self.records * self.test)}
        return {"train": self.records - sum(held.values()), **held}

    @property
    def parameters(self) -> Parameters:
        """The source itself. ConfigError when it has too many contexts."""
        rng = np.random.default_rng([self.seed, 0])
        if self.kind == "markov":
            rows = table(rng, alphabet=self.alphabet, order=self.order, concentration=self.concentration)
            return Markov(rows, order=self.order, length=self.length)
        if self.kind == "hmm":
            hidden = table(rng, alphabet=self.states, order=self.order, concentration=self.concentration)
            emit = rng.dirichlet(np.full(self.alphabet, self.concentration), size=self.states)
            return Hidden(hidden, emit, order=self.order, length=self.length)
        if self.kind == "bernoulli":
            return Bernoulli(rng.uniform(0.05, 0.95, self.length) if self.p is None else np.array(self.p, np.float64))
        if self.kind == "ising":
            assert self.size is not None
            return Ising(*self.size, coupling=self.coupling, field=self.field)
        assert self.means is not None
        weights = np.array(self.weights or [1.0] * len(self.means))
        return Gaussians(weights / weights.sum(), np.array(self.means, float), np.array(self.deviations, float))

    def open(self) -> Opened:
        """Its records, as those of any other source."""
        source, rng = self.parameters, np.random.default_rng([self.seed, 1])

        def pieces() -> Iterator[Piece]:
            for split, count in self._counts.items():
                for low in range(0, count, _PIECE):
                    x_ND = source.draw(rng, min(_PIECE, count - low))
                    yield Piece(x_ND, None, split)

        return Opened(tuple(self._counts), pieces(), source.levels)


class Parameters(Known, Protocol):
    """A source with all its numbers."""

    kind: str
    grid: tuple[int, int, int] | None

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        ...


_CLASSES: dict[str, Any] = {one.kind: one for one in (Markov, Hidden, Bernoulli, Ising, Gaussians)}


def from_manifest(manifest: Mapping[str, Any]) -> Parameters | None:
    """The source that a corpus was drawn from; None where it is not known."""
    value = manifest.get("known")
    if value is None:
        return None
    source: Parameters = _CLASSES[value["kind"]].from_json(value)
    return source
