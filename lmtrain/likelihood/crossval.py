"""Cross-validation: K trainings, mean and spread of the held-out score, and the choice of a candidate of a grid.

Every candidate is trained on every fold. Fold i is test, the fold before it is valid, the rest train; `valid` stops
early, picks the checkpoint and chooses the candidate by one standard error; the chosen one alone is scored on `test`,
once.

The results folder:
  jobs/NAME.yaml    the config of a training, which `lmtrain train` repeats; .log its words; .json what it came to
  runs/NAME         its run folder
  crossval.json     the whole result, written when everything is there
NAME ends in a hash of the resolved config and the corpus's fingerprint: what is finished is not trained again, whatever
else is asked of the same folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain import use
from lmtrain.config import dump
from lmtrain.corpora import folded, prepare_corpus
from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.data.folds import seen_by_tokenizer
from lmtrain.data.layout import write_file
from lmtrain.data.remote import is_url
from lmtrain.errors import EXIT_STOPPED, ConfigError, DivergenceError, EngineError, InputError
from lmtrain.inference.choice import Choice, Spread, one_standard_error
from lmtrain.inference.interval import student_quantile
from lmtrain.journal import METRICS, read
from lmtrain.likelihood import candidates as grid
from lmtrain.likelihood.candidates import Axis, Candidate, Way
from lmtrain.likelihood.jobs import Jobs, last_words
from lmtrain.likelihood.learning import Curve, curve_of, value_of
from lmtrain.protocol import Corpus, Place
from lmtrain.schema import RunConfig, need_train

RESULT = "crossval.json"
FORMAT = 1
UNITS = {
    "bits_per_byte": "bits per byte",
    "bits_per_dim": "bits per dimension",
    "nats_per_record": "nats per record",
    "nats_per_symbol": "nats per symbol",
}
"""What a held-out score is compared in; lower is better."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for. folds: None for the published splits. checkpoint: best or last of each run is scored.

    rule: one-se or best.
    """

    folds: int | None
    axes: tuple[Axis, ...] = ()
    parallel: int = 1
    checkpoint: str = "best"
    rule: str = "one-se"


@dataclass(frozen=True, slots=True)
class Job:
    """One training."""

    name: str
    candidate: Candidate
    fold: int | None
    config: RunConfig
    fingerprint: str


class StopAskedError(Exception):
    """A signal came; what was done is kept."""


def crossval(
    config: RunConfig, wish: Wish, folder: Path, *, environment: Mapping[str, str], note: Callable[[str], None]
) -> dict[str, Any] | None:
    """The result, also in `folder`; None when a signal ended it, to go on when it is asked for again.

    note: hears a line about each training. Raises ConfigError, InputError, CorpusError, DivergenceError when every
    candidate diverged, EngineError when a training failed for another reason.
    """
    need_train(config)
    held, split = grid.held_out_set(config)
    if wish.checkpoint not in ("best", "last"):
        raise InputError(f"--checkpoint {wish.checkpoint!r}: give best or last")
    if wish.rule not in ("one-se", "best"):
        raise InputError(f"--rule {wish.rule!r}: give one-se or best")
    way = grid.way_of(config, published=wish.folds is None)
    tried = grid.candidates(wish.axes)
    with owned(folder):
        work = _Work(folder, held, split, wish, environment, note)
        jobs = work.plan(config, way, tried)
        try:
            found = work.train(jobs)
            done = _Outcome(wish, way, tried, jobs, found, work.unit, work.warnings)
            done.choose()
            tests = {job.name: work.test(job, found[job.name]) for job in done.chosen_jobs()}
        except StopAskedError:
            return None
        result = done.to_json(tests)
        write_file(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """One cross-validation at a time in a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"results cannot be kept in {folder}: {error.strerror}; give --out another folder") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another cross-validation is at work in {folder}; give --out another folder") from None
        yield


class _Work:
    """What touches files and processes."""

    def __init__(
        self,
        folder: Path,
        held: str,
        split: str,
        wish: Wish,
        environment: Mapping[str, str],
        note: Callable[[str], None],
    ) -> None:
        self.folder, self.held, self.split, self.wish = folder, held, split, wish
        self.environment, self.note = environment, note
        self.unit = ""
        self.warnings: list[str] = []

    def plan(self, config: RunConfig, way: Way, tried: Sequence[Candidate]) -> list[Job]:
        """Every training that is wanted, on corpora that are prepared."""
        out = []
        folds: Sequence[int | None] = [None] if self.wish.folds is None else range(1, self.wish.folds + 1)
        for fold in folds:
            keys = {} if fold is None else grid.fold_keys(config, way, fold=fold, folds=self.wish.folds or 0)
            one = grid.with_keys(config, keys, where=f"fold {fold}")
            corpus = self._corpus(one)
            self.unit = self.unit or unit_of(corpus)
            if warning := self._seen(corpus, fold):
                self.warnings.append(warning)
                self.note(f"warning: {warning}")
            most = corpus.split(self.split).symbols
            one = grid.beside_train(one, most=min(most, one.eval.max_symbols or most))
            for candidate in tried:
                keys = {**candidate.values, "train.samples": 0}
                its = grid.with_keys(one, keys, where=f"--grid {candidate.label}")
                name = grid.job_name(its, label=candidate.label, fold=fold, fingerprint=corpus.fingerprint)
                its = grid.with_keys(its, {"run.dir": str(self.folder / "runs"), "run.name": name}, where="run")
                if its.wandb.project and not its.wandb.group:
                    its = grid.with_keys(its, {"wandb.group": self.folder.name}, where="wandb")
                out.append(Job(name, candidate, fold, its, corpus.fingerprint))
        return out

    def _corpus(self, config: RunConfig) -> PreparedCorpus:
        first = config.data.shares[0].path
        if len(config.data.shares) == 1 and config.prepare is not None and not is_url(first):
            prepared = prepare_corpus(config)
            if not prepared.to_json().get("reused", False):
                self.note(f"prepared {first}")
        return folded(open_corpus(first, remote=config.data.remote, note=self.note), config.data)

    def _seen(self, corpus: Corpus, fold: int | None) -> str | None:
        for name in (self.split, "test"):
            if words := seen_by_tokenizer(corpus.manifest, name):
                return words if fold is None else f"fold {fold}: {words}"
        return None

    def train(self, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
        """What each came to: those that are finished as they are, the others trained now."""
        (self.folder / "jobs").mkdir(exist_ok=True)
        found = {job.name: kept for job in jobs if (kept := self._kept(job)) is not None}
        missing = {self._path(job): job for job in jobs if job.name not in found}
        if found:
            self.note(f"{len(found)} of {len(jobs)} trainings are finished already")
        for path, job in missing.items():
            write_file(path, dump(job.config).encode())
        running = Jobs(self.environment, parallel=self.wish.parallel)
        for path, code in running.run(list(missing)):
            job = missing[path]
            if code == EXIT_STOPPED:
                self.note(f"{job.name} was stopped and saved; the same command goes on")
                raise StopAskedError
            if code == DivergenceError.exit_code:
                found[job.name] = self._keep(job, {"failed": last_words(path)})
                self.note(f"[{len(found)}/{len(jobs)}] {job.name}: {last_words(path)}")
                continue
            if running.stopped and code < 0:
                raise StopAskedError
            if code:
                raise EngineError(
                    f"training {path} failed with exit code {code}: {last_words(path)}; see {path.stem}.log"
                )
            found[job.name] = self._keep(job, self._measure(job))
            shown = found[job.name]
            self.note(
                f"[{len(found)}/{len(jobs)}] {job.candidate.label}{'' if job.fold is None else f', fold {job.fold}'}: "
                f"{self.split} {value_of(shown['valid'], self.unit):.4f} {UNITS[self.unit]}, best at step "
                f"{shown['best_step']} of {shown['steps']}"
            )
        if running.stopped:
            raise StopAskedError
        return found

    def _path(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.name}.yaml"

    def _kept(self, job: Job) -> dict[str, Any] | None:
        try:
            value = json.loads(self._path(job).with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            return None
        if value.get("checkpoint") != self.wish.checkpoint:
            return self._keep(job, self._measure(job)) if "failed" not in value else value
        return dict(value)

    def _keep(self, job: Job, value: dict[str, Any]) -> dict[str, Any]:
        value = {"name": job.name, "fold": job.fold, "checkpoint": self.wish.checkpoint, **value}
        write_file(self._path(job).with_suffix(".json"), (json.dumps(value, indent=1) + "\n").encode())
        return value

    def _measure(self, job: Job) -> dict[str, Any]:
        """The learning curves, and the whole of `valid` under the checkpoint."""
        rows = list(read(job.config.folder / METRICS))
        curve = curve_of(rows, held=self.held, train=grid.TRAIN, unit=self.unit)
        steps = max((row["step"] for row in rows if row["kind"] == "train"), default=0)
        valid = self._evaluate(job, self.split)
        return {"steps": steps, "best_step": curve.best_step, "curve": curve.to_json(), "valid": valid}

    def test(self, job: Job, found: dict[str, Any]) -> dict[str, Any] | None:
        """The test split under the chosen candidate, once; None where the corpus has none."""
        if "test" not in found:
            corpus = folded(open_corpus(job.config.data.shares[0].path, remote=job.config.data.remote), job.config.data)
            there = "test" in corpus.manifest["split"]["splits"]
            found = self._keep(job, {**found, "test": self._evaluate(job, "test") if there else None})
        result: dict[str, Any] | None = found["test"]
        return result

    def _evaluate(self, job: Job, split: str) -> dict[str, Any]:
        results = use.evaluate_run(
            job.config.folder,
            data=[],
            split=split,
            checkpoint=self.wish.checkpoint,
            overrides=[],
            place=Place(),
            environment=self.environment,
        )
        value = results[split].to_json()
        value.pop("definitions")
        return value


def unit_of(corpus: Corpus) -> str:
    """What scores are compared in: bits per byte of text, bits per dimension of images, nats per record of tables."""
    if corpus.record is None:
        return "bits_per_byte" if corpus.manifest["counts"]["train"]["bytes"] else "nats_per_symbol"
    return "bits_per_dim" if corpus.grid is not None and corpus.alphabet else "nats_per_record"


@dataclass
class _Outcome:
    """Arithmetic on what was found."""

    wish: Wish
    way: Way
    tried: Sequence[Candidate]
    jobs: Sequence[Job]
    found: Mapping[str, Mapping[str, Any]]
    unit: str
    warnings: Sequence[str]
    choice: Choice | None = None

    def of(self, candidate: Candidate) -> list[Mapping[str, Any]]:
        """What its folds came to, in order."""
        return [self.found[job.name] for job in self.jobs if job.candidate is candidate]

    def valid(self, candidate: Candidate) -> Spread:
        """Of the held-out values of its folds; inf where one diverged."""
        ones = self.of(candidate)
        return Spread(tuple(math.inf if "failed" in one else value_of(one["valid"], self.unit) for one in ones))

    def se(self, candidate: Candidate) -> float:
        """Over folds; of a single split that of its mean over records or documents, from the bootstrap interval."""
        if self.wish.folds is not None:
            return self.valid(candidate).se
        (one,) = self.of(candidate)
        return math.nan if "failed" in one else interval_se(one["valid"], self.unit)

    def choose(self) -> None:
        """By one standard error, or by the lowest mean; DivergenceError when all diverged."""
        means = [self.valid(candidate).mean for candidate in self.tried]
        if not any(math.isfinite(mean) for mean in means):
            raise DivergenceError("every candidate diverged on some fold; lower optimizer.lr, or widen the grid")
        errors = [self.se(candidate) for candidate in self.tried]
        simple = [float(candidate.simplicity) for candidate in self.tried]
        choice = one_standard_error(means, errors, simple)
        if self.wish.rule == "best":
            choice = Choice(choice.best, choice.limit, choice.best)
        self.choice = choice

    def chosen_jobs(self) -> list[Job]:
        """The trainings of the chosen candidate."""
        assert self.choice is not None
        return [job for job in self.jobs if job.candidate is self.tried[self.choice.chosen]]

    def to_json(self, tests: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
        """The whole result."""
        assert self.choice is not None
        rows = []
        for candidate in self.tried:
            valid, error = self.valid(candidate), self.se(candidate)
            ones = self.of(candidate)
            rows.append(
                {
                    "label": candidate.label,
                    "values": dict(candidate.values),
                    "simplicity": candidate.simplicity,
                    "valid": {
                        **valid.to_json(),
                        "values": [value if math.isfinite(value) else None for value in valid.values],
                        "se": error if math.isfinite(error) else None,
                    },
                    "best_steps": [one.get("best_step") for one in ones],
                    "curves": [one.get("curve") for one in ones],
                    "failed": [one["failed"] for one in ones if "failed" in one],
                    "runs": [one["name"] for one in ones],
                }
            )
        held = [tests[job.name] for job in self.chosen_jobs()]
        whole = [one for one in held if one is not None]
        return {
            "format": FORMAT,
            "way": self.way,
            "way_is": grid.WAYS[self.way],
            "folds": self.wish.folds,
            "checkpoint": self.wish.checkpoint,
            "unit": self.unit,
            "grid": [{"key": axis.key, "values": list(axis.values)} for axis in self.wish.axes],
            "rule": self.wish.rule,
            "candidates": rows,
            "best": self.tried[self.choice.best].label,
            "limit": self.choice.limit,
            "chosen": self.tried[self.choice.chosen].label,
            "test": test_of(whole) if len(whole) == len(held) else None,
            "test_se_is": "over folds" if self.wish.folds is not None else "over the test split's records or documents",
            "warnings": list(self.warnings),
        }


_BELOW = {
    "bits_per_byte": "bytes",
    "bits_per_dim": "symbols",
    "nats_per_record": "records",
    "nats_per_symbol": "symbols",
}
"""What each unit is divided by."""


def test_of(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every figure that all folds have, and the ratio of their sums where that is one."""
    out: dict[str, Any] = {}
    for key in (*UNITS, "perplexity", "log_likelihood", "log_likelihood_data_units"):
        values = [result.get(key) for result in results]
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(results):
            continue
        out[key] = Spread(tuple(numbers)).to_json()
        if len(results) == 1 and key in UNITS and math.isfinite(error := interval_se(results[0], key)):
            out[key]["se"] = error
        if below := _BELOW.get(key):  # the mean of all held-out data together
            weights = [result[below] for result in results]
            out[key]["pooled"] = math.fsum(map(operator.mul, weights, numbers)) / sum(weights)
    return out


def interval_se(result: Mapping[str, Any], unit: str) -> float:
    """The standard error that belongs to a 95 % bootstrap interval: half its width / Student's quantile."""
    interval = result.get("interval") or {}
    bounds = interval.get(unit)
    if not bounds or None in bounds:
        return math.nan
    return float((bounds[1] - bounds[0]) / 2 / student_quantile(0.975, interval["groups"] - 1))


def curves(result: Mapping[str, Any], label: str) -> list[Curve]:
    """The learning curves of a candidate, a fold each."""
    (row,) = [row for row in result["candidates"] if row["label"] == label]
    return [Curve.from_json(one) for one in row["curves"] if one]
