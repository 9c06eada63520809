"""Models and tokenizers small enough to be worked out by hand, and the sums that scores are compared with.

B rows, T symbols, N positions of a text, V symbols of the alphabet, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain.protocol import Cond, Distribution, Model, Stream


class Pmf(Distribution):
    """A distribution given by its log-probabilities [B, V]; sampled by walking up the alphabet."""

    def __init__(self, logp_BV: Tensor) -> None:
        self.logp_BV = logp_BV

    def log_pmf(self) -> Tensor:
        return self.logp_BV

    def log_prob(self, x_B: Tensor) -> Tensor:
        return self.logp_BV.gather(1, x_B[:, None])[:, 0]

    def sample(self, noise_B: Tensor) -> Tensor:
        out = []
        for row, u in zip(self.logp_BV.double().exp().tolist(), noise_B.tolist(), strict=True):
            reached, symbol = 0.0, 0
            for symbol, p in enumerate(row):  # noqa: B007
                reached += p
                if u < reached:
                    break
            out.append(symbol)
        return torch.tensor(out)


class Bigram(Model):
    """p(x_t | the symbol before it), a table. Unbounded, and trivially carries its (empty) state."""

    context = None

    def __init__(self, alphabet: int, *, seed: int, spread: float = 1.5) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.logp_VV = nn.Parameter(torch.log_softmax(spread * torch.randn(alphabet, alphabet, generator=draw), dim=-1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        self.shapes.append(tuple(x_BT.shape))
        in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], dim=1)
        return self.logp_VV[in_BT, x_BT]

    def carry(self, x_BT: Tensor, *, cond: Cond, state: Any) -> tuple[Tensor, Any]:
        return self(x_BT, cond=cond), None

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        return _BigramStream(self, cond.start_B)


class _BigramStream(Stream):
    def __init__(self, model: Bigram, start_B: Tensor) -> None:
        self.model, self.last_B = model, start_B

    def distribution(self) -> Distribution:
        return Pmf(self.model.logp_VV[self.last_B])

    def push(self, x_B: Tensor) -> None:
        self.last_B = x_B


class Fading(Model):
    """A network that remembers everything it read, fading: h_t = fade * h_{t-1} + E[input_t], p(x_t) = softmax(W h_t).

    Every input that a row can or cannot see changes the answer, so a wrong cut of the text shows. `context` bounds it
    when given; its state can be carried. Padding (weight 0) may be answered with NaN to show that nobody looks there.
    """

    def __init__(self, alphabet: int, *, seed: int, bos: int, context: int | None = None, fade: float = 0.9) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.context, self.bos, self.fade = context, bos, fade
        self.E_VD = nn.Parameter(0.5 * torch.randn(alphabet, 8, generator=draw))
        self.W_VD = nn.Parameter(0.5 * torch.randn(alphabet, 8, generator=draw))
        self.shapes: list[tuple[int, ...]] = []
        self.poison = False

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        logp_BT, _ = self.carry(x_BT, cond=cond, state=None)
        return logp_BT

    def carry(self, x_BT: Tensor, *, cond: Cond, state: Any) -> tuple[Tensor, Any]:
        self.shapes.append(tuple(x_BT.shape))
        h_BD = torch.zeros(len(x_BT), 8) if state is None else state
        in_B = cond.start_B
        out = []
        for t in range(x_BT.shape[1]):
            if cond.first_BT is not None:
                h_BD = torch.where(cond.first_BT[:, t, None], 0.0, h_BD)
                in_B = torch.where(cond.first_BT[:, t], self.bos, in_B)
            h_BD = self.fade * h_BD + self.E_VD[in_B]
            out.append(torch.log_softmax(h_BD @ self.W_VD.T, dim=-1).gather(1, x_BT[:, t, None])[:, 0])
            in_B = x_BT[:, t]
        logp_BT = torch.stack(out, dim=1)
        if self.poison:
            zeros = (x_BT == 0).flip(1).cumprod(1).flip(1).bool()  # a run of zeros up to the row's end: padding
            logp_BT = logp_BT.masked_fill(zeros, torch.nan)
        return logp_BT, h_BD

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        return _FadingStream(self, cond.start_B)


class _FadingStream(Stream):
    def __init__(self, model: Fading, start_B: Tensor) -> None:
        self.model, self.read = model, 1
        self.h_BD = model.E_VD[start_B]

    def distribution(self) -> Distribution:
        assert self.model.context is None or self.read <= self.model.context, "more inputs than the context"
        return Pmf(torch.log_softmax(self.h_BD @ self.model.W_VD.T, dim=-1))

    def push(self, x_B: Tensor) -> None:
        self.read += 1
        self.h_BD = self.model.fade * self.h_BD + self.model.E_VD[x_B]


class NoCarry(Model):
    """A model without a state: everything equally likely."""

    context = 8

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        return torch.full(x_BT.shape, -np.log(self.alphabet), dtype=torch.float32)


def fading_nats(model: Fading, text_N: Sequence[int], *, visible: Callable[[int], Sequence[int]]) -> np.ndarray:
    """float64 [N]: -ln p of each symbol from the definition, one at a time: the inputs it sees are `visible(t)`."""
    E_VD, W_VD = model.E_VD.detach().double().numpy(), model.W_VD.detach().double().numpy()
    out = []
    for t, x in enumerate(text_N):
        h_D = np.zeros(8)
        for symbol in visible(t):
            h_D = model.fade * h_D + E_VD[symbol]
        score_V = W_VD @ h_D
        top = score_V.max()
        out.append(top + np.log(np.exp(score_V - top).sum()) - score_V[x])
    return np.array(out)


class Bytes:
    """Symbol = byte; the end symbol is 256."""

    kind, vocab, end, sha256 = "bytes", 257, 256, "0" * 64

    def encode(self, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def encode_many(self, documents: list[bytes]) -> list[np.ndarray]:
        return [self.encode(document) for document in documents]

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(int(i) for i in ids if i != self.end)

    def symbol_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)


class Pieces(Bytes):
    """Bytes, and some longer pieces taken greedily: symbols of 0 to 6 bytes, as subword tokenizers have them."""

    kind = "sentencepiece-bpe"
    pieces = [bytes([b]) for b in range(256)] + [
        "é".encode(),
        b"the",
        b" the",
        "▁".encode(),
        b"\n\n",
        b"abcdef",
    ]
    vocab = len(pieces) + 1
    end = len(pieces)

    def encode(self, raw: bytes) -> np.ndarray:
        longest = sorted(range(256, self.end), key=lambda i: -len(self.pieces[i]))
        ids, at = [], 0
        while at < len(raw):
            symbol = next((i for i in longest if raw.startswith(self.pieces[i], at)), raw[at])
            ids.append(symbol)
            at += len(self.pieces[symbol])
        return np.array(ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.pieces[int(i)] for i in ids if i != self.end)

    def symbol_bytes(self) -> np.ndarray:
        return np.array([*map(len, self.pieces), 0], dtype=np.int64)
