"""The loop with parts made by hand: what it calls, when, and what it remembers."""

import dataclasses
import math

import pytest
import torch

from lmtrain.config import build
from lmtrain.errors import ConfigError, DivergenceError
from lmtrain.protocol import Batch, Cond, Score, StepReport
from lmtrain.train import Parts, Progress, TrainConfig, digest, ending, train


class Engine:
    rank, world, communicated = 0, 1, 0.0

    def __init__(self, bad=()):
        self.bad, self.steps, self.others_say = set(bad), [], 0

    def agree(self, flag):
        return max(flag, self.others_say)

    def step(self, batches, *, total_weight, lr, step):
        self.steps.append((step, lr, total_weight))
        self.communicated += 0.25
        return StepReport(
            nats=2.0 * total_weight, weight=total_weight, grad_norm=1.0, applied=step not in self.bad, loss_scale=1.0
        )


class Source:
    def batch(self, step, rank, world):
        x = torch.full((2, 3), step)
        return [Batch(x_BT=x, weight_BT=torch.ones(2, 3), cond=Cond(start_B=torch.zeros(2, dtype=torch.long)))]

    def total_weight(self, step):
        return 6.0


class Held:
    def __init__(self, nats):
        self.score = Score(nats=nats, symbols=1.0)


class Diary:
    """Store, watcher and stops in one: writes down what it is told."""

    def __init__(self, stop_at=None):
        self.rows, self.evals, self.saves, self.alerts, self.preempted = [], [], [], [], 0
        self.waits, self.attended = [], []
        self.stop_at = stop_at

    def log_step(self, record):
        self.rows.append(dict(record))

    def log_eval(self, name, result, *, step, tokens):
        self.evals.append((name, step, tokens))

    def alert(self, title, text):
        self.alerts.append(text)

    def preempting(self):
        self.preempted += 1

    def save(self, engine, *, step, state, best=False, wait=True):
        self.saves.append((step, best, state["progress"]))
        self.waits.append(wait)

    def attend(self, engine, *, wait=False):
        self.attended.append((len(self.rows), wait))

    def requested(self, engine):
        return "SIGTERM" if self.stop_at is not None and len(self.rows) >= self.stop_at else None


def parts(diary, *, steps=10, bad=(), values=(), rate=lambda step: 0.1 * step):
    values = iter(values)
    return Parts(
        engine=Engine(bad),
        source=Source(),
        rate=rate,
        evaluate=lambda: {"valid": Held(next(values, 1.0))},
        store=diary,
        watcher=diary,
        stops=diary,
        steps=steps,
        state={"identity": "i"},
    )


def test_a_run_steps_logs_evaluates_and_saves():
    diary = Diary()
    made = parts(diary, values=[3.0, 4.0, 2.0])
    progress, reason = train(made, TrainConfig(steps=10, eval_every=4, save_every=3), Progress())
    assert reason is None
    assert [step for step, _, _ in made.engine.steps] == list(range(10))
    assert [lr for _, lr, _ in made.engine.steps] == [0.1 * step for step in range(10)]
    assert [row["step"] for row in diary.rows] == list(range(1, 11))
    assert diary.evals == [("valid", 4, 24), ("valid", 8, 48), ("valid", 10, 60)]
    # every third step, whenever the held-out value improves (4, 10), and at the end
    assert [(step, best) for step, best, _ in diary.saves] == [
        (3, False),
        (4, True),
        (6, False),
        (9, False),
        (10, True),
    ]
    assert progress == Progress(step=10, tokens=60, best=2.0, best_step=10, bar=2.0)
    assert Progress(**diary.saves[-1][2]) == progress
    assert all(row["loss"] == 2.0 for row in diary.rows)


def test_every_boundary_sees_to_the_save_on_its_way_and_the_last_one_is_waited_for():
    diary = Diary()
    train(parts(diary, values=[3.0, 4.0, 2.0]), TrainConfig(steps=10, eval_every=4, save_every=3), Progress())
    assert diary.waits == [False, False, False, False, True]
    assert diary.attended == [(step, False) for step in (1, 2, 5, 7, 8)]
    diary = Diary(stop_at=6)
    train(parts(diary), TrainConfig(steps=10, save_every=3), Progress())
    assert [step for step, _, _ in diary.saves] == [3, 6]
    assert diary.waits == [False, True]
    diary = Diary()
    with pytest.raises(DivergenceError):
        train(parts(diary, bad={2, 3}), TrainConfig(steps=10, max_skipped=2), Progress())
    assert diary.attended == [(1, False), (2, False), (3, False), (4, True)]


def test_observers_come_last_in_a_step_and_see_its_record():
    diary, seen = Diary(stop_at=4), []

    def observe(engine, record):
        seen.append((record["step"], record["communication"], len(diary.rows), len(diary.saves)))

    made = dataclasses.replace(parts(diary), observers=(observe, observe))
    train(made, TrainConfig(steps=10, save_every=2), Progress())
    assert seen == [(1, 0.25, 1, 0)] * 2 + [(2, 0.25, 2, 1)] * 2 + [(3, 0.25, 3, 1)] * 2, "not after a stop"


def test_going_on_from_progress_does_the_rest():
    diary = Diary()
    made = parts(diary)
    train(made, TrainConfig(steps=10), Progress(step=7, tokens=42, best=0.5, best_step=3))
    assert [step for step, _, _ in made.engine.steps] == [7, 8, 9]
    assert diary.rows[-1]["tokens"] == 60
    assert diary.saves[-1][:2] == (10, False)


def test_a_finished_run_does_nothing():
    diary = Diary()
    progress, reason = train(parts(diary), TrainConfig(steps=10), Progress(step=10))
    assert (progress.step, reason, diary.rows, diary.saves) == (10, None, [], [])


def test_a_request_to_stop_saves_at_the_step_boundary():
    diary = Diary(stop_at=4)
    progress, reason = train(parts(diary), TrainConfig(steps=10), Progress())
    assert (progress.step, reason, diary.preempted) == (4, "SIGTERM", 1)
    assert [step for step, _, _ in diary.saves] == [4]


def test_a_request_at_the_last_step_is_no_stop():
    diary = Diary(stop_at=10)
    assert train(parts(diary), TrainConfig(steps=10), Progress())[1] is None


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    diary = Diary()
    progress, _ = train(parts(diary, bad={2, 3, 6}), TrainConfig(steps=10, max_skipped=3), Progress())
    assert (progress.skipped, progress.skipped_in_a_row) == (3, 0)
    diary = Diary()
    with pytest.raises(DivergenceError, match="3 steps in a row up to step 6"):
        train(parts(diary, bad={3, 4, 5}), TrainConfig(steps=10, max_skipped=3), Progress())
    assert diary.alerts
    assert diary.saves == []


def test_a_non_finite_held_out_value_is_never_the_best():
    diary = Diary()
    progress, _ = train(parts(diary, values=[math.nan]), TrainConfig(steps=2), Progress())
    assert progress.best is None
    assert diary.saves[-1][1] is False


@pytest.mark.parametrize(
    ("values", "min_delta", "stale", "bar", "best"),
    [
        ([], 0.0, [], None, None),
        ([3.0, 2.0, 1.0], 0.0, [0, 0, 0], 1.0, 1.0),
        ([1.0, 1.0, 2.0, 0.5], 0.0, [0, 1, 2, 0], 0.5, 0.5),  # equal is not better
        ([1.0, 0.75, 0.5, 0.25], 0.25, [0, 1, 0, 1], 0.5, 0.25),  # small steps add up; exactly min_delta is not more
        ([1.0, 0.9, 0.95, 0.85], 1.0, [0, 1, 2, 3], 1.0, 0.85),  # the best is the lowest all the same
        ([math.nan, math.inf, 2.0, math.nan, -math.inf], 0.0, [1, 2, 0, 1, 2], 2.0, 2.0),
    ],
)
def test_the_rule_of_patience(values, min_delta, stale, bar, best):
    at, seen = Progress(), []
    for step, value in enumerate(values, start=1):
        at = dataclasses.replace(at, step=step).judge(value, min_delta=min_delta)
        seen.append(at.stale)
    assert (seen, at.bar, at.best) == (stale, bar, best)
    assert at.best_step == (values.index(best) + 1 if best is not None else None)
    for patience in (1, 2, 3):
        assert TrainConfig(steps=9, eval_every=1, patience=patience).out_of_patience(at) == (at.stale >= patience)
    assert not TrainConfig(steps=9).out_of_patience(at)


FALLING = [5.0, 4.0, 4.5, 3.9, 3.95, 4.2, 3.9, 1.0, 0.5, 0.4]
"""With a patience of 3, one evaluation every 2 steps: the best at step 8, the end at step 14."""
PATIENT = TrainConfig(steps=20, eval_every=2, save_every=3, patience=3)


def test_patience_ends_a_run_and_says_so():
    diary = Diary(stop_at=14)  # who asks for a stop at the step where it ends anyway gets the end
    progress, reason = train(parts(diary, steps=20, values=FALLING), PATIENT, Progress())
    assert (progress.step, reason, diary.preempted) == (14, None, 0)
    assert (progress.best, progress.best_step, progress.stale) == (3.9, 8, 3)
    assert diary.evals[-1] == ("valid", 14, 84)
    assert diary.saves[-1] == (14, False, progress.to_json())
    assert diary.waits[-1], "what a run ends with is on disk"
    text = ending(PATIENT, progress, steps=20, judge="valid")
    assert text == "early at step 14: valid not better in 3 evaluations (best 3.9000 at step 8)"
    assert ending(PATIENT, progress, steps=14, judge="valid") is None, "that was its length"
    assert ending(PATIENT, Progress(step=3), steps=20, judge="valid") is None
    more = PATIENT.model_copy(update={"min_delta": 0.01})
    never = Progress(step=6, stale=3)
    assert "not better by more than 0.01 in 3 evaluations (it was never finite)" in str(
        ending(more, never, steps=20, judge="valid")
    )


@pytest.mark.parametrize("stop", range(1, 14))
def test_an_interrupted_run_counts_on(stop):
    """Asked to stop after any step and started again, it ends where the other does; a third start does nothing."""
    first = Diary(stop_at=stop)
    _, reason = train(parts(first, steps=20, values=FALLING), PATIENT, Progress())
    assert reason == "SIGTERM"
    step, _, saved = first.saves[-1]
    assert step == stop
    second = Diary()
    progress, reason = train(parts(second, steps=20, values=FALLING[stop // 2 :]), PATIENT, Progress(**saved))
    assert (progress.step, progress.best_step, progress.stale, reason) == (14, 8, 3, None)
    assert first.evals + second.evals == [("valid", s, 6 * s) for s in range(2, 15, 2)]
    third = Diary()
    assert train(parts(third, steps=20), PATIENT, Progress(**second.saves[-1][2])) == (progress, None)
    assert third.rows == third.saves == []
    longer = PATIENT.model_copy(update={"patience": 4})
    assert train(parts(third, steps=20, values=[9.0]), longer, progress)[0].step == 16, "more patience, more steps"


def test_one_rank_that_has_enough_ends_it_for_all():
    diary = Diary()
    made = parts(diary, steps=20, values=FALLING)
    made.engine.others_say = 1
    assert train(made, PATIENT, Progress())[0].step == 2


def test_the_digest_sees_every_symbol():
    batches = Source().batch(3, 0, 1)
    before = digest(batches)
    batches[0].x_BT[1, 2] += 1
    assert digest(batches) != before


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"steps": 1, "tokens": 1},
        {"steps": 0},
        {"steps": 1, "max_skipped": 0},
        {"steps": 1, "patience": 2},
        {"steps": 1, "patience": 0, "eval_every": 1},
        {"steps": 1, "min_delta": 0.1, "eval_every": 1},
    ],
)
def test_bad_lengths(tree):
    with pytest.raises(ConfigError):
        build(TrainConfig, tree, where="test")


def test_tokens_are_rounded_up_to_whole_steps():
    assert TrainConfig(tokens=100).length(30) == 4
    assert TrainConfig(tokens=90).length(30) == 3
