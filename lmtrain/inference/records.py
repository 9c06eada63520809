"""Whole records (images, rows of a table): drawing them, filling in what is missing, and what each symbol cost.

Shapes in names: N records, B of them side by side, T symbols of a record.

What is drawn is a function of (seed, number of the record, place in the model's order), as in sample.py, whatever N and
B are. A symbol that is given is pushed as it is, so what is filled in depends on those given before it in the model's
order, and on those alone: the model's own conditional distribution of everything else is not to be had by reading once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import DivergenceError, InputError
from lmtrain.inference.resting import device_of, resting
from lmtrain.inference.sample import SampleConfig, choose, noise
from lmtrain.protocol import Cond, Draws, Model, Spec


@dataclass(frozen=True, slots=True)
class Drawn:
    """x_NT: int64 or float32 symbols. nats_NT: -ln p of each, float64; 0 where it was given.

    For a model that draws whole rows (protocol.Draws) nats_NT is its own forward's: the last column may hold them all.
    """

    x_NT: np.ndarray
    nats_NT: np.ndarray


def draw(
    model: Model,
    *,
    spec: Spec,
    config: SampleConfig,
    x_NT: np.ndarray | None = None,
    given_NT: np.ndarray | None = None,
    label_N: np.ndarray | None = None,
) -> Drawn:
    """`config.n` records from the model; or, with `x_NT` and `given_NT` (bool), those with the rest filled in.

    label_N: int64, a class for each record, for a model that is told one.
    Raises InputError for records that do not fit the model, a label that is no class, settings that a density or a
    model without a stream cannot follow; DivergenceError when the model's probabilities are not numbers.
    """
    count = config.n if x_NT is None else len(x_NT)
    T = spec.context
    if x_NT is None or given_NT is None:
        x_NT, given_NT = np.zeros((count, T)), np.zeros((count, T), dtype=bool)
    _check(x_NT, given_NT, label_N, count=count, spec=spec)
    if isinstance(model, Draws) and (given_NT.any() or not config.own):
        raise InputError(
            f"{type(model).__name__} mixes orderings and draws whole records from its own distribution alone; train it "
            "with one ordering to complete records, or to change the temperature"
        )
    if spec.alphabet == 0 and not config.own:
        raise InputError(
            "temperature, top-k and top-p bend probabilities of symbols; this model has a density of reals"
        )
    device, drawn_N, nats_N = device_of(model), [], []
    with resting(model):
        for low in range(0, count, config.batch):
            these = slice(low, min(low + config.batch, count))
            numbers = range(these.start, these.stop)
            noise_BT = np.stack([noise(config.seed, sample=i, start=0, count=T + 1) for i in numbers])
            known_BT, cond = _rows(x_NT[these], None if label_N is None else label_N[these], spec=spec, device=device)
            if isinstance(model, Draws):
                x_BT = model.draw(torch.from_numpy(noise_BT).to(device), cond=cond)
                nats_BT = -model(x_BT, cond=cond).double()
            else:
                given_BT = torch.from_numpy(given_NT[these]).to(device)
                x_BT, nats_BT = _side_by_side(model, known_BT, given_BT, noise_BT, cond=cond, config=config)
            if not torch.isfinite(nats_BT).all():
                raise DivergenceError("the model's probabilities are not finite; its weights have diverged")
            drawn_N.append(x_BT.cpu().numpy())
            nats_N.append(nats_BT.cpu().numpy())
    return Drawn(np.concatenate(drawn_N), np.concatenate(nats_N))


def _rows(x_BT: np.ndarray, label_B: np.ndarray | None, *, spec: Spec, device: torch.device) -> tuple[Tensor, Cond]:
    """Records and their condition as a model takes them."""
    x = torch.from_numpy(x_BT).to(device, torch.float32 if spec.alphabet == 0 else torch.int64)
    start_B = torch.full((len(x),), spec.bos, dtype=torch.int64, device=device)
    labels = None if label_B is None else torch.from_numpy(label_B.astype(np.int64)).to(device)
    return x, Cond(start_B, None, labels)


def _side_by_side(
    model: Model, known_BT: Tensor, given_BT: Tensor, noise_BT: np.ndarray, *, cond: Cond, config: SampleConfig
) -> tuple[Tensor, Tensor]:
    """(x_BT, nats_BT) of some records. A given symbol keeps its value to the bit."""
    B, T = known_BT.shape
    x_BT, nats_BT = known_BT.clone(), torch.zeros(B, T, dtype=torch.float64, device=known_BT.device)
    stream = model.stream(B, cond=cond)
    for step, t in enumerate(model.order or range(T)):
        given_B = given_BT[:, t]
        if not given_B.all():
            now = stream.distribution()
            fresh_B = choose(now, noise_BT[:, step], config=config, device=x_BT.device).to(x_BT)
            x_BT[:, t] = torch.where(given_B, x_BT[:, t], fresh_B)
            nats_BT[:, t] = torch.where(given_B, 0.0, -now.log_prob(x_BT[:, t]).double())
        if step + 1 < T:
            stream.push(x_BT[:, t])
    return x_BT, nats_BT


def surprisal(
    model: Model, x_NT: np.ndarray, *, spec: Spec, label_N: np.ndarray | None = None, batch: int = 32
) -> np.ndarray:
    """float64 [N, T]: -ln p of each symbol given those before it, in nats (of reals: minus the log-density)."""
    _check(x_NT, np.zeros(x_NT.shape, dtype=bool), label_N, count=len(x_NT), spec=spec)
    device, out = device_of(model), []
    with resting(model):
        for low in range(0, len(x_NT), batch):
            these = slice(low, low + batch)
            x_BT, cond = _rows(x_NT[these], None if label_N is None else label_N[these], spec=spec, device=device)
            out.append(-model(x_BT, cond=cond).double().cpu().numpy())
    return np.concatenate(out)


def _check(x_NT: np.ndarray, given_NT: np.ndarray, label_N: np.ndarray | None, *, count: int, spec: Spec) -> None:
    if x_NT.shape != (count, spec.context) or given_NT.shape != x_NT.shape:
        raise InputError(
            f"records of shape {x_NT.shape[1:]} with a mask of shape {given_NT.shape[1:]} were given; "
            f"the model reads records of {spec.context} symbols"
        )
    inside = x_NT[given_NT] if given_NT.any() else x_NT
    if spec.alphabet and ((inside < 0) | (inside >= spec.alphabet)).any():
        raise InputError(f"a record has the symbol {inside.max()}; the alphabet is 0 to {spec.alphabet - 1}")
    if label_N is not None:
        if len(label_N) != count:
            raise InputError(f"{len(label_N)} labels were given for {count} records")
        if ((label_N < 0) | (label_N >= spec.labels)).any():
            raise InputError(f"label {label_N.max()} is none of the {spec.labels} classes 0 to {spec.labels - 1}")
