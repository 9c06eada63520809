"""The lesson of two divergences: the same under-powered model fitted by forward and by reverse KL, side by side.

    python benchmarks/reverse_kl.py configs/rnade-lesson-mixture.yaml [key.sub=value ...] [--steps 1500] [--out FOLDER]

The config's source is known and its records are two real numbers. Forward KL(p || q) is maximum likelihood, `lmtrain
train` on draws of p. Reverse KL(q || p) needs no draws of p but its density: the score-function gradient

    grad KL(q || p) = E_q[(ln q(x) - ln p(x) - b) grad ln q(x)]      (Williams 1992, REINFORCE)

with the mean of the other samples as baseline b, in the plain loop below: it cannot be a corpus with weights, which are
not negative. Prints both divergences of both fits (estimates from samples, standard errors) and draws the densities.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtrain import models, run, schema, use
from lmtrain.corpora import spec_of
from lmtrain.inference.divergence import sampled
from lmtrain.likelihood import plots
from lmtrain.likelihood.divergence import Side, of_run, of_source
from lmtrain.meaning import Known
from lmtrain.protocol import Cond, Model, Place, Spec

EDGE, POINTS = 4.5, 161


def fit_reverse(
    model: Model, source: Known, spec: Spec, *, steps: int, batch: int, lr: float, seed: int
) -> list[float]:
    """Minimise KL(q || p) in place; the estimate of every step. torch's Adam with a falling rate, nothing else."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    curve = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        x_ND = draw(model, spec, count=batch, seed=seed + step)
        logp_N = torch.from_numpy(source.log_prob(x_ND))
        cond = Cond(torch.full((batch,), spec.bos, dtype=torch.int64))
        logq_N = model(torch.from_numpy(x_ND), cond=cond).sum(1)
        signal_N = logq_N.detach().double() - logp_N
        baseline_N = (signal_N.sum() - signal_N) / (batch - 1)
        loss = ((signal_N - baseline_N) * logq_N.double()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        curve.append(float(signal_N.mean()))
    return curve


def draw(model: Model, spec: Spec, *, count: int, seed: int) -> np.ndarray:
    """Records of the model, one symbol after the other."""
    noise_ND = torch.from_numpy(np.random.default_rng(seed).random((count, spec.context)))
    with torch.no_grad():
        stream = model.stream(count, cond=Cond(torch.full((count,), spec.bos, dtype=torch.int64)))
        symbols = []
        for d in range(spec.context):
            symbols.append(stream.distribution().sample(noise_ND[:, d]).float())
            if d + 1 < spec.context:
                stream.push(symbols[-1])
    return torch.stack(symbols, dim=1).numpy()


def density(side: Side) -> np.ndarray:
    """On the plane, a row for each value of the second number."""
    axis = np.linspace(-EDGE, EDGE, POINTS, dtype=np.float32)
    first, second = np.meshgrid(axis, axis)
    return np.exp(side.log_prob(np.stack([first.ravel(), second.ravel()], axis=1))).reshape(POINTS, POINTS)


def measured(p: Side, q: Side, *, samples: int, means: np.ndarray) -> dict[str, Any]:
    """Both divergences, and what share of q's draws is nearest to each mode."""
    of_p, of_q = p.draw(0, samples), q.draw(1, samples)
    found = sampled(of_p=(p.log_prob(of_p), q.log_prob(of_p)), of_q=(p.log_prob(of_q), q.log_prob(of_q))).to_json()
    near_N = ((of_q[:, None] - means) ** 2).sum(2).argmin(1)
    return {**found, "shares": (np.bincount(near_N, minlength=len(means)) / samples).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=None, help="default: the run folder")
    given = parser.parse_args()
    config = schema.load(given.config, given.overrides, environment=os.environ)
    run.train_run(config, Place(), environment=os.environ)
    opened = use.open_run(config.folder)
    spec, source = spec_of(opened.corpus, opened.config), opened.corpus.known
    if source is None or spec.context != 2 or spec.alphabet:
        raise SystemExit("the lesson is drawn on a plane: give a config of two real numbers from a known source")
    train_config, model_config = schema.need_train(opened.config)
    torch.manual_seed(train_config.seed)
    reverse = models.build(model_config, spec)
    settings = {"steps": given.steps, "batch": given.batch, "lr": given.lr, "seed": train_config.seed}
    curve = fit_reverse(reverse, source, spec, **settings)
    p = of_source(source)
    sides = {
        "forward KL(p || q)": of_run(opened, spec, "forward"),
        "reverse KL(q || p)": of_run(use.Opened(opened.config, opened.corpus, opened.saved, reverse), spec, "reverse"),
    }
    means = np.array(opened.corpus.manifest["known"]["means"])
    result = {name: measured(p, side, samples=given.samples, means=means) for name, side in sides.items()}
    out = given.out or config.folder
    plots.maps(
        out / "lesson.png",
        {"the source p": density(p), **{f"fitted by {name}": density(side) for name, side in sides.items()}},
        extent=(-EDGE, EDGE, -EDGE, EDGE),
        x_label="first number",
        y_label="second number",
    )
    (out / "lesson.json").write_text(json.dumps({**result, "reverse_curve": curve}, indent=1))
    print(f"{'fitted by':<22}{'KL(p || q)':>20}{'KL(q || p)':>20}   share of q's draws nearest to each mode")
    for name, one in result.items():
        values = [one[key] for key in ("forward_kl", "reverse_kl")]
        shown = [f"{value['value']:.3f} +- {value['error']:.3f}" for value in values]
        print(f"{name:<22}{shown[0]:>20}{shown[1]:>20}   " + " ".join(f"{share:.3f}" for share in one["shares"]))
    print(out / "lesson.png")


if __name__ == "__main__":
    main()
