"""Builds the parts for what is done with a finished or running run: evaluate, sample, list, verify and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from lmtrain import engine as engines
from lmtrain import models
from lmtrain.checkpoint import Checkpoints, Reader, Saved, export, faults, load_weights
from lmtrain.config import build, override, read_yaml
from lmtrain.corpora import alike, folded, require_same_symbols, say, seen, spec_of
from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.data.loader import DataConfig
from lmtrain.data.memory import MemoryCorpus
from lmtrain.data.remote import is_url
from lmtrain.errors import CheckpointError, ConfigError, InputError
from lmtrain.inference import sample as sampling
from lmtrain.inference import score
from lmtrain.inference.result import Result
from lmtrain.protocol import Corpus, Model, Place, Split, Weights
from lmtrain.run import set_threads
from lmtrain.runfolder import CHECKPOINTS, CONFIG
from lmtrain.schema import RunConfig, need_model


@dataclass(frozen=True, slots=True)
class Opened:
    """A run: its config, its (first) corpus, a checkpoint of it, and the model with that checkpoint's weights."""

    config: RunConfig
    corpus: Corpus
    saved: Saved
    model: Model


def config_of(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved config in a run folder."""
    path = folder / CONFIG
    if not path.exists():
        raise InputError(f"{folder} is no run folder (it has no {CONFIG}); give the folder that `lmtrain train` made")
    return build(RunConfig, override(read_yaml(path), overrides), where=str(path))


def find_checkpoint(folder: Path, config: RunConfig, which: str) -> Saved:
    """The checkpoint `last`, `best` or of a step, verified."""
    store = Checkpoints(folder / CHECKPOINTS, config.checkpoint, note=say)
    if which == "last":
        return store.find()
    if which == "best":
        return store.find("best")
    if not which.isdecimal():
        raise InputError(f"--checkpoint {which!r} is neither last, best nor a step")
    return store.find(int(which))


def open_run(
    folder: Path, *, checkpoint: str = "last", overrides: Sequence[str] = (), weights: str | None = None
) -> Opened:
    """A run in one process, whatever engine and however many ranks trained it.

    weights: raw or ema; None = as the run's eval.weights says.

    Raises InputError (no run), CheckpointError (none, damaged), CorpusError or CheckpointError naming corpus and run
    when they do not belong together.
    """
    overrides = [*overrides, *([f"eval.weights={weights}"] if weights else [])]
    config, corpus, saved = _opened(folder, checkpoint, overrides)
    model = models.build(need_model(config), spec_of(corpus, config))
    load_weights(saved.path, model, weights=config.eval.weights)
    device = torch.device("cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu")
    return Opened(config=config, corpus=corpus, saved=saved, model=model.to(device).eval())


def own_corpus(data: DataConfig) -> PreparedCorpus:
    """The run's own corpus; of a mixture the first, whose tokenizer all share."""
    first = data.corpus if isinstance(data.corpus, str) else data.corpus[0].path
    return folded(open_corpus(first, remote=data.remote), data)


def _opened(folder: Path, checkpoint: str, overrides: Sequence[str]) -> tuple[RunConfig, Corpus, Saved]:
    """(config, corpus seen as the run sees it, checkpoint), which belong together."""
    config = config_of(folder, overrides)
    own = own_corpus(config.data)
    saved = find_checkpoint(folder, config, checkpoint)
    state = saved.manifest().state
    config, (corpus, *_) = seen(config, [own], stored=state.get("fit"))
    _belong_together(saved, state.get("identity", {}), corpus)
    return config, corpus, saved


def _belong_together(saved: Saved, identity: Mapping[str, Any], corpus: Corpus) -> None:
    known = identity.get("symbols")
    if known is None and identity.get("tokenizer") is not None:  # checkpoints from before there were records
        known = f"tokenizer {identity['tokenizer']}"
    if known is not None and known != corpus.meaning:
        raise CheckpointError(
            f"{saved.path} was trained with the {_short(known)}, and {corpus.path} has the {_short(corpus.meaning)}; "
            "give the run's own corpus (--set data.corpus=...)"
        )


def _short(meaning: str) -> str:
    return meaning[:22] if meaning.startswith("tokenizer ") else f"symbols `{meaning}`"


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate_run(
    folder: Path,
    *,
    data: Sequence[str],
    split: str,
    checkpoint: str,
    overrides: Sequence[str],
    place: Place,
    environment: Mapping[str, str],
) -> dict[str, Result]:
    """Score a split of the run's corpus, or each of `data`: prepared corpora (their `split`) and files.

    One process evaluates any checkpoint; started on several ranks, the run's own engine divides the work.
    """
    settings = score.EvalConfig.model_fields
    given = [text.split("=", 1)[0] for text in overrides]
    unknown = [key for key in given if key.split(".")[0] == "eval" and key.split(".")[1] not in settings]
    if unknown:
        raise ConfigError(f"--set {unknown[0]} is not a key of eval; known: {', '.join(sorted(settings))}")
    capped = [] if "eval.max_symbols" in given else ["eval.max_symbols=null"]
    overrides = [*overrides, *capped]
    set_threads(place, environment)
    if place.world > 1:
        return _evaluate_ranks(folder, data=data, split=split, checkpoint=checkpoint, overrides=overrides, place=place)
    opened = open_run(folder, checkpoint=checkpoint, overrides=overrides)
    return {
        name: _evaluate(opened.model, name, part, corpus, opened.config)
        for name, (corpus, part) in _sets(opened.corpus, data, split).items()
    }


def _evaluate(model: Model, name: str, part: Split, corpus: Corpus, config: RunConfig, **ranks: Any) -> Result:
    return score.evaluate(
        model,
        part,
        corpus,
        config=config.eval,
        context=config.data.row_length(corpus),
        name=name,
        masking=config.data.document_masking,
        **ranks,
    )


def _evaluate_ranks(
    folder: Path, *, data: Sequence[str], split: str, checkpoint: str, overrides: Sequence[str], place: Place
) -> dict[str, Result]:
    config, corpus, saved = _opened(folder, checkpoint, overrides)
    engine = engines.make(
        config.engine,
        models.build(need_model(config), spec_of(corpus, config)),
        optimizer=config.optimizer,
        place=place,
        micro_batch=1,
        accumulation=1,
        seed=0,
    )
    try:
        Reader(saved.path).weights(config.eval.weights)  # the engine would begin an average that is not there
        Checkpoints(folder / CHECKPOINTS, config.checkpoint, note=say).restore(engine, saved.step)
        ranks = {"rank": engine.rank, "world": engine.world, "add": engine.add, "device": engine.device}
        with engine.evaluating(weights=config.eval.weights) as model:
            return {
                name: _evaluate(model, name, part, held, config, **ranks)
                for name, (held, part) in _sets(corpus, data, split).items()
            }
    finally:
        engine.close()


def _sets(own: Corpus, data: Sequence[str], split: str) -> dict[str, tuple[Corpus, Split]]:
    if not data:
        return {split: (own, own.split(split))}
    sets: dict[str, tuple[Corpus, Split]] = {}
    for given in data:
        path = Path(given)
        if is_url(given) or path.is_dir():
            corpus = alike(open_corpus(given), own)
            require_same_symbols(corpus, own, what="--data")
            sets[f"{given}/{split}"] = (corpus, corpus.split(split))
        else:
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise InputError(f"--data {given} cannot be read: {error.strerror}") from None
            if not isinstance(own, PreparedCorpus) or own.record is not None:
                raise InputError(f"--data {given}: the run reads {own.unit}s; give the folder of a prepared corpus")
            held = MemoryCorpus(own.tokenizer, [raw], name=given)
            sets[given] = (held, held.split())
    return sets


# ---- sampling --------------------------------------------------------------------------------------------------------


def sample_run(opened: Opened, *, prompt: bytes, settings: Mapping[str, Any], stream: bool) -> list[dict[str, Any]]:
    """Samples as JSON mappings; with `stream` the text of the first is printed as it is produced."""
    config = build(sampling.SampleConfig, settings, where="sample")
    corpus = opened.corpus
    text = sampling.TextStream(corpus.decode)

    def show(number: int, symbols: list[int]) -> None:
        if stream and number == 0:
            print(text.push(symbols), end="", flush=True)

    if stream and prompt:
        print(prompt.decode("utf-8", "replace"), end="", flush=True)
    samples = sampling.sample(
        opened.model,
        config=config,
        start=corpus.bos,
        end=corpus.bos,
        prompt_N=corpus.encode(prompt),
        alphabet=corpus.alphabet,
        on_symbols=show,
    )
    if stream:
        print(text.finish())
    return [
        {
            "text": (prompt + corpus.decode(one.symbols.tolist())).decode("utf-8", "replace"),
            "symbols": one.scored,
            "ended": one.ended,
            "log_prob": one.log_prob,
            "step": opened.saved.step,
            "seed": config.seed,
            "index": one.index,
        }
        for one in samples
    ]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Each checkpoint of a run: step, size, whether it was the best, and whether its manifest and sizes are right."""
    config = config_of(folder)
    rows = []
    for saved in Checkpoints(folder / CHECKPOINTS, config.checkpoint, note=say).list():
        found = faults(saved.path, contents=False)
        row = {"step": saved.step, "path": str(saved.path), "bytes": _size(saved.path)}
        if not found:
            row |= {"best": saved.manifest().best, **saved.manifest().made_by}
        rows.append(row | {"problem": found[0] if found else None})
    return rows


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def verify_checkpoints(path: Path) -> list[dict[str, Any]]:
    """Every byte of a checkpoint, or of all checkpoints of a run, against the hashes."""
    if (path / CONFIG).exists():
        config = config_of(path)
        paths = [saved.path for saved in Checkpoints(path / CHECKPOINTS, config.checkpoint, note=say).list()]
    elif path.is_dir():
        paths = [path]
    else:
        raise InputError(f"{path} is neither a checkpoint nor a run folder")
    if not paths:
        raise CheckpointError(f"{path} has no checkpoint")
    return [{"path": str(one), "problem": "; ".join(faults(one)[:3]) or None} for one in paths]


def export_checkpoint(
    folder: Path, *, checkpoint: str, out: Path, dtype: str = "fp32", weights: str = "raw"
) -> list[Path]:
    """The weights (ema: averaged) as safetensors files in the new folder `out`, with the run's config beside them."""
    which = next((known for known in get_args(Weights) if known == weights), None)
    if which is None:
        raise InputError(f"--weights {weights!r} is neither raw nor ema")
    config = config_of(folder)
    saved = find_checkpoint(folder, config, checkpoint)
    return export(saved.path, out, config=config.model_dump(mode="json"), dtype=dtype, weights=which)
