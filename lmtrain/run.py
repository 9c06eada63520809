"""Builds the parts of a training run from a config and sets the loop going. Knows every name; decides nothing else."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lmtrain import engine as engines
from lmtrain import hardware, models, stopping
from lmtrain.checkpoint import Checkpoints
from lmtrain.config import dump
from lmtrain.data import parts as in_parts
from lmtrain.data import prepare as preparing
from lmtrain.data.corpus import open_corpus
from lmtrain.data.loader import Loader, compare_order
from lmtrain.data.remote import is_url
from lmtrain.data.view import Fit, View, view_of
from lmtrain.errors import EXIT_STOPPED, CheckpointError, ConfigError
from lmtrain.fleet import Fleet
from lmtrain.inference import sample as sampling
from lmtrain.inference import score
from lmtrain.inference.result import Result
from lmtrain.profiling import Profile
from lmtrain.protocol import Corpus, Engine, Model, Place, Spec
from lmtrain.schema import RunConfig, need_train
from lmtrain.tracker import Tracker
from lmtrain.train import Parts, train
from lmtrain.train import Progress as Standing

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
SAMPLE_SYMBOLS = 128
"""Longest sample of the table at the end of a run."""
_PATIENCE = 0.5
"""Seconds between two looks at a corpus that another rank is preparing."""


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def train_run(config: RunConfig, place: Place, *, environment: Mapping[str, str]) -> int:
    """Train as `config` says, at `place` among the ranks. Returns the exit code: 0, or EXIT_STOPPED."""
    train_config, model_config = need_train(config)
    threads = set_threads(place, environment)
    if place.world > 1:
        stopping.die_with_parent()
    config, corpora = seen(config, corpora_for(config, place))
    loader = Loader(corpora, config.data, seed=train_config.seed)
    micro_batch, accumulation = config.data.layout(place.world)
    spec = spec_of(corpora[0], config)
    torch.manual_seed(train_config.seed)
    model = models.build(model_config, spec)
    engine = engines.make(
        config.engine,
        model,
        optimizer=config.optimizer,
        place=place,
        micro_batch=micro_batch,
        accumulation=accumulation,
        seed=train_config.seed,
    )
    if place.rank == 0 and (keys := engines.untested(config.engine)):
        say(f"engine.deepspeed: passed on to DeepSpeed, but in no test of lmtrain's: {', '.join(keys)}")
    try:
        steps = train_config.length(config.data.global_batch * loader.context)
        layout = {"threads": threads, "micro_batch": micro_batch, "zero_stage": config.engine.zero_stage}
        identity = {
            "order": loader.order_record(),
            "model": model_config.model_dump(mode="json"),
            "symbols": corpora[0].meaning,
        }
        tracker = Tracker(config.folder, config.wandb, rank=place.rank, environment=environment)
        store = Checkpoints(config.folder / CHECKPOINTS, config.checkpoint, note=say, watch=tracker.log_save)
        stops = stopping.Stop(config.folder)
        profile = Profile(config.profile, config.folder, note=say)
        with owned(config.folder, engine), closing(store):
            standing = resume(config, store, engine, identity=identity, layout=layout)
            store.prepare(engine)
            source = loader.prefetching()
            parts = Parts(
                engine=engine,
                source=source,
                rate=lambda step: engines.rate(config.schedule, step=step, steps=steps, base=config.optimizer.lr),
                evaluate=lambda: evaluate_sets(config, corpora[0], engine),
                store=store,
                watcher=tracker,
                stops=stops,
                steps=steps,
                state={"identity": identity, "layout": layout, "fit": fit_of(corpora[0])},
                observers=(Fleet(config.watch, tracker, host=socket.gethostname()), profile),
            )
            with source, stops, tracker, profile:
                tracker.start(
                    step=standing.step,
                    steps=steps,
                    config=config.model_dump(mode="json"),
                    facts={**facts_of(corpora, model), **layout, "world": place.world},
                    deepspeed=generated_json(config, world=place.world),
                    log_every=train_config.log_every,
                    flops_per_symbol=model.flops_per_symbol(loader.context),
                    peak=_peak(config, engine) if place.rank == 0 else None,
                    bytes_per_symbol=bytes_per_symbol(corpora[0]),
                    dims_per_symbol=corpora[0].symbol_dims,
                    offset_per_symbol=corpora[0].measure.offset / loader.context,
                )
                if store.loaded is not None:
                    tracker.log_load(store.loaded)
                standing, reason = train(parts, train_config, standing)
                if reason is None and train_config.samples:
                    log_samples(config, corpora[0], engine, tracker, step=standing.step)
                tracker.finish(stopped=reason, summary={"best": standing.best, "best_step": standing.best_step})
                engine.agree(0)  # launchers end all ranks when the first one leaves: rank 0 is done with W&B here
    finally:
        engine.close()
    return EXIT_STOPPED if reason else 0


def set_threads(place: Place, environment: Mapping[str, str]) -> int:
    """Share the cores among the ranks of a host, unless OMP_NUM_THREADS says otherwise. Returns the threads."""
    if "OMP_NUM_THREADS" not in environment:
        here = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or place.world)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    return torch.get_num_threads()


def generated_json(config: RunConfig, *, world: int) -> dict[str, Any] | None:
    """What DeepSpeed is given; None for the plain engine."""
    if config.engine.kind != "zero":
        return None
    micro_batch, accumulation = config.data.layout(world)
    return engines.deepspeed_json(
        config.engine, config.optimizer, micro_batch=micro_batch, accumulation=accumulation, world=world
    )


def _peak(config: RunConfig, engine: Engine) -> hardware.Peak:
    one = hardware.peak(engine.device, precision=config.engine.precision)
    return hardware.Peak(one.flops * engine.world, one.meaning)


# ---- corpora ---------------------------------------------------------------------------------------------------------


def prepare_corpus(
    config: RunConfig, *, processes: int = 0, force: bool = False, part: str | None = None, merge: bool = False
) -> preparing.Prepared | in_parts.PreparedPart:
    """Make `data.corpus` as the config's `prepare` section says; a corpus made so already is left as it is.

    part: `i/n`, only the blocks i modulo n of it. merge: put it together from its parts.
    """
    if config.prepare is None:
        raise ConfigError("prepare is not given; say at least prepare.source.kind")
    out = config.data.corpus
    if isinstance(out, str) and is_url(out):
        raise ConfigError(f"data.corpus = {out} is a URL; prepare into a folder and copy it there")
    if not isinstance(out, str):
        raise ConfigError("data.corpus is a mixture; prepare its corpora one by one, each with its own config")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        if part is not None:
            mine = in_parts.Part.parse(part)
            return in_parts.prepare_part(
                config.prepare, Path(out), mine, processes=processes, progress=progress, force=force
            )
        make = in_parts.merge if merge else preparing.prepare
        return make(config.prepare, Path(out), processes=processes, progress=progress, force=force)


def train_tokenizer(config: RunConfig, out: Path) -> dict[str, Any]:
    """Train the tokenizer that `prepare` would train, save it in the folder `out`, and return its recipe."""
    if config.prepare is None:
        raise ConfigError("prepare is not given; say at least prepare.source.kind")
    return preparing.train_tokenizer(config.prepare, out)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def corpora_for(config: RunConfig, place: Place) -> list[Corpus]:
    """The corpora of `data.corpus`, opened; a missing one is prepared first when the config says how."""
    names = [share.path for share in config.data.shares]
    paths = [Path(name) for name in names if not is_url(name)]
    if len(names) == len(paths) == 1 and config.prepare is not None and not (paths[0] / "manifest.json").exists():
        if place.rank == 0:
            say(f"{paths[0]} is not there yet; preparing it")
            say(prepare_corpus(config).describe())
        else:
            while not (paths[0] / "manifest.json").exists():
                time.sleep(_PATIENCE)
    return [open_corpus(name, remote=config.data.remote, note=say) for name in names]


def seen(
    config: RunConfig, corpora: Sequence[Corpus], *, stored: Mapping[str, Any] | None = None
) -> tuple[RunConfig, list[Corpus]]:
    """The corpora through `data.view`, and the config with `data.context` filled in. stored: a checkpoint's fit."""
    fit = None if stored is None else Fit.from_json(stored)
    weights = [share.weight for share in config.data.shares]
    views = view_of(corpora, config.data.view, weights=weights, fit=fit)
    data = config.data.model_copy(update={"context": config.data.row_length(corpora[0])})
    return config.model_copy(update={"data": data}), views


def fit_of(corpus: Corpus) -> dict[str, Any] | None:
    """What was fitted on the train split, for the checkpoint; None where nothing is."""
    return corpus.fit.to_json() if isinstance(corpus, View) and corpus.fit is not None else None


def alike(corpus: Corpus, own: Corpus) -> Corpus:
    """Another corpus, seen as the run's own."""
    return View(corpus, own.config, fit=own.fit) if isinstance(own, View) else corpus


def spec_of(corpus: Corpus, config: RunConfig) -> Spec:
    """What the model must know of a corpus."""
    return Spec(
        alphabet=corpus.alphabet,
        context=config.data.row_length(corpus),
        bos=corpus.bos,
        grid=corpus.grid,
        labels=corpus.labels,
    )


def bytes_per_symbol(corpus: Corpus) -> float:
    """The training split's mean, so that the console can show bits per byte; 0 where there are no bytes."""
    counts = corpus.manifest["counts"]["train"]
    if corpus.record is not None:
        return 0.0
    return counts["bytes"] / counts["symbols"] if counts["symbols"] else 0.0


# ---- the run's folder ------------------------------------------------------------------------------------------------


@contextmanager
def owned(folder: Path, engine: Engine) -> Iterator[None]:
    """One job at a time in a run folder: rank 0 holds a lock on it; all ranks learn when it cannot."""
    handle = None
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            handle = None
    taken = engine.agree(int(engine.rank == 0 and handle is None))
    if taken:
        raise ConfigError(f"another job is at work in {folder}; give this one another run.name, or end that one")
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def resume(
    config: RunConfig,
    store: Checkpoints,
    engine: Engine,
    *,
    identity: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> Standing:
    """Where to begin: step 0, or the newest valid checkpoint, put into the engine. Stores the resolved config."""
    used = bool(engine.agree(int(engine.rank == 0 and store.any())))
    if used and config.run.resume == "never":
        raise ConfigError(
            f"{config.folder} was used before and run.resume = never; give another run.name, or run.resume=auto"
        )
    if not used and config.run.resume == "required":
        raise CheckpointError(
            f"{config.folder} has no checkpoint and run.resume = required; use run.resume=auto to start"
        )
    standing = Standing()
    if used:
        step, state = store.restore(engine)
        _same_run(state.get("identity", {}), identity, where=f"{store.folder} step {step}")
        changed = [
            f"{key} was {state['layout'].get(key)}, is {value}"
            for key, value in layout.items()
            if state.get("layout", {}).get(key) != value
        ]
        standing = Standing(**state["progress"])
        if engine.rank == 0:
            say(f"resumed step {step} of {config.folder}")
            if changed:
                say(
                    f"the layout differs ({'; '.join(changed)}): batches are the same, sums may differ in the last bits"
                )
    if engine.rank == 0:
        _store_config(config)
    return standing


def _same_run(recorded: Mapping[str, Any], present: Mapping[str, Any], *, where: str) -> None:
    compare_order(recorded.get("order", {}), present["order"])
    for key, value in present["model"].items():
        was = recorded.get("model", {}).get(key)
        if was != value and key != "dropout":
            raise ConfigError(
                f"model.{key} = {value}, but {where} was trained with {was}; give the old value, or another run.name"
            )


def _store_config(config: RunConfig) -> None:
    path = config.folder / CONFIG
    text = dump(config)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if path.exists():  # the run goes on otherwise than it began: keep what it began with
        number = 1
        while (old := config.folder / f"config.{number}.yaml").exists():
            number += 1
        path.rename(old)
    new = path.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def facts_of(corpora: Sequence[Corpus], model: Model) -> dict[str, Any]:
    """Commit, versions and hashes: what a reader of the metrics needs to make the run again."""
    packages = ("lmtrain", "torch", "deepspeed", "numpy", "sentencepiece")
    return {
        "commit": _commit(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "corpora": {str(corpus.path): corpus.fingerprint for corpus in corpora},
        "tokenizer": (corpora[0].manifest["tokenizer"] or {}).get("sha256"),
        "parameters": model.parameter_counts(),
    }


def _commit() -> str | None:
    """The commit of the code that runs, with a mark when it was changed; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


# ---- held-out sets ---------------------------------------------------------------------------------------------------


def evaluate_sets(config: RunConfig, own: Corpus, engine: Engine) -> dict[str, Result]:
    """Every set of `eval.sets`, in order."""
    results = {}
    with engine.evaluating() as model:
        for name, chosen in config.eval.sets.items():
            corpus = own
            if chosen.corpus is not None:
                corpus = alike(open_corpus(chosen.corpus, remote=config.data.remote, note=say), own)
            require_same_symbols(corpus, own, what=f"eval.sets.{name}.corpus")
            results[name] = score.evaluate(
                model,
                corpus.split(chosen.split),
                corpus,
                config=config.eval,
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
        return
    settings = sampling.SampleConfig(n=config.train.samples, max_symbols=SAMPLE_SYMBOLS, seed=config.train.seed)
    with engine.evaluating() as model:
        drawn = sampling.sample(model, config=settings, start=corpus.bos, end=corpus.bos, device=engine.device)
    texts = [corpus.decode(one.symbols.tolist()).decode("utf-8", "replace") for one in drawn]
    rows = [[one.index, text, one.scored, one.log_prob] for one, text in zip(drawn, texts, strict=True)]
    tracker.samples(["sample", "text", "symbols", "log_prob"], rows, step=step)


def require_same_symbols(corpus: Corpus, own: Corpus, *, what: str) -> None:
    """Refuse a corpus whose symbols are not those that the model was trained on."""
    if corpus.meaning != own.meaning:
        if corpus.record is not None or own.record is not None:
            raise ConfigError(
                f"{what} = {corpus.path} is {corpus.meaning}, and {own.path} is {own.meaning}; prepare it alike"
            )
        raise ConfigError(
            f"{what} = {corpus.path} was prepared with another tokenizer than {own.path}; "
            "prepare it with prepare.tokenizer.path set to the run's tokenizer"
        )
