"""Which models are put before the laws: every config with a `laws` section, and variants that no config has.

`laws: {alphabet, context | record | grid, labels, model}`. alphabet: V, 0 for reals. context: T symbols of a row, which
may be text or a record; record: a record of so many symbols and nothing else; grid: the same, an image of [H, W, C].
labels: classes of the records. model: what differs from the config's model.

A discrete case has <= 4,096 outcomes, so that its whole space can be listed; all have parameters away from uniform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain import models
from lmtrain.config import read_yaml
from lmtrain.protocol import Cond, Draws, Model, Spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MOST_OUTCOMES = 4096
PUSH, REAL_PUSH = 0.4, 0.2
"""How far parameters are pushed. Scales are exponentials of a network: less, or no grid would hold their tails."""
KEYS = {"alphabet", "context", "record", "grid", "labels", "model"}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt-gpt2": {"alphabet": 3, "context": 4, "model": {
        "kind": "gpt", "preset": "gpt2", "context": None, "layers": 2, "width": 16, "heads": 2, "dropout": 0.0
    }},
    "gpt-llama": {"alphabet": 3, "context": 4, "model": {
        "kind": "gpt", "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "activation": "swiglu", "qk_norm": False,
        "tied": False,
    }},
    "gpt-multiquery": {"alphabet": 3, "context": 4, "model": {
        "kind": "gpt", "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "positions": "learned",
        "norm": "layernorm", "activation": "gelu", "context": 9,
    }},
    "rnn-gru": {"alphabet": 3, "context": 4, "model": {
        "kind": "rnn", "cell": "gru", "layers": 2, "width": 16, "tied": False
    }},
    "fvsbn-classes": {"alphabet": 2, "record": 6, "labels": 3, "model": {"kind": "fvsbn", "conditional": True}},
    "nade-classes": {"alphabet": 2, "record": 6, "labels": 3, "model": {
        "kind": "nade", "width": 16, "conditional": True
    }},
    "rnade-logistics": {"alphabet": 0, "record": 3, "labels": 2, "model": {
        "kind": "rnade", "width": 16, "components": 3, "head": "logistics", "conditional": True
    }},
    "made": {"alphabet": 2, "record": 8, "labels": 2, "model": {"kind": "made", "width": 64}},
    "made-levels": {"alphabet": 3, "record": 5, "labels": 2, "model": {
        "kind": "made", "width": 24, "layers": 2, "ordering": "drawn", "direct": True, "conditional": True,
        "activation": "sigmoid",
    }},
    "made-orderings": {"alphabet": 2, "record": 6, "labels": 2, "model": {
        "kind": "made", "width": 48, "masks": 3, "ordering": "drawn", "orderings": "each", "conditional": True
    }},
    "made-masks": {"alphabet": 3, "record": 4, "model": {
        "kind": "made", "width": 48, "masks": 3, "layers": 2, "direct": True
    }},
    "pixelcnn-grey": {"alphabet": 5, "grid": [2, 2, 1], "model": {
        "kind": "pixelcnn", "blocks": 1, "width": 16, "head_width": 12, "first_kernel": 3,
    }},
    "gated_pixelcnn-grey": {"alphabet": 2, "grid": [2, 3, 1], "model": {
        "kind": "gated_pixelcnn", "layers": 2, "width": 8, "head_width": 12, "first_kernel": 3,
    }},
    "pixelcnn_pp-classes": {"alphabet": 4, "grid": [2, 2, 1], "labels": 2, "model": {
        "kind": "pixelcnn_pp", "scales": 2, "layers": 1, "width": 12, "components": 4, "dropout": 0.0,
        "conditional": True,
    }},
    "gpt-conditional": {"alphabet": 3, "grid": [1, 2, 3], "labels": 2, "model": {
        "kind": "gpt", "layers": 2, "width": 16, "heads": 2, "positions": "learned", "conditional": True
    }},
    "rnn-conditional": {"alphabet": 3, "grid": [1, 2, 3], "labels": 2, "model": {
        "kind": "rnn", "layers": 1, "width": 16, "tied": False, "conditional": True
    }},
    "image_transformer-plane": {"alphabet": 4, "grid": [2, 2, 1], "labels": 2, "model": {
        "kind": "image_transformer", "layers": 2, "width": 16, "heads": 2, "attention": "local_2d",
        "query_shape": [2, 1], "memory_reach": [0, 1], "conditional": True,
    }},
    "pixelrnn-rows": {"alphabet": 3, "grid": [2, 2, 1], "labels": 2, "model": {
        "kind": "pixelrnn", "variant": "row_lstm", "layers": 2, "hidden": 8, "head_width": 16, "conditional": True
    }},
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A model's configuration, small, for a corpus that may not exist.

    config: whether a config enrols it, or it is a variant. whole: the model reads whole records alone.
    """

    name: str
    model: dict[str, Any]
    spec: Spec
    config: bool = False
    whole: bool = False

    def build(self, *, seed: int = 0, push: float | None = None) -> Model:
        """The model, its parameters pushed away from where every symbol is equally probable; without dropout."""
        torch.manual_seed(seed)
        model = models.build(models.parse(self.model), self.spec)
        push = (REAL_PUSH if self.real else PUSH) if push is None else push
        if push:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape), alpha=push)
        return model.eval()

    @cached_property
    def pushed(self) -> Model:
        """`build()`, once for all laws that do not change it."""
        return self.build()

    @cached_property
    def order(self) -> list[int]:
        """The positions of a row in the order in which the model takes them."""
        return list(self.pushed.order or range(self.spec.context))

    @cached_property
    def steps(self) -> bool:
        """Whether it goes symbol by symbol, with `predict` and `stream`: it does not draw whole rows in its own way."""
        return not isinstance(self.build(push=0.0), Draws)

    @property
    def real(self) -> bool:
        """Whether symbols are real numbers."""
        return self.spec.alphabet == 0

    @property
    def text(self) -> bool:
        """Whether rows may be text: BOS is a symbol like the others."""
        return self.spec.bos < self.spec.alphabet

    @cached_property
    def outcomes(self) -> Tensor:
        """int64 [V^T, T]: every row there is."""
        V, T = self.spec.alphabet, self.spec.context
        return torch.cartesian_prod(*[torch.arange(V)] * T).reshape(-1, T)

    def beginnings(self) -> list[tuple[int, int | None]]:
        """(start symbol, label) that a row may have: any start, when BOS is one of the alphabet; else the reserved one.

        Labels only of a model that heeds them.
        """
        starts = range(self.spec.alphabet) if self.text else [self.spec.bos]
        labels = range(self.spec.labels) if self.conditional else [0 if self.spec.labels else None]
        return [(start, label) for start in starts for label in labels]

    @property
    def conditional(self) -> bool:
        """Whether the model heeds the label."""
        return bool(self.model.get("conditional"))

    def cond(self, batch: int, begin: tuple[int, int | None] | None = None) -> Cond:
        """The same beginning for all rows; the first there is by default."""
        start, label = begin or self.beginnings()[0]
        label_B = None if label is None else torch.full((batch,), label)
        return Cond(torch.full((batch,), start), None, label_B)

    def rows(self, batch: int, *, seed: int) -> tuple[Tensor, Cond]:
        """Random rows [B, T] with their start symbols and labels."""
        draw, (V, T) = np.random.default_rng(seed), (self.spec.alphabet, self.spec.context)
        x_BT = draw.normal(size=(batch, T)).astype(np.float32) if self.real else draw.integers(V, size=(batch, T))
        starts = [start for start, _ in self.beginnings()]
        start_B = torch.from_numpy(draw.choice(starts, size=batch))
        label_B = torch.from_numpy(draw.integers(self.spec.labels, size=batch)) if self.spec.labels else None
        return torch.from_numpy(x_BT), Cond(start_B, None, label_B)

    def disturbed(self, x_BT: Tensor, s: int) -> Tensor:
        """The rows with another symbol at position s."""
        other_BT = x_BT.clone()
        other_BT[:, s] = x_BT[:, s] + 1.0 if self.real else (x_BT[:, s] + 1) % self.spec.alphabet
        return other_BT


def enrol(name: str, model: dict[str, Any], laws: dict[str, Any], *, config: bool) -> list[Case]:
    """The cases of a `laws` section: with BOS as a symbol of the alphabet (text), with a reserved start (records)."""
    if set(laws) - KEYS or len(set(laws) & {"context", "record", "grid"}) != 1:
        raise ValueError(f"{name}: laws has the keys {sorted(laws)}; known: {sorted(KEYS)}, one of them for the length")
    tree, V = {**model, **laws.get("model", {})}, laws["alphabet"]
    grid = tuple(laws["grid"]) if "grid" in laws else None
    T = math.prod(grid) if grid else laws.get("context") or laws["record"]
    if V**T > MOST_OUTCOMES:
        raise ValueError(f"{name}: laws with {V}^{T} outcomes; at most {MOST_OUTCOMES}")
    record = Spec(alphabet=V, context=T, bos=V, grid=grid, labels=laws.get("labels", 0))
    if V == 0 or "context" not in laws:
        return [Case(name, tree, record, config, whole=True)]
    found = [Case(f"{name}-text", tree, Spec(alphabet=V, context=T, bos=V - 1), config)]
    if config or not tree.get("tied", True):
        found.append(Case(f"{name}-record", tree, record, config))
    return found


@cache
def cases() -> list[Case]:
    """Every case there is."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        tree = read_yaml(path)
        if tree.get("laws"):
            found += enrol(path.stem, tree["model"], tree["laws"], config=True)
    for name, laws in VARIANTS.items():
        found += enrol(name, {}, laws, config=False)
    return found
