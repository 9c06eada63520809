"""What an evaluation found, with everything that its numbers depend on: they are never printed without it.

Shapes in names: K denominators of the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lmtrain.inference.interval import LABEL, MIN_UNITS, Interval
from lmtrain.meaning import Measure
from lmtrain.protocol import LN2, Score, Weights

DEFINITIONS = {
    "symbols": "every symbol of the set exactly once, including one end symbol per document",
    "nats": "minus the sum of ln p over the scored symbols, added in float64",
    "perplexity": "exp(nats / symbols), per token of this tokenizer",
    "bits_per_byte": "nats / (ln 2 * raw bytes); the end symbols' nats count, their bytes are 0",
    "word_perplexity": "exp(nats / words), words separated by ASCII white space",
    "word_perplexity_eos": "exp(nats / (words + lines)), the PTB and WikiText count with one <eos> a line",
    "nats_per_record": "nats / records, of the numbers that the model reads",
    "bits_per_dim": "(nats + offset) / (ln 2 * dimensions); offset: nats that bring the numbers which the model reads "
    "back to the units of the data",
    "log_likelihood": "of real numbers: minus nats per record, in the model's (standardised) and in the data's units",
    "kl": "KL(source || model) in nats a record: the model's nats minus those of the source that drew the records, "
    "over records; an estimate from these records, so below 0 by chance alone",
    "mode window": "rows of `context` symbols that do not overlap, each begun from the symbol before it",
    "mode sliding": "rows of `context` symbols every `stride`; a row scores what the rows before it did not",
    "mode carried": "the state starts at zero at each document's start and is carried to its end; context null",
    "interval": "bootstrap of the ratio of sums over units drawn with replacement: " + LABEL,
}
"""What each number means, as printed with --json and in docs/evaluation.md."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known of the source that the scored records were drawn from.

    nats: -ln p of the scored records under it. records: how many they are (the sum of their weights). entropy: of a
    record, exact, or None. interval: of (model's nats - nats) / symbols.
    """

    nats: float
    records: float
    entropy: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Result:
    """One split under one model.

    score: the sums; `words` is 0 for a subset. mode, context, stride: how rows were cut (context None: from each
    document's start; stride None: not sliding). share: scored symbols / symbols of the split, 1 when complete.
    documents: those with a scored symbol. lines: None where they were not counted. exact: whether the code length is
    that of the text itself and not of one segmentation of it. tokenizer: its kind. units, unit: what the interval would
    be drawn from. records: those that were scored, None where rows are cut from a stream. measure: what they measure.
    weights: those of the model, or their average. temperature: of every symbol's distribution; 1 = the model's own.
    truth: what is known of the source. warning: why the score may be too good (the tokenizer saw the split).
    """

    name: str
    corpus: str
    fingerprint: str
    split: str
    score: Score
    mode: str
    context: int | None
    stride: int | None
    masking: bool
    share: float
    documents: int
    unit: str
    units: int
    interval: Interval | None
    exact: bool = False
    lines: float | None = None
    tokenizer: str | None = None
    records: int | None = None
    measure: Measure = field(default_factory=Measure)
    weights: Weights = "raw"
    temperature: float = 1.0
    truth: Truth | None = None
    warning: str | None = None

    @property
    def kl(self) -> float | None:
        """KL(source || model) in nats a record, from the scored records; None where the source is not known."""
        return (self.score.nats - self.truth.nats) / self.truth.records if self.truth else None

    @property
    def kl_bounds(self) -> tuple[float, float] | None:
        """The interval of `kl`."""
        if self.truth is None or self.truth.interval is None:
            return None
        scale = self.score.symbols / self.truth.records
        return self.truth.interval.low_K[0] * scale, self.truth.interval.high_K[0] * scale

    @property
    def complete(self) -> bool:
        """Whether every symbol of the split was scored."""
        return self.share == 1

    @property
    def word_perplexity_eos(self) -> float | None:
        """exp(nats / (words + lines)), the count of PTB and WikiText; None where words were not counted."""
        if not self.score.words or self.lines is None:
            return None
        return Score(nats=self.score.nats, words=self.score.words + self.lines).word_perplexity

    @property
    def how(self) -> str:
        """Mode, context, stride and averaged weights in a few words."""
        averaged = ", averaged weights" if self.weights == "ema" else ""
        averaged += f", temperature {self.temperature:g}" if self.temperature != 1 else ""
        if self.mode == "carried":
            return "mode carried, context from each document's start" + averaged
        if self.mode == "alone":
            stride = f", stride {self.stride}" if self.stride is not None else ""
            return f"each document alone, context {self.context}{stride}{averaged}"
        text = f"mode {self.mode}, context {self.context}"
        text += f", stride {self.stride}" if self.stride is not None else ""
        return text + (", attention cut at documents" if self.masking else "") + averaged

    @property
    def nats_per_record(self) -> float | None:
        """nats / records; None where there are none."""
        return self.score.nats / self.records if self.records else None

    @property
    def log_likelihood(self) -> tuple[float, float] | None:
        """Mean log-density of a record of real numbers: (in the model's units, in the data's); None for symbols."""
        value = self.nats_per_record
        if value is None or self.measure.kind == "exact":
            return None
        return -value, -value - self.measure.offset

    @property
    def perplexity(self) -> float | None:
        """exp(nats / symbols); None for real numbers, whose densities are not probabilities of symbols."""
        return self.score.perplexity if self.measure.kind == "exact" else None

    @property
    def dims_note(self) -> str | None:
        """What bits per dimension are, or why there are none; None where there are no records."""
        if self.records is None:
            return None
        what = {
            "exact": "exact: probabilities of symbols",
            "bound": "an upper bound: a density of dequantised symbols, one draw of the noise",
            "density": "none: a density of real numbers has no bits, its value depends on the unit of measurement",
        }[self.measure.kind]
        return f"{what} ({self.measure.view})" if self.measure.view else what

    @property
    def interval_note(self) -> str:
        """What the interval covers, or why there is none."""
        if self.interval is None:
            if self.units < MIN_UNITS:
                return f"none: {self.units} {self._units()}, fewer than {MIN_UNITS}"
            return "none: the sums are not finite"
        note = f"{self.interval.level:.0%}, bootstrap over {self.units:,} {self._units()}"
        if self.interval.groups < self.units:
            note += f" in {self.interval.groups:,} groups of neighbours"
        return f"{note}; {self.interval.label}"

    @property
    def bits_note(self) -> str | None:
        """Whether bits per byte is the code length of the text; None where there are no bytes."""
        if not self.score.bytes:
            return None
        if self.exact:
            return "exact: every text has one segmentation"
        return "canonical segmentation: an upper bound; exact for bytes, and characters without byte fallback"

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Both bounds of nats_per_symbol, nats_per_record, perplexity, bits_per_byte or bits_per_dim; None without an
        interval."""
        held = self if name in {"nats_per_record", "perplexity"} else self.score
        if self.interval is None or getattr(held, name) is None:
            return None
        k = 1 if name == "bits_per_byte" else 0
        low, high = self.interval.low_K[k], self.interval.high_K[k]
        if name == "perplexity":
            return Score(low, 1.0).perplexity, Score(high, 1.0).perplexity
        scale, more = 1.0, 0.0
        if name == "bits_per_byte":
            scale = LN2
        elif name == "bits_per_dim":
            scale = LN2 * self.score.dims / self.score.symbols
            more = self.score.offset / self.score.symbols  # the same for every record, whichever are drawn
        elif name == "nats_per_record":
            scale = (self.records or 1) / self.score.symbols
        return (low + more) / scale, (high + more) / scale

    @property
    def _view(self) -> str:
        return self.measure.view or "as it is"

    def _units(self) -> str:
        return self.unit if self.units == 1 else _PLURAL.get(self.unit, self.unit + "s")

    def metrics(self) -> dict[str, float]:
        """loss (nats a symbol), perplexity, bits_per_byte, bits_per_dim: those that there are, for logging."""
        score = self.score
        values = {
            "loss": score.nats_per_symbol,
            "perplexity": self.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "bits_per_dim": score.bits_per_dim,
            "kl": self.kl,
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """A JSON mapping with every definition; numbers that are not finite become null."""
        score = self.score
        interval: dict[str, Any] | None = None
        if self.interval is not None:
            interval = {
                "level": self.interval.level,
                "unit": self.unit,
                "units": self.units,
                "groups": self.interval.groups,
                "replicates": self.interval.replicates,
                "covers": self.interval.label,
            }
            for name in ("nats_per_symbol", "nats_per_record", "perplexity", "bits_per_byte", "bits_per_dim"):
                found = self.bounds(name)
                interval[name] = None if found is None else [_finite(found[0]), _finite(found[1])]
        return {
            "set": self.name,
            "corpus": self.corpus,
            "fingerprint": self.fingerprint,
            "split": self.split,
            "tokenizer": self.tokenizer,
            "mode": self.mode,
            "context": self.context,
            "stride": self.stride,
            "document_masking": self.masking,
            "weights": self.weights,
            "complete": self.complete,
            "share": self.share,
            "symbols": _count(score.symbols),
            "documents": self.documents,
            "bytes": _count(score.bytes) or None,
            "words": _count(score.words) or None,
            "lines": None if self.lines is None else _count(self.lines),
            "dims": _count(score.dims) or None,
            "nats": _finite(score.nats),
            "nats_per_symbol": _finite(score.nats_per_symbol),
            "perplexity": _finite(self.perplexity),
            "bits_per_byte": _finite(score.bits_per_byte),
            "bits_per_byte_is": self.bits_note,
            "word_perplexity": _finite(score.word_perplexity),
            "word_perplexity_eos": _finite(self.word_perplexity_eos),
            "records": self.records,
            "view": self.measure.view or None,
            "nats_per_record": _finite(self.nats_per_record),
            "log_likelihood": None if self.log_likelihood is None else _finite(self.log_likelihood[0]),
            "log_likelihood_data_units": None if self.log_likelihood is None else _finite(self.log_likelihood[1]),
            "offset_per_record": self.measure.offset if self.records is not None else None,
            "bits_per_dim": _finite(score.bits_per_dim),
            "bits_per_dim_is": self.dims_note,
            "kl": _finite(self.kl),
            "kl_interval": None if self.kl_bounds is None else [_finite(bound) for bound in self.kl_bounds],
            "source_nats_per_record": None if self.truth is None else _finite(self.truth.nats / self.truth.records),
            "source_entropy_per_record": None if self.truth is None else self.truth.entropy,
            "interval": interval,
            "interval_note": self.interval_note,
            "warning": self.warning,
            "definitions": DEFINITIONS,
        }

    def describe(self) -> str:
        """A plain table: one number a line, each with its interval, under a line that says how it was made."""
        score = self.score
        rows: list[tuple[str, str, str]] = []

        def number(label: str, value: float | None, name: str | None = None, note: str = "") -> None:
            if value is None:
                return
            found = None if name is None else self.bounds(name)
            text = note if found is None else f"[{found[0]:.4f}, {found[1]:.4f}]  {note}"
            rows.append((label, f"{value:.4f}", text))

        ends = "one end symbol for each document; " if self.records is None else ""
        rows.append(("symbols", f"{score.symbols:,.0f}", f"{ends}{self._share()}"))
        rows.append(("documents" if self.records is None else "records", f"{self.documents:,}", ""))
        if score.bytes:
            rows.append(("raw bytes", f"{score.bytes:,.0f}", ""))
        if score.words:
            rows.append(("words", f"{score.words:,.0f}", "separated by white space"))
        number("nats", score.nats)
        number("nats per symbol", score.nats_per_symbol, "nats_per_symbol")
        number("nats per record", self.nats_per_record, "nats_per_record", self.measure.view)
        if self.records is None:
            number("perplexity (token)", score.perplexity, "perplexity")
        if self.log_likelihood is not None:
            number("log-likelihood", self.log_likelihood[0], None, f"a record, in the model's units ({self._view})")
            number("log-likelihood, data", self.log_likelihood[1], None, "a record, in the units of the data")
        number("bits per byte", score.bits_per_byte, "bits_per_byte", self.bits_note or "")
        number("perplexity (word)", score.word_perplexity)
        number("perplexity (word, <eos>)", self.word_perplexity_eos, None, "PTB and WikiText count, one <eos> a line")
        number("bits per dim", score.bits_per_dim, "bits_per_dim", self.dims_note or "")
        if self.records is not None and score.bits_per_dim is None:
            rows.append(("bits per dim", "-", self.dims_note or ""))
        if self.truth is not None and self.kl is not None:
            bounds = self.kl_bounds
            text = "" if bounds is None else f"[{bounds[0]:.4f}, {bounds[1]:.4f}]  "
            rows.append(("KL(source || model)", f"{self.kl:.4f}", f"{text}nats per record"))
            own = self.truth.nats / self.truth.records
            number("source, this sample", own, None, "nats per record: minus the mean ln p of the source itself")
            number("source, entropy", self.truth.entropy, None, "nats per record, exact")
        wide = max(len(value) for _, value, _ in rows)
        lines = [f"{self.corpus} {self.split}: {self.how}"]
        lines += [f"  {label:<24} {value:>{wide}}  {note}".rstrip() for label, value, note in rows]
        lines.append(f"  {'interval':<24} {self.interval_note}")
        if self.warning:
            lines.append(f"  {'WARNING':<24} {self.warning}")
        return "\n".join(lines)

    def _share(self) -> str:
        if self.complete:
            return "every symbol once"
        return f"A SUBSET: {self.share:.2%} of the split, fixed by hash"


_PLURAL = {"block of 2,048 symbols": "blocks of 2,048 symbols"}


def _count(value: float) -> float | int:
    return int(value) if math.isfinite(value) and value == int(value) else value


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
