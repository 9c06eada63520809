"""Builds the parts of a training run from a config and sets the loop going. Knows every name; decides nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from lmtrain import engine as engines
from lmtrain import hardware, models, section, stopping
from lmtrain.checkpoint import Checkpoints
from lmtrain.corpora import bytes_per_symbol, corpora_for, fit_of, say, seen, spec_of
from lmtrain.data.loader import Loader
from lmtrain.errors import EXIT_STOPPED
from lmtrain.fleet import Fleet
from lmtrain.heldout import evaluate_sets, log_samples
from lmtrain.lifeline import PATIENCE, Lifeline, collectives_timeout
from lmtrain.profiling import Profile
from lmtrain.protocol import Corpus, Engine, Model, Place
from lmtrain.runfolder import CHECKPOINTS, owned, require_alike, require_shared, resume, stored_fit
from lmtrain.schema import RunConfig, need_train
from lmtrain.starters import Starters
from lmtrain.tracker import Tracker
from lmtrain.train import Parts, ending, train


def train_run(config: RunConfig, place: Place, *, environment: Mapping[str, str]) -> int:
    """Train as `config` says, at `place` among the ranks. Returns the exit code: 0, or EXIT_STOPPED."""
    need_train(config)
    config.data.layout(place.world)  # what is wrong with the config itself is said before anybody is waited for
    if place.world == 1:
        return _train_run(config, place, environment=environment)
    stopping.die_with_parent()
    with tied(place, timeout=config.engine.timeout):
        return _train_run(config, place, environment=environment)


def tied(place: Place, *, timeout: float) -> Lifeline:
    """Tie this rank to the others and to those who started it. A pipe that nobody reads any more ends nothing."""
    stopping.outlive_readers()
    listener, where, token = engines.channel(place, timeout=max(timeout, PATIENCE))
    look = Starters().look
    return Lifeline(
        place.rank, place.world, where=where, token=token, listener=listener, timeout=timeout, each_beat=look
    )


def _train_run(config: RunConfig, place: Place, *, environment: Mapping[str, str]) -> int:
    train_config, model_config = need_train(config)
    threads = set_threads(place, environment)
    section.enter("corpus")
    config, corpora = seen(config, corpora_for(config, place), stored=stored_fit(config))
    loader = Loader(corpora, config.data, seed=train_config.seed)
    micro_batch, accumulation = config.data.layout(place.world)
    spec = spec_of(corpora[0], config)
    section.enter("model and engine")
    torch.manual_seed(train_config.seed)
    model = models.build(model_config, spec)
    allowed = collectives_timeout(config.engine.timeout)
    engine = engines.make(
        config.engine.model_copy(update={"timeout": allowed}),
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
        require_alike(config, corpora, engine)
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
            require_shared(config.folder, engine)
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
                ended = ending(train_config, standing, steps=steps, judge=next(iter(config.eval.sets), ""))
                if ended and place.rank == 0:
                    say(f"ended {ended}")
                summary = {"best": standing.best, "best_step": standing.best_step, "ended": ended}
                tracker.finish(stopped=reason, summary=summary)
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
