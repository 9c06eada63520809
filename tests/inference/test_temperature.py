"""A temperature is exact: against the distribution that enumeration gives, in every model that has one a symbol."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lmtrain import models
from lmtrain.errors import InputError
from lmtrain.inference.temperature import tempered
from lmtrain.protocol import Cond, Model, Spec

GPT = {"kind": "gpt", "layers": 1, "width": 16, "heads": 2}
CASES = {
    "gpt": (GPT, Spec(3, 4, 2)),
    "made": ({"kind": "made", "width": 12}, Spec(2, 5, 2)),
    "pixelcnn_pp": (
        {"kind": "pixelcnn_pp", "width": 8, "layers": 1, "scales": 1, "components": 2},
        Spec(3, 4, 3, grid=(2, 2, 1)),
    ),
}


def perturbed(tree: dict[str, object], spec: Spec) -> Model:
    torch.manual_seed(1)
    model = models.build(models.parse(tree), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.5)
    return model.eval()


def enumerated(spec: Spec) -> tuple[Tensor, Cond]:
    x_NT = torch.tensor(list(itertools.product(range(spec.alphabet), repeat=spec.context)))
    return x_NT, Cond(torch.full((len(x_NT),), spec.bos))


def by_enumeration(logp_N: Tensor, x_NT: Tensor, *, temperature: float) -> list[float]:
    """log p_T of each row, from the joint probabilities alone: conditionals are quotients of their sums."""
    rows = [tuple(row) for row in x_NT.tolist()]
    prefix: dict[tuple[int, ...], float] = {}
    for row, logp in zip(rows, logp_N.double().tolist(), strict=True):
        for length in range(len(row) + 1):
            prefix[row[:length]] = prefix.get(row[:length], 0.0) + math.exp(logp)
    symbols = sorted({row[0] for row in rows})
    out = []
    for row in rows:
        total = 0.0
        for t, symbol in enumerate(row):
            power = {v: (prefix[(*row[:t], v)] / prefix[row[:t]]) ** (1 / temperature) for v in symbols}
            total += math.log(power[symbol] / sum(power.values()))
        out.append(total)
    return out


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_against_enumeration(name: str, temperature: float) -> None:
    tree, spec = CASES[name]
    model = perturbed(tree, spec)
    x_NT, cond = enumerated(spec)
    with torch.no_grad():
        own_N = tempered(model, x_NT, cond=cond, temperature=1).sum(1)
        bent_N = tempered(model, x_NT, cond=cond, temperature=temperature).sum(1)
    assert torch.equal(own_N, model(x_NT, cond=cond).sum(1))
    wanted = by_enumeration(own_N, x_NT, temperature=temperature)
    assert bent_N.tolist() == pytest.approx(wanted, abs=2e-4)
    assert float(bent_N.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    assert abs(float((bent_N - own_N).abs().max())) > 0.1  # a temperature that did nothing would not be told above


def test_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, spec = CASES["gpt"]
    model = perturbed(tree, spec)
    x_NT, cond = enumerated(spec)
    whole = tempered(model, x_NT, cond=cond, temperature=2)
    monkeypatch.setattr("lmtrain.inference.temperature._CHUNK", 10)
    assert torch.allclose(tempered(model, x_NT, cond=cond, temperature=2), whole, atol=1e-6)


def test_what_has_no_temperature() -> None:
    model = perturbed({"kind": "rnade", "width": 8}, Spec(0, 3, 0))
    cond = Cond(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="density of real numbers"):
        tempered(model, torch.zeros(2, 3), cond=cond, temperature=2)
    gpt = perturbed(*CASES["gpt"])
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="wanted a number above 0"):
            tempered(gpt, torch.zeros(2, 4, dtype=torch.int64), cond=cond, temperature=wrong)
    mixed = perturbed(
        {"kind": "made", "width": 12, "masks": 3, "orderings": "each", "ordering": "drawn"}, Spec(2, 5, 2)
    )
    with pytest.raises(InputError, match="masks"):
        tempered(mixed, torch.zeros(2, 5, dtype=torch.int64), cond=cond, temperature=2)
