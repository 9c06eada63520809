"""The command line as a person uses it, on a tiny run."""

import json
import math
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from lmtrain.config import build, read_yaml
from lmtrain.schema import RunConfig, load
from tests.house import config, lmtrain


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run to play with."""
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "run")
    return tmp_path / "run"


def test_train_makes_a_run_folder_that_holds_everything(trained):
    folder = trained / "runs" / "tiny"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6]
    stored = build(RunConfig, read_yaml(folder / "config.yaml"), where="stored")
    assert stored == load(trained / "tiny.yaml")
    assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"step-00000006"}


def test_eval_equals_the_last_evaluation_of_the_loop(trained):
    folder = trained / "runs" / "tiny"
    ran = lmtrain("eval", folder, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)["valid"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    in_loop = [row for row in rows if row["kind"] == "eval"][-1]
    assert math.isclose(result["perplexity"], in_loop["eval/valid/perplexity"], rel_tol=1e-6)
    assert result["mode"] == "window"
    assert result["context"] == 16


def test_eval_of_a_file_counts_its_true_bytes(run, tmp_path):
    raw = "ein Stück Text\n".encode() * 7
    (tmp_path / "piece.txt").write_bytes(raw)
    ran = lmtrain("eval", run, "--data", tmp_path / "piece.txt", "--json", "--set", "eval.batch=3")
    assert ran.code == 0, ran.err
    (result,) = json.loads(ran.out).values()
    assert result["bytes"] == len(raw)
    assert result["symbols"] == len(raw) + 1
    assert math.isclose(result["bits_per_byte"], result["nats"] / math.log(2) / len(raw), rel_tol=1e-9)


def test_eval_for_people_says_how(run):
    ran = lmtrain("eval", run, "--split", "test", "--set", "eval.mode=sliding", "--set", "eval.stride=4")
    assert ran.code == 0, ran.err
    for part in ("mode sliding", "context 16", "stride 4", "bits per byte", "perplexity"):
        assert part in ran.out


def test_the_same_seed_gives_the_same_samples(run):
    first = json.loads(lmtrain("sample", run, "-n", 3, "--max-symbols", 40, "--seed", 5, "--json").out)
    again = json.loads(lmtrain("sample", run, "-n", 3, "--max-symbols", 40, "--seed", 5, "--json").out)
    other = json.loads(lmtrain("sample", run, "-n", 3, "--max-symbols", 40, "--seed", 6, "--json").out)
    assert first == again
    assert first != other
    assert all(one["log_prob"] < 0 for one in first)


def test_sampling_goes_on_from_a_prompt_and_streams(run, tmp_path):
    ran = lmtrain("sample", run, "--prompt", "a model", "--max-symbols", 20, "--temperature", 0, "--log-prob")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("a model")
    assert "log p = -" in ran.out
    (tmp_path / "prompt.txt").write_text("a model")
    from_file = lmtrain(
        "sample", run, "--prompt-file", tmp_path / "prompt.txt", "--max-symbols", 20, "--temperature", 0
    )
    assert ran.out.startswith(from_file.out.rstrip("\n"))


def test_checkpoints_are_listed_verified_and_exported(run, tmp_path):
    rows = json.loads(lmtrain("checkpoint", "list", run, "--json").out)
    assert [row["step"] for row in rows][-1] == 6
    assert all(row["problem"] is None for row in rows)
    assert lmtrain("checkpoint", "verify", run).code == 0
    ran = lmtrain("checkpoint", "export", run, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) > 1000
    damaged = next((run / "checkpoints" / "step-00000006").glob("*.safetensors"))
    raw = bytearray(damaged.read_bytes())
    raw[-5] ^= 1
    damaged.write_bytes(raw)
    ran = lmtrain("checkpoint", "verify", run)
    assert ran.code == 4
    assert damaged.name in ran.out


@pytest.mark.slow
def test_going_on_from_every_step_ends_in_the_same_numbers(trained, tmp_path):
    """What was killed after step k and started again ends as the run that was never interrupted, to the last bit."""
    whole = {row["step"]: row for row in _rows(trained / "runs" / "tiny")}
    path = config(tmp_path, data={"corpus": str(trained / "corpus")})
    for stop in (1, 3, 5):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        (tmp_path / "runs" / "tiny").mkdir(parents=True)
        ran = lmtrain("train", path, f"train.steps={stop}", "schedule.kind=constant", "schedule.warmup=0")
        assert ran.code == 0, ran.err
        ran = lmtrain("train", path, "schedule.kind=constant", "schedule.warmup=0")
        assert ran.code == 0, ran.err
        parts = {row["step"]: row for row in _rows(tmp_path / "runs" / "tiny")}
        assert [row["batch"] for row in parts.values()] == [row["batch"] for row in whole.values()]
        if stop == 1:
            reference = {step: row["train/loss"] for step, row in parts.items()}
        assert {step: row["train/loss"] for step, row in parts.items()} == reference


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def test_config_prints_a_valid_config_and_the_deepspeed_json(trained, tmp_path):
    ran = lmtrain("config", trained / "tiny.yaml", "optimizer.lr=5e-4")
    assert ran.code == 0, ran.err
    (tmp_path / "again.yaml").write_text(ran.out)
    assert lmtrain("config", tmp_path / "again.yaml").out == ran.out
    assert yaml.safe_load(ran.out)["optimizer"]["lr"] == 5e-4
    ran = lmtrain("config", trained / "tiny.yaml", "engine.kind=zero", "--deepspeed", "--world", 2)
    generated = json.loads(ran.out)
    assert generated["train_batch_size"] == 4
    assert generated["train_micro_batch_size_per_gpu"] == 2
    assert lmtrain("config", trained / "tiny.yaml", "--deepspeed").code == 7


def test_prepare_is_done_once(trained):
    ran = lmtrain("prepare", trained / "tiny.yaml", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["reused"] is True
    assert report["counts"]["train"]["documents"] > 10


def test_a_tokenizer_of_its_own(trained, tmp_path):
    ran = lmtrain(
        "tokenizer",
        "train",
        trained / "tiny.yaml",
        "prepare.tokenizer.kind=characters",
        "--out",
        tmp_path / "t",
        "--json",
    )
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["kind"] == "characters"


def test_the_launchers_local_rank_stands_before_the_verb(trained):
    assert lmtrain("--local_rank=0", "config", trained / "tiny.yaml").code == 0
    assert lmtrain("--version").out.strip()


def test_a_used_folder_is_not_started_afresh(trained):
    ran = lmtrain("train", trained / "tiny.yaml", "run.resume=never")
    assert ran.code == 2
    assert "was used before" in ran.err
