"""benchmarks/reverse_kl.py: its gradient is that of the reverse KL, and it takes one mode where there are two."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import reverse_kl
from lmtrain import models
from lmtrain.data.fields import Gaussians
from lmtrain.protocol import Cond, Spec

SPEC = Spec(alphabet=0, context=2, bos=0)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return models.build(models.parse({"kind": "rnade", "width": 4, "components": 1}), SPEC)


def test_draws_are_those_of_the_model() -> None:
    one = model()
    x_ND = reverse_kl.draw(one, SPEC, count=4000, seed=1)
    cond = Cond(torch.zeros(4000, dtype=torch.int64))
    first_N = x_ND[:, 0]
    with torch.no_grad():
        grid_N = torch.linspace(-8, 8, 4000)
        at_N2 = torch.stack([grid_N, torch.zeros(4000)], 1)
        density_N = one(at_N2, cond=cond)[:, 0].exp().numpy()
    cell = 16 / 3999
    mean = float((grid_N.numpy() * density_N).sum() * cell)
    std = math.sqrt(float(((grid_N.numpy() - mean) ** 2 * density_N).sum() * cell))
    assert first_N.mean() == pytest.approx(mean, abs=5 * std / math.sqrt(4000))
    assert first_N.std() == pytest.approx(std, rel=0.06)


@pytest.mark.slow
def test_it_takes_the_larger_of_two_modes() -> None:
    """A mode of weight w that is met exactly, with the other far away, is at a reverse KL of -ln w."""
    source = Gaussians(np.array([0.8, 0.2]), np.array([[1.0, -1.0], [-9.0, 9.0]]), np.array([[0.7, 1.2]] * 2))
    one = model(3)
    curve = reverse_kl.fit_reverse(one, source, SPEC, steps=250, batch=64, lr=0.05, seed=0)
    assert curve[0] > 0.5
    assert np.mean(curve[-20:]) == pytest.approx(-math.log(0.8), abs=0.05)
