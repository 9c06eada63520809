"""What the tracker writes and what it tells W&B before any W&B process is there. The process itself: test_wandb.py."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmtrain import follower, schema, stopping, tracker
from lmtrain.config import build
from lmtrain.console import Console
from lmtrain.errors import ConfigError, DivergenceError
from lmtrain.follower import REMOVED, resolve_mode, scrub, secrets_in, wandb_key
from lmtrain.hardware import MEASURED, Peak
from lmtrain.journal import METRICS, read
from lmtrain.protocol import Score
from lmtrain.tracker import IDENTITY, Tracker, WandbConfig, environment_settings


@dataclass(frozen=True)
class Result:
    score: Score
    mode: str = "window"
    context: int = 64
    interval: tuple[float, float] | None = (1.0, 2.0)
    kl: float | None = 0.25


class OfReals(Result):
    perplexity = None


def record(step: int, *, steps: int = 100, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "steps": steps,
        "tokens": 100 * step,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "applied": True,
        "skipped": 0,
        "loss_scale": 1.0,
        "batch": f"{step:08x}",
        "step_tokens": 100.0,
        "step_seconds": 0.1,
        "data_wait": 0.01,
    }
    return {**row, **changes}


def make(folder: Path, *, rank: int = 0, out: io.StringIO | None = None, **start: Any) -> Tracker:
    tracker = Tracker(folder, WandbConfig(), rank=rank, environment={}, console=Console(file=out or io.StringIO()))
    tracker.start(**{"step": 0, "steps": 100, "config": {}, "facts": {}, **start})
    return tracker


SAVE: dict[str, Any] = {
    "step": 1,
    "best": True,
    "background": True,
    "bytes": 5_000_000,
    "seconds": 2.0,
    "blocked": 0.25,
    "writing": 1.25,
    "failed": None,
}


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read(folder / METRICS) if row["kind"] == kind]


def test_a_row_is_total_nats_over_total_weight_of_its_steps(tmp_path: Path) -> None:
    log = make(tmp_path, log_every=3, flops_per_symbol=1e6, peak=Peak(4e9, MEASURED), bytes_per_symbol=4.0)
    losses, weights = [3.0, 2.0, 7.0], [100.0, 300.0, 1.0]
    for step, (loss, weight) in enumerate(zip(losses, weights, strict=True), 1):
        log.log_step(record(step, loss=loss, step_tokens=weight, step_seconds=0.2, data_wait=0.05))
    (row,) = rows(tmp_path, "train")
    mean = (300 + 600 + 7) / 401
    assert row["train/loss"] == pytest.approx(mean, rel=1e-12)
    assert row["train/loss"] != pytest.approx(sum(losses) / 3)
    assert row["train/bits_per_byte"] == pytest.approx(mean / math.log(2) / 4.0)
    assert row["perf/tokens_per_s"] == pytest.approx(401 / 0.6)
    assert row["perf/mfu"] == pytest.approx(401 / 0.6 * 1e6 / 4e9)
    assert row["perf/data_wait"] == pytest.approx(0.25)
    assert row["perf/step_seconds"] == pytest.approx(0.2)
    assert (row["step"], row["train/tokens"], row["batch"]) == (3, 300, "00000003")
    log.finish()


def test_saves_and_loads_have_their_rates_and_a_failed_one_is_an_alert(tmp_path: Path) -> None:
    out = io.StringIO()
    log = make(tmp_path, out=out)
    log.log_load({"step": 0, "bytes": 3_000_000, "seconds": 0.5})
    log.log_save(SAVE)
    log.log_save({**SAVE, "step": 2, "bytes": 0, "writing": 0.0, "failed": "disk full"})
    (load,) = rows(tmp_path, "load")
    assert (load["perf/load_mb_per_s"], load["perf/load_seconds"], load["bytes"]) == (6.0, 0.5, 3_000_000)
    good, bad = rows(tmp_path, "save")
    assert (good["perf/save_mb_per_s"], good["perf/save_seconds"], good["perf/save_blocked"]) == (4.0, 2.0, 0.25)
    assert (good["step"], good["best"], good["background"], good["failed"]) == (1, True, True, None)
    assert (bad["step"], bad["failed"]) == (2, "disk full")
    assert "perf/save_mb_per_s" not in bad
    assert [row["text"] for row in rows(tmp_path, "alert")] == ["disk full"]
    assert "disk full" in out.getvalue()
    log.finish()


def test_a_row_of_one_step_has_its_loss_to_the_last_bit(tmp_path: Path) -> None:
    log = make(tmp_path)
    losses = [math.pi / k for k in range(1, 60)]
    for step, loss in enumerate(losses, 1):
        log.log_step(record(step, loss=loss, step_tokens=97.0))
    assert [row["train/loss"] for row in rows(tmp_path, "train")] == losses
    assert "perf/mfu" not in rows(tmp_path, "train")[0]
    log.finish()


def test_a_skipped_step_gets_its_row_at_once_and_does_not_count(tmp_path: Path) -> None:
    log = make(tmp_path, log_every=10)
    log.log_step(record(1, loss=2.0))
    log.log_step(record(2, loss=math.nan, grad_norm=math.inf, applied=False, skipped=1))
    log.log_step(record(3, loss=math.nan, applied=False, skipped=2))
    first, second = rows(tmp_path, "train")
    assert (first["step"], first["train/loss"], first["train/grad_norm"], first["train/skipped"]) == (2, 2.0, None, 1)
    assert (second["step"], second["train/loss"], second["train/skipped"]) == (3, None, 2)
    log.finish()


def test_the_last_step_has_a_row(tmp_path: Path) -> None:
    log = make(tmp_path, steps=7, log_every=5)
    for step in range(1, 8):
        log.log_step(record(step, steps=7))
    assert [row["step"] for row in rows(tmp_path, "train")] == [5, 7]
    log.finish()


def test_eta_is_the_time_of_the_steps_that_are_left(tmp_path: Path) -> None:
    out = io.StringIO()
    log = make(tmp_path, out=out)
    log.log_step(record(40, step_seconds=2.0))
    assert "ETA 2m 00s" in out.getvalue()
    log.finish()


def test_a_held_out_result_has_its_documented_names(tmp_path: Path) -> None:
    log = make(tmp_path)
    log.log_eval("valid", Result(Score(nats=200.0, symbols=100.0, words=20.0, bytes=400.0)), step=5, tokens=500)
    log.log_eval("digits", Result(Score(nats=64.0, symbols=64.0, dims=64.0), mode="row"), step=5, tokens=500)
    log.log_eval("wine", OfReals(Score(nats=-13.0, symbols=130.0), mode="row"), step=5, tokens=500)
    text, image, reals = rows(tmp_path, "eval")
    assert {key for key in reals if key.startswith("eval/")} == {"eval/wine/loss", "eval/wine/kl"}
    assert text["eval/valid/kl"] == 0.25
    assert text["eval/valid/loss"] == 2.0
    assert text["eval/valid/perplexity"] == pytest.approx(math.exp(2.0))
    assert text["eval/valid/word_perplexity"] == pytest.approx(math.exp(10.0))
    assert text["eval/valid/bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert "eval/valid/bits_per_dim" not in text
    assert (text["mode"], text["context"], text["interval"], text["train/tokens"]) == ("window", 64, [1.0, 2.0], 500)
    assert text["score"]["nats"] == 200.0
    assert image["eval/digits/bits_per_dim"] == pytest.approx(1 / math.log(2))
    assert "eval/digits/bits_per_byte" not in image
    log.finish()


def test_other_ranks_are_silent_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    log = Tracker(folder, WandbConfig(project="p", mode="online"), rank=1, environment={"WANDB_API_KEY": "k" * 40})
    with log:
        log.start(step=0, steps=5, config={}, facts={})
        log.log_step(record(1))
        log.log_eval("valid", Result(Score(1, 1)), step=1, tokens=1)
        log.samples(["text"], [["x"]], step=1)
        log.alert("a", "b")
        log.preempting()
        log.finish()
    assert not folder.exists()
    assert capsys.readouterr() == ("", "")


def test_events_are_rows_and_the_end_is_written_once(tmp_path: Path) -> None:
    log = make(tmp_path, facts={"commit": "abc", "hashes": {"corpus": "00"}})
    log.log_step(record(4))
    log.samples(["text", "nats"], [["to be", 1.5]], step=4)
    log.alert("training diverged", "lower the rate")
    log.preempting()
    log.finish(stopped="SIGTERM", summary={"best": 1.25, "best_step": 4})
    log.finish()
    log.log_step(record(5))
    assert [row["kind"] for row in read(tmp_path / METRICS)] == [
        "start", "train", "samples", "alert", "preempting", "finish",
    ]  # fmt: skip
    end = rows(tmp_path, "finish")[0]
    assert (end["step"], end["exit_code"], end["stopped"], end["summary"]["best"]) == (4, 75, "SIGTERM", 1.25)
    assert rows(tmp_path, "start")[0]["facts"] == {"commit": "abc", "hashes": {"corpus": "00"}}


@pytest.mark.parametrize(("error", "code"), [(DivergenceError("nan"), 6), (RuntimeError("bug"), 1)])
def test_an_exception_ends_the_run_with_its_exit_code(tmp_path: Path, error: Exception, code: int) -> None:
    def run() -> None:
        with make(tmp_path) as log:
            log.log_step(record(1))
            raise error

    with pytest.raises(type(error)):
        run()
    assert rows(tmp_path, "finish")[0]["exit_code"] == code


def test_resuming_gives_each_step_one_row(tmp_path: Path) -> None:
    log = make(tmp_path, log_every=2)
    for step in range(1, 12):
        log.log_step(record(step))
    log.log_eval("valid", Result(Score(1, 1)), step=10, tokens=1000)
    again = make(tmp_path, step=8, log_every=2)  # the first one was killed
    for step in range(9, 13):
        again.log_step(record(step))
    again.log_eval("valid", Result(Score(1, 1)), step=10, tokens=1000)
    again.finish()
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows(tmp_path, "eval")] == [10]
    assert [row["step"] for row in rows(tmp_path, "start")] == [0, 8]


# ----------------------------------------------------------------------------------------- settings of W&B

KEY = {"WANDB_API_KEY": "0123456789" * 4}


def test_the_standard_variables_are_the_wandb_section() -> None:
    environment = {
        "WANDB_PROJECT": "p",
        "WANDB_ENTITY": "e",
        "WANDB_NAME": "n",
        "WANDB_RUN_GROUP": "g",
        "WANDB_TAGS": "a, b,,c",
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": "http://x",
        "HOME": "/",
    }
    tree = environment_settings(environment)
    assert tree == {
        "project": "p", "entity": "e", "name": "n", "group": "g", "tags": ["a", "b", "c"], "mode": "offline",
    }  # fmt: skip
    assert build(WandbConfig, tree, where="environment").tags == ("a", "b", "c")
    assert environment_settings({}) == {}
    assert environment_settings({"WANDB_PROJECT": "", "WANDB_MODE": ""}) == {}
    assert environment_settings({"WANDB_MODE": "dryrun"}) == {"mode": "offline"}
    assert environment_settings({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}) == {"mode": "disabled"}
    with pytest.raises(ConfigError, match="WANDB_MODE = 'shared'; wanted online"):
        environment_settings({"WANDB_MODE": "shared"})


def test_an_override_beats_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("data: {corpus: c, context: 8, global_batch: 4}\nwandb: {project: file, group: file, name: file}\n")
    environment = {"WANDB_PROJECT": "variable", "WANDB_RUN_GROUP": "variable"}
    config = schema.load(path, ["wandb.project=override"], environment=environment).wandb
    assert (config.project, config.group, config.name) == ("override", "variable", "file")
    assert schema.load(path).wandb.project == "file"
    path.write_text("data: {corpus: c, context: 8, global_batch: 4}\n")
    assert schema.load(path, environment=environment).wandb.project == "variable"
    path.write_text("data: {corpus: c, context: 8, global_batch: 4}\nwandb: online\n")
    with pytest.raises(ConfigError, match="wandb"):
        schema.load(path, environment=environment)


@pytest.mark.parametrize(
    ("config", "environment", "mode"),
    [
        ({}, {}, "disabled"),
        ({}, KEY, "disabled"),
        ({}, {**KEY, "WANDB_SWEEP_ID": "s"}, "online"),
        ({"project": "p"}, KEY, "online"),
        ({"project": "p"}, {}, "offline"),
        ({"mode": "online"}, {}, "offline"),
        ({"mode": "online"}, KEY, "online"),
        ({"mode": "offline", "project": "p"}, KEY, "offline"),
        ({"mode": "disabled", "project": "p"}, KEY, "disabled"),
    ],
)
def test_the_mode(config: dict[str, Any], environment: dict[str, str], mode: str, tmp_path: Path) -> None:
    assert resolve_mode(WandbConfig(**config), {"HOME": str(tmp_path), **environment}) == mode


def test_a_key_is_found_where_wandb_finds_it_and_is_never_told(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert wandb_key(home) is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password hunter2hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_key(home) == str(tmp_path / ".netrc")
    assert wandb_key({**home, "WANDB_BASE_URL": "https://wandb.example.org:8080"}) is None
    assert wandb_key({**home, **KEY}) == "WANDB_API_KEY"
    assert wandb_key({**home, "NETRC": str(tmp_path / "none")}) is None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user what is this\n")
    assert wandb_key(home) is None


def test_the_config_has_no_place_for_a_key() -> None:
    with pytest.raises(ConfigError, match="unknown key 'api_key'"):
        build(WandbConfig, {"api_key": "0123456789" * 4}, where="x.yaml")


def test_secrets_are_taken_out_of_what_is_sent() -> None:
    environment = {
        **KEY,
        "HF_TOKEN": "hf_abcdefgh",
        "DB_PASSWORD": "correcthorse",
        "MY_KEY": "ab",
        "TOKENIZERS": "false",
    }
    secrets = secrets_in(environment)
    assert secrets == {KEY["WANDB_API_KEY"], "hf_abcdefgh", "correcthorse"}
    tree = {
        "train": {"tokens": 5, "seed": 1},
        "prepare": {"tokenizer": {"kind": "bytes"}, "url": "https://me:pw12@host/x?t=hf_abcdefgh", "token": "abc"},
        "list": ["correcthorse battery", ("x", 1.5)],
        "api_key": "z",
        "apikey": None,
    }
    assert scrub(tree, secrets) == {
        "train": {"tokens": 5, "seed": 1},
        "prepare": {
            "tokenizer": {"kind": "bytes"},
            "url": f"https://me:{REMOVED}@host/x?t={REMOVED}",
            "token": REMOVED,
        },
        "list": [f"{REMOVED} battery", ["x", 1.5]],
        "api_key": REMOVED,
        "apikey": None,
    }


def job(folder: Path, environment: Mapping[str, str], **config: Any) -> dict[str, Any]:
    return follower.job(folder, WandbConfig(**config), environment, offset=0)


def test_the_id_lives_in_the_run_folder(tmp_path: Path) -> None:
    first = job(tmp_path, {})
    assert json.loads((tmp_path / IDENTITY).read_text()) == {"id": first["id"]}
    assert job(tmp_path, {})["id"] == first["id"]
    assert job(tmp_path / "other", {})["id"] != first["id"]
    assert job(tmp_path, {"WANDB_RUN_ID": "mine"})["id"] == "mine"
    assert job(tmp_path, {})["id"] == "mine"
    for torn in ("", "{", "[]", "{}"):
        (tmp_path / IDENTITY).write_text(torn)
        fresh = job(tmp_path, {})["id"]
        assert fresh
        assert json.loads((tmp_path / IDENTITY).read_text()) == {"id": fresh}


def test_what_the_process_is_told(tmp_path: Path) -> None:
    told = job(tmp_path / "my-run", {})
    assert (told["name"], told["project"], told["tags"]) == ("my-run", "lmtrain", None)
    assert told["dir"] == str(tmp_path / "my-run")
    assert told["settings"]["console"] == "off"
    told = job(tmp_path, {"WANDB_CONSOLE": "wrap", "WANDB_DIR": "/x"}, name="n", tags=("t",), timeout=7)
    assert "console" not in told["settings"]  # the library reads the variable itself
    assert told["dir"] is None
    assert (told["name"], told["tags"]) == ("n", ["t"])
    assert told["settings"]["finish_timeout"] == 7


def test_stop_has_one_name() -> None:
    assert tracker.STOP_FILE == stopping.STOP_FILE
