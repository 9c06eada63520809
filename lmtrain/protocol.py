"""The words that every floor shares: what a model, a corpus, a stream and an engine are.

Shapes in names: B rows of a batch, T symbols of a row, V symbols of the alphabet, D documents of a split.
All log-probabilities are natural logarithms (nats), float32 from a model, float64 once they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain.meaning import Known, Measure

LN2 = math.log(2.0)

Weights = Literal["raw", "ema"]
"""Which weights a model is used with: those of the last step, or their running average."""


@dataclass(frozen=True, slots=True)
class Cond:
    """How each row begins and what is known beforehand.

    start_B: int64 [B], the symbol before the row: the preceding symbol of the stream, BOS at a document's start,
        or the reserved start (id = alphabet) for records.
    first_BT: bool [B, T] or None; True where symbol t begins a document. Given only when document masking is on:
        attention and recurrent state are cut there, and the symbol is predicted from BOS.
    label_B: int64 [B] class label, or None.
    """

    start_B: Tensor
    first_BT: Tensor | None = None
    label_B: Tensor | None = None

    def to(self, device: torch.device) -> Cond:
        """The same condition on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return Cond(self.start_B.to(device, non_blocking=True), move(self.first_BT), move(self.label_B))


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of rows.

    x_BT: int64 [B, T] symbols, or float32 [B, T] reals (padding: 0 with weight 0).
    weight_BT: float32 [B, T], non-negative; what each symbol counts in the loss and in the score.
    cond: the condition of the rows.
    index: index in the global batch of the micro-batch's first row; noise is seeded with it.
    position_B: int64 [B], position of each row's symbol 0 in the split's concatenation; -1 for a padding row.
    """

    x_BT: Tensor
    weight_BT: Tensor
    cond: Cond
    index: int = 0
    position_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device (`position_B` stays on the CPU: only bookkeeping reads it)."""
        return replace(
            self,
            x_BT=self.x_BT.to(device, non_blocking=True),
            weight_BT=self.weight_BT.to(device, non_blocking=True),
            cond=self.cond.to(device),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Sums, never means: scores add over windows, batches and ranks, and are divided when they are read.

    nats: minus the sum of weighted log-probabilities. symbols: scored symbols (sum of weights). words, bytes: the
    white-space words and raw bytes that those symbols stand for. dims: scored dimensions of images and tables, where
    bits per dimension mean something. offset: nats to be added for the units of the data, where the model reads scaled
    numbers (`Measure.offset` of every scored record).
    """

    nats: float = 0.0
    symbols: float = 0.0
    words: float = 0.0
    bytes: float = 0.0
    dims: float = 0.0
    offset: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(*(a + b for a, b in zip(self.row(), other.row(), strict=True)))

    def row(self) -> tuple[float, float, float, float, float, float]:
        """(nats, symbols, words, bytes, dims, offset), for sums over ranks."""
        return (self.nats, self.symbols, self.words, self.bytes, self.dims, self.offset)

    @property
    def nats_per_symbol(self) -> float:
        """Cross-entropy in nats a symbol; nan for an empty score."""
        return self.nats / self.symbols if self.symbols else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nats / symbols), per token."""
        return _exp(self.nats_per_symbol)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words); None where words were not counted."""
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """nats / (ln 2 * raw bytes); None where there are no bytes."""
        return self.nats / (LN2 * self.bytes) if self.bytes else None

    @property
    def bits_per_dim(self) -> float | None:
        """(nats + offset) / (ln 2 * dims); None where there are no dimensions."""
        return (self.nats + self.offset) / (LN2 * self.dims) if self.dims else None


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model must know of the corpus and the rows it will read.

    alphabet: V, the number of symbols; 0 when they are real numbers. context: symbols a row. bos: id looked up as the
    start of a document (text: the end symbol; records: V itself, a learned vector). grid: (height, width, channels) of
    an image record, else None. labels: number of classes, 0 for none.
    """

    alphabet: int
    context: int
    bos: int
    grid: tuple[int, int, int] | None = None
    labels: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the ranks; read from the environment in one place, run.py.

    address, port: the rendezvous of the process group. local_rank: index of the rank on its host.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500


class Distribution(Protocol):
    """The next symbol's distribution for each of B rows: a pmf over V symbols, or a density of a real number."""

    def log_pmf(self) -> Tensor:
        """float32 [B, V]: exact log-probability of every symbol. InputError for a density."""

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log p(x_B) in nats (of a density: its logarithm)."""

    def sample(self, noise_B: Tensor) -> Tensor:
        """int64 or float32 [B]: the value at quantile `noise_B` (float64 in [0, 1)) of each row's distribution."""


class Stream(Protocol):
    """Reads symbols one at a time; before each push it tells the distribution of the symbol to come."""

    def distribution(self) -> Distribution:
        """Of the next symbol, given the start symbol and all that was pushed."""

    def push(self, x_B: Tensor) -> None:
        """int64 [B]: the symbols that came."""


class Model(nn.Module):
    """A model is anything that gives log-probabilities. Position t of the output is about symbol t of the input.

    Every evaluation of the network goes through `self(...)`, so that hooks of the engine (ZeRO-3) always run, and reads
    a weight only inside the forward of the module that owns it.

    context: how many inputs (the start symbol included) it can read; None = unbounded.
    order: the positions of a row in the order in which the model takes them; None = as they stand. log p(x_t) depends
        on the positions before t in that order; a stream answers and is pushed in it.
    """

    context: int | None = None
    order: tuple[int, ...] | None = None

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """logp_BT float32: log p(x_t | x_<t, cond) in nats."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """The head's parameters [B, T, ...]; those at t depend on x_<t and cond alone."""
        raise TypeError(f"{type(self).__name__} does not define predict")

    def distribution(self, params_B: Tensor) -> Distribution:
        """The distribution of one symbol, of what `predict` says at its position: [B, ...]."""
        raise TypeError(f"{type(self).__name__} does not define distribution")

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream over `batch` rows. The default recomputes the prefix."""
        raise TypeError(f"{type(self).__name__} does not define stream")

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol in rows of `context` (forward and backward, matrix products); 0 where not known."""
        return 0.0

    def parameter_counts(self) -> dict[str, int]:
        """`total` and `without_embeddings` (input and output embeddings left out)."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = sum(p.numel() for name, p in self.named_parameters() if "embed" in name or "lm_head" in name)
        return {"total": total, "without_embeddings": total - embeddings}


@runtime_checkable
class Carries(Protocol):
    """A model whose state can be carried from row to row (evaluation mode `carried`)."""

    def carry(self, x_BT: Tensor, *, cond: Cond, state: Any) -> tuple[Tensor, Any]:
        """(logp_BT, state after the row); `state` None starts at zero and reads `cond.start_B` first."""


@runtime_checkable
class Draws(Protocol):
    """A model that draws whole rows in its own way, having no stream: a mixture of orderings, say."""

    def draw(self, noise_BN: Tensor, *, cond: Cond) -> Tensor:
        """x_BT of noise float64 [B, T + 1] in [0, 1): one number to choose how, and one a symbol."""


class Split(Protocol):
    """One split of a corpus: an ordered list of shards read as one sequence of symbols, cut into rows."""

    name: str
    symbols: int
    documents: int
    words: int
    bytes: int

    def rows(self, context: int) -> int:
        """How many rows of `context` symbols (or records) the split has; the last one may be padded."""

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: how many symbols of each row are scored (= sum of its weights), without reading a token."""

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The rows `index_B` (int64; -1 = a padding row of weight 0), with `cond.first_BT` set when `masking`."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 symbols (reals: float32) of [start, stop) of the concatenation."""

    def start_symbol(self, position: int) -> int:
        """The symbol that a row beginning at `position` starts from."""

    def document_ends(self) -> np.ndarray:
        """int64 [D]: end position in the concatenation of each document, ascending."""


class Corpus(Protocol):
    """A prepared corpus: shards with a fingerprint.

    record: symbols of a record, all of the same length and none going on into the next; None where rows are cut from
    one stream. unit: what a document is called. meaning: what the symbols stand for; corpora that differ in it cannot
    be read by the same model.
    """

    path: PurePath
    fingerprint: str
    kind: str
    alphabet: int
    bos: int
    grid: tuple[int, int, int] | None
    labels: int
    record: int | None
    unit: str
    manifest: Mapping[str, Any]

    @property
    def meaning(self) -> str:
        """A line that is the same for corpora whose symbols mean the same."""

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V]: raw bytes that each symbol stands for (0 for the end symbol)."""

    @property
    def symbol_dims(self) -> int:
        """Dimensions a symbol stands for, of which there are bits: 1 for symbols of records, 0 for text and reals."""

    @property
    def measure(self) -> Measure:
        """What log-probabilities are about."""

    @property
    def known(self) -> Known | None:
        """The distribution that the records were drawn from, of the numbers that the model reads; None if not known."""

    def pieces(self) -> list[bytes]:
        """The raw bytes of each symbol; empty where symbols do not stand for bytes."""

    def split(self, name: str) -> Split:
        """A split by name; raises CorpusError naming the splits there are."""

    def decode(self, symbols: Sequence[int]) -> bytes:
        """The raw bytes of a run of symbols."""

    def encode(self, raw: bytes) -> np.ndarray:
        """int64 symbols of raw bytes, without an end symbol."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A piece of one named tensor: elements [start, start + numel) of the flattened tensor of `shape`.

    kind: "weight" (fp32 master weights), "ema" (their average), "buffer", or the optimizer's name for a moment
    ("exp_avg", ...).
    tensor: one-dimensional, on the CPU.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


class FragmentReader(Protocol):
    """Gives any range of any saved tensor, whatever rank wrote it."""

    def has(self, name: str, kind: str) -> bool:
        """Whether such a tensor was saved."""

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Its full shape; CheckpointError when it was not saved."""

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """A one-dimensional CPU tensor: elements [start, start + numel); CheckpointError when any is missing."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, the same on every rank.

    nats: -(logp * w) summed over the global batch. weight: the global batch's total weight. grad_norm: l2 norm before
    clipping.
    applied: False when a non-finite loss or gradient made all ranks leave parameters and moments as they were.
    """

    nats: float
    weight: float
    grad_norm: float
    applied: bool
    loss_scale: float = 1.0


class Engine(Protocol):
    """Turns log-probabilities into better parameters. Collective: every rank makes the same calls in the same order."""

    rank: int
    world: int
    device: torch.device
    model: Model

    def step(self, batches: Sequence[Batch], *, total_weight: float, lr: float, step: int) -> StepReport:
        """One optimizer step over this rank's micro-batches of the global batch of weight `total_weight`."""

    def evaluating(self, *, weights: Weights = "raw") -> AbstractContextManager[Model]:
        """The model without dropout and gradients; "ema": with the averaged weights, and the raw ones back after it.

        ConfigError when no average is kept.
        """

    def add(self, values: np.ndarray) -> np.ndarray:
        """float64 sum over ranks of an array of equal shape on every rank (also a barrier)."""

    def agree(self, flag: int) -> int:
        """The largest flag of any rank."""

    @property
    def communicated(self) -> float:
        """Seconds that this rank has spent in collectives and in waiting for other ranks there, ever growing."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns: weights, optimizer moments and, on one rank, buffers. No overlap between ranks."""

    def restore(self, reader: FragmentReader, *, scalars: Mapping[str, Any]) -> None:
        """Read the fragments that this rank needs, and the engine's own scalars."""

    def scalars(self) -> dict[str, Any]:
        """What the engine must remember besides tensors (optimizer steps, skipped steps, loss scale): JSON values."""

    def close(self) -> None:
        """Leave the process group."""
