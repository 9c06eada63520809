"""What ranks of the checkpoint tests do with real engines: train, save at every step, resume, go on."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from lmtrain import models
from lmtrain.checkpoint import CheckpointConfig, Checkpoints
from lmtrain.data.corpus import open_corpus
from lmtrain.data.loader import DataConfig, Loader
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.protocol import Engine, Place, Spec
from lmtrain.stopping import die_with_parent

STEPS, ROWS, CONTEXT = 6, 8, 12
MODEL = {"kind": "gpt", "layers": 1, "width": 16, "heads": 2, "dropout": 0.1}


def loader_of(corpus: str) -> Loader:
    """Eight rows a step, two a micro-batch, whatever the number of ranks."""
    config = DataConfig(corpus=corpus, context=CONTEXT, global_batch=ROWS, micro_batch=2)
    return Loader([open_corpus(Path(corpus))], config, seed=3)


def engine_of(place: Place, stage: int | None, loader: Loader, *, init: int, optimizer: str = "adamw") -> Engine:
    """An engine with a model of initial seed `init`; stage None is the plain engine."""
    torch.manual_seed(init)
    corpus = open_corpus(Path(loader.config.shares[0].path))
    model = models.build(models.parse(MODEL), spec=Spec(alphabet=corpus.alphabet, context=CONTEXT, bos=corpus.bos))
    kind = {"kind": "plain"} if stage is None else {"kind": "zero", "zero_stage": stage}
    micro_batch, accumulation = loader.layout(place.world)
    return make(
        EngineConfig(**kind, device="cpu", timeout=120),
        model,
        optimizer=OptimizerConfig(kind=optimizer, weight_decay=0.1, ema=0.9, ema_warmup=True),
        place=place,
        micro_batch=micro_batch,
        accumulation=accumulation,
        seed=11,
    )


def one_step(engine: Engine, loader: Loader, step: int) -> tuple[float, list[int]]:
    """(nats a symbol, positions of the rows this rank read)."""
    batches = loader.batch(step, engine.rank, engine.world)
    weight = loader.total_weight(step)
    report = engine.step(batches, total_weight=weight, lr=1e-2 / (1 + step), step=step)
    assert report.applied
    assert math.isfinite(report.nats)
    return report.nats / weight, [int(p) for batch in batches for p in batch.position_B]  # type: ignore[union-attr]


def digest(engine: Engine) -> str:
    """SHA-256 of all that this rank would save."""
    out = hashlib.sha256(repr(engine.scalars()).encode())
    for f in sorted(engine.fragments(), key=lambda f: (f.name, f.kind, f.start)):
        out.update(repr((f.name, f.kind, f.start, f.shape)).encode())
        out.update(f.tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def label(stage: int | None, world: int) -> str:
    """The folder's name of what was saved at a stage on so many ranks."""
    return f"{'plain' if stage is None else f'zero{stage}'}-{world}"


def save_all(place: Place, folder: Path, *, corpus: str, out: str, stages: list[int | None], optimizer: str) -> Any:
    """Train at every stage in turn and save after every step."""
    torch.set_num_threads(1)
    loader = loader_of(corpus)
    told = []
    for stage in stages:
        engine = engine_of(place, stage, loader, init=1, optimizer=optimizer)
        store = Checkpoints(Path(out) / label(stage, place.world), CheckpointConfig(keep=STEPS + 1))
        curve, places, digests = [], [], []
        for step in range(STEPS):
            store.save(engine, step=step, state={"order": loader.order_record()})
            digests.append(digest(engine))
            loss, positions = one_step(engine, loader, step)
            curve.append(loss)
            places.append(positions)
        digests.append(digest(engine))
        engine.close()
        told.append({"curve": curve, "places": places, "digests": digests})
    return told


def resume_all(
    place: Place, folder: Path, *, corpus: str, out: str, cases: list[list[Any]], optimizer: str
) -> list[dict[str, Any]]:
    """For every case [stage, stage that saved, ranks that saved, step]: resume and train to the end.

    Cases of one stage share an engine: the first of them resumes into a fresh one, whose weights are of another seed.
    """
    torch.set_num_threads(1)
    loader = loader_of(corpus)
    told = []
    engine, at = None, -1
    for stage, saved_stage, saved_world, wanted in cases:
        if engine is None or stage != at:
            if engine is not None:
                engine.close()
            engine, at = engine_of(place, stage, loader, init=2, optimizer=optimizer), stage
        store = Checkpoints(Path(out) / label(saved_stage, saved_world), CheckpointConfig(), note=lambda text: None)
        step, state = store.restore(engine, wanted)
        assert step == wanted
        assert state == {"order": loader.order_record()}
        restored = digest(engine)
        results = [one_step(engine, loader, s) for s in range(step, STEPS)]
        told.append(
            {
                "restored": restored,
                "curve": [loss for loss, _ in results],
                "places": [positions for _, positions in results],
                "end": digest(engine),
            }
        )
    if engine is not None:
        engine.close()
    return told


def train_on(
    place: Place,
    folder: Path,
    *,
    corpus: str,
    out: str | None,
    stage: int | None,
    until: int,
    marks: list[int],
    background: bool = False,
) -> dict[str, Any]:
    """Train up to step `until` from the newest checkpoint below `out`, saving there after every step (None: nowhere).

    background: all saves but the last.
    Writes [step, digest] into began<rank>.json when it begins; returns the digests at the steps `marks` and at the end.
    """
    die_with_parent()  # it may have no end of its own
    torch.set_num_threads(1)
    loader = loader_of(corpus)
    store = Checkpoints(Path(out), CheckpointConfig(background=background)) if out is not None else None
    used = store is not None and store.any()
    engine = engine_of(place, stage, loader, init=2 if used else 1)  # another seed: all must come from the checkpoint
    begin = 0
    if store is not None and used:
        begin, state = store.restore(engine)
        assert state == {"at": begin}
    new = folder / f"began{place.rank}.tmp"
    new.write_text(json.dumps([begin, digest(engine)]))
    new.replace(folder / f"began{place.rank}.json")
    digests = {}
    for step in range(begin, until):
        if step in marks:
            digests[str(step)] = digest(engine)
        one_step(engine, loader, step)
        if store is not None:
            store.save(engine, step=step + 1, state={"at": step + 1}, wait=step + 1 == until)
    if store is not None:
        store.close()
    digests[str(until)] = digest(engine)
    engine.close()
    return digests
