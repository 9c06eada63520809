"""Drawing from a model: what is drawn is a function of the seed, the sample's number and the position.

Shapes in names: B samples drawn side by side, V symbols of the alphabet, N symbols of a prompt, R random numbers.

By default a sample is drawn from the model's own distribution. Temperature, top-k and top-p bend it, in this order:
log p / temperature, then the k likeliest symbols, then the fewest likeliest whose probability reaches p.

[1] Fan, Lewis & Dauphin, Hierarchical Neural Story Generation, ACL 2018 (top-k).
[2] Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020 (top-p).
[3] Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox: random numbers by their place).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lmtrain.config import Config
from lmtrain.errors import ConfigError, DivergenceError, InputError
from lmtrain.inference.reopen import Plan, Reopened
from lmtrain.inference.resting import device_of, resting
from lmtrain.protocol import Distribution, Model

_BLOCK = 1024


class SampleConfig(Config):
    """How many samples, how long, and how far from the model's own distribution."""

    n: int = Field(default=1, ge=1, description="samples")
    max_symbols: int = Field(default=256, ge=1, description="symbols a sample, if the end symbol does not come first")
    temperature: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="divides log p; 1 = the model's own, 0 = always the likeliest",
    )
    top_k: int | None = Field(default=None, ge=1, description="keep the k likeliest symbols; null = all")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="keep the fewest likeliest symbols of this total probability; null = all"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="the same seed gives the same samples, whatever n")
    stride: int | None = Field(
        default=None, ge=1, description="new symbols between two openings of a full context; null = half the context"
    )
    batch: int = Field(default=32, ge=1, description="samples drawn side by side; changes speed and memory")

    @property
    def own(self) -> bool:
        """Whether this is the model's own distribution."""
        return self.temperature == 1 and self.top_k is None and self.top_p in (None, 1.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample. symbols: int64, what was drawn, without prompt and end symbol. ended: whether the end symbol came.

    log_prob: ln p under the model as it is, in nats, of the symbols and (if it ended) the end symbol, given the prompt.
    """

    index: int
    symbols: np.ndarray
    ended: bool
    log_prob: float

    @property
    def scored(self) -> int:
        """How many symbols `log_prob` is about."""
        return len(self.symbols) + self.ended


def noise(seed: int, *, sample: int, start: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the random numbers of positions start, start + 1, ... of a sample ([3], 53 bits each).

    start: a multiple of 4. A number depends on (seed, sample, position) and nothing else.
    """
    assert start % 4 == 0, "Philox gives four numbers a step"
    generator = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)).advance(start // 4)
    return np.asarray((generator.random_raw(count) >> np.uint64(11)) * 2.0**-53)


def bend(logp_BV: Tensor, config: SampleConfig) -> Tensor:
    """float64 [B, V], on the CPU: log-probabilities after temperature, top-k and top-p; -inf for what was cut.

    Of equally likely symbols those with the smaller number are kept first. Temperature 0 keeps the likeliest one.
    """
    logp_BV = logp_BV.detach().cpu().double()
    if config.temperature == 0:
        only = torch.full_like(logp_BV, -torch.inf)
        likeliest_B = torch.from_numpy(np.argmax(logp_BV.numpy(), axis=1))
        return only.scatter_(1, likeliest_B[:, None], 0.0)
    logp_BV = torch.log_softmax(logp_BV / config.temperature, dim=-1)
    if config.top_k is None and config.top_p is None:
        return logp_BV
    sorted_BV, symbol_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
    keep_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if config.top_k is not None:
        keep_BV[:, config.top_k :] = False
    if config.top_p is not None:
        p_BV = torch.softmax(sorted_BV.masked_fill(~keep_BV, -torch.inf), dim=-1)
        before_BV = p_BV.cumsum(dim=-1) - p_BV
        keep_BV &= before_BV < config.top_p
    kept_BV = torch.zeros_like(keep_BV).scatter_(1, symbol_BV, keep_BV)
    return torch.log_softmax(logp_BV.masked_fill(~kept_BV, -torch.inf), dim=-1)


def quantile(logp_BV: Tensor, noise_B: np.ndarray) -> Tensor:
    """int64 [B]: the symbol at quantile `noise_B` of each row, in alphabetical order; never one of probability 0."""
    reached_BV = logp_BV.double().exp().cumsum(dim=-1)
    total_B1 = reached_BV[:, -1:]
    cut_B1 = torch.from_numpy(noise_B)[:, None] * total_B1
    at_B1 = torch.searchsorted(reached_BV, cut_B1, right=True)
    # noise * total may round up to the total: the last symbol with a probability is the first that reaches it.
    last_B1 = (reached_BV < total_B1).sum(dim=-1, keepdim=True)
    return torch.minimum(at_B1, last_B1)[:, 0]


def sample(
    model: Model,
    *,
    config: SampleConfig,
    start: int,
    end: int | None,
    prompt_N: np.ndarray | None = None,
    alphabet: int | None = None,
    context: int | None = None,
    device: torch.device | str | None = None,
    on_symbols: Callable[[int, list[int]], None] | None = None,
) -> list[Sample]:
    """`config.n` samples that go on from the prompt.

    start: the symbol before the prompt (BOS). end: the symbol that ends a sample, None for samples of fixed length.
    prompt_N: int64 symbols, possibly longer than the context. alphabet: V, to check the prompt against.
    context: inputs to read before a new stream is opened on the last of them (reopen.py); default the model's own, and
        a model without one carries its state on.
    on_symbols: called with a sample's number and the symbols just drawn for it (the end symbol is not told).

    Raises ConfigError when the stride or the context do not fit the model, InputError for a prompt with symbols that
    are not in the alphabet or with the end symbol, DivergenceError when the model's probabilities are not numbers.
    """
    plan = _plan(model, config=config, context=context)
    prompt_N = _prompt(prompt_N, end=end, alphabet=alphabet)
    place = device_of(model) if device is None else torch.device(device)
    samples: list[Sample] = []
    with resting(model):
        for low in range(0, config.n, config.batch):
            numbers = range(low, min(low + config.batch, config.n))
            start_B = torch.full((len(numbers),), start, dtype=torch.int64, device=place)
            stream = Reopened(model, start_B=start_B, plan=plan)
            stream.read(torch.from_numpy(prompt_N).to(place).expand(len(numbers), -1))
            samples += _draw(stream, numbers, config=config, end=end, device=place, on_symbols=on_symbols)
    return samples


def _plan(model: Model, *, config: SampleConfig, context: int | None) -> Plan | None:
    if model.context is not None and context is not None and context > model.context:
        raise ConfigError(f"a context of {context} symbols is more than the {model.context} that the model reads")
    context = model.context if context is None else context
    if context is None:
        if config.stride is not None:
            raise ConfigError(
                f"stride {config.stride} was given, but {type(model).__name__} carries its state on and is never "
                "opened anew; leave the stride out or give a context"
            )
        return None
    return Plan(context, max(1, context // 2) if config.stride is None else config.stride)


def _prompt(prompt_N: np.ndarray | None, *, end: int | None, alphabet: int | None) -> np.ndarray:
    prompt_N = np.zeros(0, dtype=np.int64) if prompt_N is None else np.asarray(prompt_N)
    if prompt_N.ndim != 1 or (prompt_N.size and not np.issubdtype(prompt_N.dtype, np.integer)):
        raise InputError(
            f"the prompt is an array of {prompt_N.dtype} with {prompt_N.ndim} dimensions, wanted a list of symbols"
        )
    wrong = (prompt_N < 0) | (prompt_N >= (np.inf if alphabet is None else alphabet))
    if wrong.any():
        raise InputError(f"the prompt has symbol {prompt_N[wrong][0]}, the alphabet is 0 to {(alphabet or 0) - 1}")
    if end is not None and (prompt_N == end).any():
        raise InputError(f"the prompt holds the end symbol ({end}), after which nothing comes; cut the prompt there")
    return prompt_N.astype(np.int64)


def _draw(
    stream: Reopened,
    numbers: range,
    *,
    config: SampleConfig,
    end: int | None,
    device: torch.device,
    on_symbols: Callable[[int, list[int]], None] | None,
) -> list[Sample]:
    """Samples side by side. One that has ended goes on unheard until all have: rows of a stream cannot leave it."""
    count = len(numbers)
    drawn: list[list[int]] = [[] for _ in numbers]
    logp_B = np.zeros(count, dtype=np.float64)
    ended_B = np.zeros(count, dtype=bool)
    noise_BR = np.zeros((count, 0))
    for t in range(config.max_symbols):
        if t % _BLOCK == 0:
            ahead = min(_BLOCK, config.max_symbols - t)
            noise_BR = np.stack([noise(config.seed, sample=i, start=t, count=ahead) for i in numbers])
        now = stream.distribution()
        x_B = choose(now, noise_BR[:, t % _BLOCK], config=config, device=device)
        ln_p_B = now.log_prob(x_B).double().cpu().numpy()
        if not np.isfinite(ln_p_B[~ended_B]).all():
            raise DivergenceError(
                f"the model's probabilities are not finite after {t} sampled symbols; its weights have diverged, "
                "take an earlier checkpoint"
            )
        logp_B += np.where(ended_B, 0.0, ln_p_B)
        for b, symbol in enumerate(x_B.tolist()):
            if ended_B[b]:
                continue
            if symbol == end:
                ended_B[b] = True
                continue
            drawn[b].append(symbol)
            if on_symbols is not None:
                on_symbols(numbers[b], [symbol])
        if ended_B.all():
            break
        if t + 1 < config.max_symbols:
            stream.push(x_B)
    return [
        Sample(number, np.array(drawn[b], dtype=np.int64), bool(ended_B[b]), float(logp_B[b]))
        for b, number in enumerate(numbers)
    ]


def choose(now: Distribution, noise_B: np.ndarray, *, config: SampleConfig, device: torch.device) -> Tensor:
    """int64 [B] on the device."""
    if config.own:
        return now.sample(torch.from_numpy(noise_B).to(device))
    return quantile(bend(now.log_pmf(), config), noise_B).to(device)


class TextStream:
    """Turns symbols into text as they come: a character is given out when its last byte has come.

    decode: symbols to bytes, such that decoding one by one gives the same. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], bytes]) -> None:
        self._decode = decode
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, symbols: Sequence[int]) -> str:
        """The text that is now certain."""
        return self._decoder.decode(self._decode(symbols))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was cut off."""
        return self._decoder.decode(b"", final=True)
