"""Divergences of a run from the source that its corpus was drawn from, or of two runs from one another.

Where the space has at most `MOST` records everything is exact; where it has more, or the records are real numbers, both
sides are drawn from and the estimates have standard errors. A model of text is asked for records of `length` symbols
from the start symbol on, drawn and scored alike on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain import use
from lmtrain.corpora import require_same_symbols, spec_of, told_classes
from lmtrain.data.enumerated import Enumerated
from lmtrain.errors import InputError
from lmtrain.inference import divergence, records
from lmtrain.inference.sample import SampleConfig
from lmtrain.inference.score import EvalConfig, evaluate
from lmtrain.meaning import Known
from lmtrain.protocol import Spec

MOST = 1 << 16
"""Records of a space that is enumerated."""
_BATCH = 512
TEXT_LENGTH = 16
"""Symbols of a record of a model of text, when nothing else is said."""


@dataclass(frozen=True, slots=True)
class Side:
    """One distribution. log_prob: float64 [N] of records. draw: (seed, count) -> records."""

    name: str
    log_prob: Callable[[np.ndarray], np.ndarray]
    draw: Callable[[int, int], np.ndarray]


def of_source(source: Known) -> Side:
    """The source of a corpus."""
    return Side("the source", source.log_prob, lambda seed, count: source.draw(np.random.default_rng(seed), count))


def of_run(opened: use.Opened, spec: Spec, name: str) -> Side:
    """A model."""

    def draw(seed: int, count: int) -> np.ndarray:
        settings = SampleConfig(n=count, max_symbols=spec.context, seed=seed, batch=_BATCH)
        return records.draw(opened.model, spec=spec, config=settings).x_NT

    def log_prob(x_ND: np.ndarray) -> np.ndarray:
        return np.asarray(-records.surprisal(opened.model, x_ND, spec=spec, batch=_BATCH).sum(axis=1))

    return Side(name, log_prob, draw)


def compare(
    first: Path,
    second: Path | None,
    *,
    samples: int,
    seed: int,
    length: int | None = None,
    checkpoint: str = "last",
    weights: str | None = None,
) -> dict[str, Any]:
    """p = the source of the run's corpus and q = the run; with a second run, p = the first and q = the second.

    Raises InputError for a corpus whose source is not known, models that are told a class, or runs whose symbols or
    records differ (ConfigError).
    """
    one = use.open_run(first, checkpoint=checkpoint, weights=weights)
    if told_classes(one.config):
        raise InputError(f"{first} is told the class of a record; divergences are of models that are told nothing")
    spec = _spec(one, length)
    known = one.corpus.known
    if second is None:
        if known is None:
            raise InputError(
                f"the source of {one.corpus.path} is not known, or not as data.view shows it; compare with another "
                "run, or prepare a corpus of kind markov, hmm, bernoulli, ising or gaussians"
            )
        p, q = of_source(known), of_run(one, spec, str(first))
    else:
        other = use.open_run(second, checkpoint=checkpoint, weights=weights)
        require_same_symbols(other.corpus, one.corpus, what=str(second))
        if told_classes(other.config) or _spec(other, length).context != spec.context:
            raise InputError(f"{second} is told a class, or reads records of another length than {first}")
        p, q = of_run(one, spec, str(first)), of_run(other, spec, str(second))
    countable = bool(spec.alphabet) and spec.alphabet**spec.context <= MOST
    if not countable and not samples:
        raise InputError(
            f"-n 0 draws nothing, and records of {spec.context} symbols have too many values to be counted out; give "
            "-n 2000, or a shorter --length"
        )
    result: dict[str, Any] = {"p": p.name, "q": q.name, "record": spec.context, "alphabet": spec.alphabet}
    result["entropy"] = known.entropy if known is not None and second is None else None
    result["entropy_rate"] = known.rate if known is not None and second is None else None
    if countable:
        x_XD = divergence.space(spec.alphabet, spec.context)
        logp_X = p.log_prob(x_XD)
        result["exact"] = divergence.exact(logp_X, q.log_prob(x_XD)).to_json()
        if second is None:
            result["forward_kl_by_evaluator"] = _by_evaluator(one, x_XD, logp_X, spec)
    if samples:
        result["sampled"] = _sampled(p, q, samples=samples, seed=seed).to_json()
    return result


def _spec(opened: use.Opened, length: int | None) -> Spec:
    spec = spec_of(opened.corpus, opened.config)
    if opened.corpus.record is None:
        wanted = length or min(TEXT_LENGTH, spec.context)
        if wanted > spec.context:
            raise InputError(f"--length {wanted} is more than the {spec.context} symbols that the model reads")
        return replace(spec, context=wanted)
    if length not in (None, spec.context):
        raise InputError(
            f"--length {length}: the records of {opened.corpus.path} have {spec.context} symbols; leave it out"
        )
    return spec


def _by_evaluator(opened: use.Opened, x_XD: np.ndarray, logp_X: np.ndarray, spec: Spec) -> float:
    """KL(p || q) when the held-out evaluator scores the whole space with weight p(x)."""
    corpus = Enumerated(x_XD, logp_X, bos=spec.bos, known=opened.corpus.known, meaning=opened.corpus.meaning)
    config = EvalConfig(batch=_BATCH)
    kl = evaluate(opened.model, corpus.split(), corpus, config=config, context=spec.context).kl
    assert kl is not None
    return kl


def _sampled(p: Side, q: Side, *, samples: int, seed: int) -> divergence.Sampled:
    of_p, of_q = p.draw(seed, samples), q.draw(seed + 1, samples)
    return divergence.sampled(of_p=(p.log_prob(of_p), q.log_prob(of_p)), of_q=(p.log_prob(of_q), q.log_prob(of_q)))


NAMES = {
    "forward_kl": "forward KL(p || q)",
    "reverse_kl": "reverse KL(q || p)",
    "jensen_shannon": "Jensen-Shannon",
    "total_variation": "total variation",
    "chi_square": "chi-square(p || q)",
    "hellinger": "Hellinger",
}


def describe(result: Mapping[str, Any]) -> str:
    """A plain table, nats a record."""
    lines = [f"p = {result['p']}, q = {result['q']}; records of {result['record']} symbols, nats a record"]
    if result["entropy"] is not None:
        rate = "" if result["entropy_rate"] is None else f", {result['entropy_rate']:.6f} a symbol in the long run"
        lines.append(f"  entropy of p: {result['entropy']:.6f}{rate}")
    exact, sampled = result.get("exact"), result.get("sampled")
    if exact is not None:
        lines.append(f"  exact, over all {exact['outcomes']:,} records (q adds up to {exact['total_q']:.7f})")
        lines += [f"    {name:<22} {_number(exact[key])}" for key, name in NAMES.items()]
    if "forward_kl_by_evaluator" in result:
        lines.append(f"    {'... by the evaluator':<22} {result['forward_kl_by_evaluator']:.6f}")
    if sampled is not None:
        found = [(NAMES[key], one) for key, one in sampled.items() if one is not None]
        lines.append(f"  from samples ({found[0][1]['samples']:,} of either side), standard error, 95 %")
        for name, one in found:
            bounds = " - ".join(_number(bound).strip() for bound in one["interval"])
            lines.append(f"    {name:<22} {_number(one['value'])}  +- {_number(one['error']).strip()}  [{bounds}]")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:10.6f}"
