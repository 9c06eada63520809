"""Symbols to words and back under a model: lanes in lockstep through one and the same stream step on both sides.

Shapes in names: U units (symbols of a text, or whole records), D symbols of a unit, B lanes, T steps, V symbols of the
alphabet.

The units are dealt to the lanes in runs, and all lanes take a step together: one call of the model's stream for B rows.
Each lane is a text of its own that begins at the start symbol. The encoder asks the stream for every step's tables from
the first to the last, keeps two numbers a symbol, and codes them from the last to the first (rans.py); the decoder asks
the same questions in the same order, so what it computes is the same to the bit on the same machine.

The steps are cut into blocks: the words of a block are all that its steps take, so that a decoder that has gone astray
is found out at the end of the block, not of the file. The lanes' states go on from block to block and cost 64 bits a
lane in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from lmtrain.errors import EngineError, InputError
from lmtrain.inference.rans import TOTAL, WORD, Decoder, Encoder, frequencies, intervals, symbols_at
from lmtrain.inference.reopen import Plan, Reopened
from lmtrain.inference.resting import resting
from lmtrain.protocol import LN2, Cond, Draws, Model, Stream

START = 1 << 47
"""The state of a lane before its last symbol was coded: where the decoder has to end."""

Progress = Callable[[int, int], None]
"""Told (steps done, steps in all)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How U units of D symbols each lie in B lanes, and how many steps a block has.

    Lane b holds a run of consecutive units; the first U mod B lanes hold one unit more than the others.
    """

    units: int
    size: int
    lanes: int
    block: int

    @property
    def steps(self) -> int:
        """T, of the longest lane."""
        return -(-self.units // self.lanes) * self.size

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.steps // self.block)

    def block_steps(self, number: int) -> range:
        """The steps of a block."""
        return range(number * self.block, min((number + 1) * self.block, self.steps))

    def active(self, step: int) -> int:
        """How many of the lanes, the first ones, have a symbol at a step."""
        return self.lanes if step // self.size < self.units // self.lanes else self.units % self.lanes

    def _places(self) -> np.ndarray:
        """int64 [B, units a lane]: which unit a lane holds; U where it holds none."""
        each, more = divmod(self.units, self.lanes)
        count_B = each + (np.arange(self.lanes) < more)
        place_BS = (count_B.cumsum() - count_B)[:, None] + np.arange(each + (more > 0))
        return np.asarray(np.where(np.arange(each + (more > 0)) < count_B[:, None], place_BS, self.units))

    def deal(self, x_UD: np.ndarray) -> np.ndarray:
        """int64 [T, B] of units int64 [U, D]; 0 where a lane has ended."""
        padded = np.concatenate([x_UD, np.zeros((1, self.size), x_UD.dtype)])
        return np.asarray(padded[self._places()].transpose(1, 2, 0).reshape(self.steps, self.lanes))

    def gather(self, x_TB: np.ndarray) -> np.ndarray:
        """int64 [U, D]: the inverse of `deal`."""
        out = np.zeros((self.units + 1, self.size), np.int64)
        out[self._places()] = x_TB.reshape(-1, self.size, self.lanes).transpose(2, 0, 1)
        return out[:-1]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads what is coded.

    start: the symbol before a lane (text) or a record. plan: where a bounded model begins afresh (reopen.py), None for
    one that carries its state, or for records. record: every unit is a record with a stream of its own. label: the
    class of all records, for a model that is told one.
    """

    start: int
    plan: Plan | None = None
    record: bool = False
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Coded:
    """What coding gave. blocks: uint16 words, in the order of the decoder. state_B: uint64, where the decoder begins.

    float_bits: -log2 p of all symbols by the model's float32 log-probabilities, inf when one was impossible.
    table_bits: the same by the integer tables.
    """

    blocks: tuple[np.ndarray, ...]
    state_B: np.ndarray
    float_bits: float
    table_bits: float

    @property
    def payload_bits(self) -> int:
        """Bits of words and states; of nothing, none."""
        return 8 * (sum(block.nbytes for block in self.blocks) + self.state_B.nbytes) if self.blocks else 0


@contextmanager
def repeatable(model: Model) -> Iterator[None]:
    """One thread, float32 as it is, no dropout, no autocast: what both sides need for the same last bits.

    InputError when the model is not float32 on the CPU.
    """
    wrong = {f"{p.dtype} on {p.device.type}" for p in model.parameters()} - {"torch.float32 on cpu"}
    if wrong:
        raise InputError(f"a model of {', '.join(sorted(wrong))} cannot code; it takes float32 on the CPU")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        with resting(model), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


class _Lanes:
    """The stream step that encoder and decoder share: the tables of a step, then its symbols."""

    def __init__(self, model: Model, layout: Layout, reading: Reading) -> None:
        self._model, self._layout, self._reading = model, layout, reading
        self._step = 0
        self._stream: Stream | None = None

    def _open(self) -> Stream:
        start_B = torch.full((self._layout.lanes,), self._reading.start, dtype=torch.int64)
        label = self._reading.label
        label_B = None if label is None else torch.full_like(start_B, label)
        if self._reading.record:
            return self._model.stream(self._layout.lanes, cond=Cond(start_B, None, label_B))
        return Reopened(self._model, start_B=start_B, plan=self._reading.plan, label_B=label_B)

    def logp(self) -> np.ndarray:
        """float32 [active lanes, V]: log-probabilities of this step's symbols."""
        if self._stream is None:
            self._stream = self._open()
        logp_BV = self._stream.distribution().log_pmf()
        return np.asarray(logp_BV.numpy()[: self._layout.active(self._step)])

    def push(self, x_B: np.ndarray) -> None:
        """This step's symbols, of all lanes; those of lanes that have ended are of no account."""
        self._step += 1
        if self._step == self._layout.steps:
            return
        if self._reading.record and self._step % self._layout.size == 0:
            self._stream = None
            return
        assert self._stream is not None
        self._stream.push(torch.from_numpy(x_B))


def check(model: Model, *, alphabet: int) -> None:
    """InputError when the model has no exact probability for each symbol in turn, so that nothing can be coded."""
    if alphabet == 0:
        raise InputError("the model has a density of real numbers, not probabilities of symbols: nothing can be coded")
    if alphabet > TOTAL // 2:
        raise InputError(f"an alphabet of {alphabet} symbols is too large to be coded; at most {TOTAL // 2}")
    if isinstance(model, Draws):
        raise InputError(
            f"{type(model).__name__} mixes orderings and has no distribution of the next symbol; train it with one "
            "ordering to compress"
        )


def _order(model: Model, layout: Layout, reading: Reading) -> np.ndarray:
    """int64 [D]: the places of a unit in the order in which the model takes them."""
    return np.array(model.order if reading.record and model.order is not None else range(layout.size), dtype=np.int64)


def encode(
    model: Model, x_UD: np.ndarray, *, layout: Layout, reading: Reading, progress: Progress | None = None
) -> Coded:
    """Code units int64 [U, D]. InputError for a model that cannot code, or probabilities that are not numbers."""
    assert x_UD.shape == (layout.units, layout.size)
    x_TB = layout.deal(x_UD[:, _order(model, layout, reading)])
    # Frequencies are at most 2^30, so both fit uint32: 8 bytes a symbol are kept between the passes.
    kept_TB = np.zeros((2, layout.steps, layout.lanes), np.uint32)
    nats = table_bits = 0.0
    with repeatable(model), np.errstate(divide="ignore"):
        lanes = _Lanes(model, layout, reading)
        for step, x_B in enumerate(x_TB):
            logp_BV = lanes.logp()
            active = len(logp_BV)
            kept_TB[:, step, :active] = intervals(frequencies(logp_BV), x_B[:active])
            nats -= float(logp_BV[np.arange(active), x_B[:active]].astype(np.float64).sum())
            table_bits -= float(np.log2(kept_TB[0, step, :active] / TOTAL).sum())
            lanes.push(x_B)
            if progress is not None:
                progress(step + 1, layout.steps)
    encoder, blocks = Encoder(layout.lanes), []
    for number in reversed(range(layout.blocks)):
        words = []
        for step in reversed(layout.block_steps(number)):
            active = layout.active(step)
            frequency_B, before_B = kept_TB[:, step, :active].astype(np.uint64)
            words.append(encoder.push(frequency_B, before_B, lanes=active))
        blocks.append(np.concatenate(words[::-1]).astype(WORD))
    return Coded(tuple(blocks[::-1]), encoder.state_B, nats / LN2, table_bits)


def decode(
    model: Model,
    blocks: Sequence[np.ndarray],
    state_B: np.ndarray,
    *,
    layout: Layout,
    reading: Reading,
    progress: Progress | None = None,
) -> np.ndarray:
    """int64 [U, D]: the units back. EngineError naming the block whose words are not those of its symbols."""
    decoder, out = Decoder(state_B), []
    with repeatable(model):
        lanes = _Lanes(model, layout, reading)
        for number, words in enumerate(blocks):
            at = 0
            for step in layout.block_steps(number):
                logp_BV = lanes.logp()
                active = len(logp_BV)
                x_B = np.zeros(layout.lanes, np.int64)
                x_B[:active], frequency_B, before_B = symbols_at(frequencies(logp_BV), decoder.peek(lanes=active))
                try:
                    at = decoder.pop(frequency_B, before_B, words, at, lanes=active)
                except IndexError:
                    raise _astray(number, layout, "its words ran out") from None
                lanes.push(x_B)
                out.append(x_B)
                if progress is not None:
                    progress(step + 1, layout.steps)
            if at != len(words):
                raise _astray(number, layout, f"{len(words) - at} of its {len(words)} words were left over")
    if (decoder.state_B != START).any():
        raise _astray(layout.blocks - 1, layout, "a lane did not end where it began")
    x_UD = layout.gather(np.stack(out) if out else np.zeros((0, layout.lanes), np.int64))
    back = np.empty_like(x_UD)
    back[:, _order(model, layout, reading)] = x_UD
    return back


def _astray(number: int, layout: Layout, what: str) -> EngineError:
    return EngineError(
        f"block {number} of {layout.blocks}: {what}; this machine computes other probabilities than the one that coded"
    )
