"""What is looked at while a run goes: its held-out sets, and samples at the end."""

from __future__ import annotations

from lmtrain.corpora import alike, classes_in_turn, require_same_symbols, say, spec_of
from lmtrain.data import pictures
from lmtrain.data.corpus import open_corpus
from lmtrain.inference import records, score
from lmtrain.inference import sample as sampling
from lmtrain.inference.result import Result
from lmtrain.protocol import Corpus, Engine
from lmtrain.schema import RunConfig
from lmtrain.tracker import Tracker

SAMPLES = "samples"
"""Folder of pictures in the run folder."""
SAMPLE_SYMBOLS = 128
"""Longest text of the table at the end of a run."""


def evaluate_sets(config: RunConfig, own: Corpus, engine: Engine) -> dict[str, Result]:
    """Every set of `eval.sets`, in order."""
    results = {}
    with engine.evaluating(weights=config.eval.weights) as model:
        for name, chosen in config.eval.sets.items():
            corpus = own
            if chosen.corpus is not None:
                corpus = alike(open_corpus(chosen.corpus, remote=config.data.remote, note=say), own)
            require_same_symbols(corpus, own, what=f"eval.sets.{name}.corpus")
            results[name] = score.evaluate(
                model,
                corpus.split(chosen.split),
                corpus,
                config=config.eval.capped(chosen),
                context=config.data.row_length(corpus),
                name=name,
                masking=config.data.document_masking,
                rank=engine.rank,
                world=engine.world,
                add=engine.add,
                device=engine.device,
            )
    return results


def log_samples(config: RunConfig, corpus: Corpus, engine: Engine, tracker: Tracker, *, step: int) -> None:
    """A few samples into the run's table. Every rank draws the same ones: under ZeRO-3 all must make the same calls."""
    assert config.train is not None
    if corpus.record is not None:
        _log_records(config, corpus, engine, tracker, step=step)
        return
    settings = sampling.SampleConfig(n=config.train.samples, max_symbols=SAMPLE_SYMBOLS, seed=config.train.seed)
    with engine.evaluating(weights=config.eval.weights) as model:
        drawn = sampling.sample(model, config=settings, start=corpus.bos, end=corpus.bos, device=engine.device)
    texts = [corpus.decode(one.symbols.tolist()).decode("utf-8", "replace") for one in drawn]
    rows = [[one.index, text, one.scored, one.log_prob] for one, text in zip(drawn, texts, strict=True)]
    tracker.samples(["sample", "text", "symbols", "log_prob"], rows, step=step)


def _log_records(config: RunConfig, corpus: Corpus, engine: Engine, tracker: Tracker, *, step: int) -> None:
    """Images as a picture, others as a table of their numbers."""
    assert config.train is not None
    spec = spec_of(corpus, config)
    settings = sampling.SampleConfig(n=config.train.samples, max_symbols=spec.context, seed=config.train.seed)
    label_N = classes_in_turn(config, spec, settings.n)
    with engine.evaluating(weights=config.eval.weights) as model:
        drawn = records.draw(model, spec=spec, config=settings, label_N=label_N)
    logp_N = -drawn.nats_NT.sum(1)
    if not pictures.can_show(corpus):
        values_ND = pictures.numbers(drawn.x_NT, corpus).tolist()
        rows = [[i, *values, logp] for i, (values, logp) in enumerate(zip(values_ND, logp_N.tolist(), strict=True))]
        tracker.samples(["sample", *(f"x{d}" for d in range(spec.context)), "log_prob"], rows, step=step)
    elif engine.rank == 0:
        path = config.folder / SAMPLES / f"step-{step:08d}.png"
        pictures.write(path, pictures.sheet(pictures.show(drawn.x_NT, corpus)))
        tracker.picture(path, caption=f"{settings.n} samples, log p {logp_N.mean():.1f} nats on average", step=step)
