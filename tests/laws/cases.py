"""Which models are put before the laws: every config with a `laws` section, and variants that no config has.

A case has <= 4,096 outcomes, so that its whole space can be listed, and parameters pushed away from uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain import models
from lmtrain.config import read_yaml
from lmtrain.protocol import Cond, Model, Spec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MOST_OUTCOMES = 4096
PUSH = 0.4

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt-gpt2": {
        "kind": "gpt", "preset": "gpt2", "context": None, "layers": 2, "width": 16, "heads": 2, "dropout": 0.0
    },
    "gpt-llama": {
        "kind": "gpt", "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "activation": "swiglu", "qk_norm": False,
        "tied": False,
    },
    "gpt-multiquery": {
        "kind": "gpt", "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "positions": "learned",
        "norm": "layernorm", "activation": "gelu", "context": 9,
    },
    "rnn-gru": {"kind": "rnn", "cell": "gru", "layers": 2, "width": 16, "tied": False},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model's configuration, small, for a corpus that may not exist."""

    name: str
    model: dict[str, Any]
    spec: Spec

    def build(self, *, seed: int = 0, push: float = PUSH) -> Model:
        """The model, its parameters pushed away from where every symbol is equally probable; without dropout."""
        torch.manual_seed(seed)
        model = models.build(models.parse(self.model), self.spec)
        if push:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape), alpha=push)
        return model.eval()

    def outcomes(self) -> Tensor:
        """int64 [V^T, T]: every row there is."""
        V, T = self.spec.alphabet, self.spec.context
        return torch.cartesian_prod(*[torch.arange(V)] * T).reshape(-1, T)

    def starts(self) -> list[int]:
        """Symbols that a row may begin from: any, when BOS is one of the alphabet; else the reserved start alone."""
        return list(range(self.spec.alphabet)) if self.spec.bos < self.spec.alphabet else [self.spec.bos]

    def rows(self, batch: int, *, seed: int) -> tuple[Tensor, Cond]:
        """Random rows [B, T] with their start symbols."""
        draw = np.random.default_rng(seed)
        x_BT = torch.from_numpy(draw.integers(self.spec.alphabet, size=(batch, self.spec.context)))
        return x_BT, Cond(torch.from_numpy(draw.choice(self.starts(), size=batch)))


def cases() -> list[Case]:
    """Every case with BOS as a symbol of the alphabet (text), and most with a reserved start too (records)."""
    enrolled: dict[str, tuple[dict[str, Any], int, int]] = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        tree = read_yaml(path)
        laws = tree.get("laws")
        if not laws:
            continue
        unknown = set(laws) - {"alphabet", "context", "model"}
        if unknown:
            raise ValueError(f"{path.name}: laws has unknown keys {sorted(unknown)}")
        enrolled[path.stem] = ({**tree["model"], **laws.get("model", {})}, laws["alphabet"], laws["context"])
    enrolled |= {name: (tree, 3, 4) for name, tree in VARIANTS.items()}
    found = []
    for name, (tree, V, T) in enrolled.items():
        if V**T > MOST_OUTCOMES:
            raise ValueError(f"{name}: laws with {V}^{T} outcomes; at most {MOST_OUTCOMES}")
        found.append(Case(f"{name}-text", tree, Spec(alphabet=V, context=T, bos=V - 1)))
        if name not in VARIANTS or not tree.get("tied", True):
            found.append(Case(f"{name}-record", tree, Spec(alphabet=V, context=T, bos=V)))
    return found
