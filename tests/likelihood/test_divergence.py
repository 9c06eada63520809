"""A run against the source of its corpus, and against another run: enumeration, evaluator and samples agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.house import config, lmtrain, texts

ISING = {"kind": "ising", "size": [3, 3], "coupling": 0.4, "field": 0.2, "records": 3000}


def trained(folder: Path, source: dict[str, Any], model: dict[str, Any], name: str = "tiny", **train: Any) -> Path:
    path = config(
        folder,
        train={"steps": 30, "eval_every": 15, "save_every": 0, "samples": 0, **train},
        optimizer={"kind": "adamw", "lr": 0.02, "weight_decay": 0.0},
    )
    keys = [
        f"model={json.dumps(model)}",
        "prepare.tokenizer={}",
        "prepare.split={}",
        f"prepare.source={json.dumps(source)}",
        "data.context=null",
    ]
    ran = lmtrain("train", path, *keys, "data.global_batch=64", f"run.name={name}")
    assert ran.code == 0, ran.err
    return folder / "runs" / name


def asked(*arguments: object) -> Any:
    ran = lmtrain(*arguments, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_enumeration_evaluator_and_samples_agree(tmp_path: Path) -> None:
    model = {"kind": "fvsbn"}
    run = trained(tmp_path, ISING, model)
    found = asked("divergence", run, "-n", 2000)
    exact, estimates = found["exact"], found["sampled"]
    assert exact["outcomes"] == 512
    assert exact["total_q"] == pytest.approx(1, abs=1e-5)
    assert exact["forward_kl"] > 0.01, "there is something to measure"
    assert found["forward_kl_by_evaluator"] == pytest.approx(exact["forward_kl"], abs=1e-6)
    for name, estimate in estimates.items():
        assert abs(estimate["value"] - exact[name]) < 4 * estimate["error"], name

    # What training and `lmtrain eval` say of held-out records is the same divergence, from those records.
    held = asked("eval", run, "--split", "valid")["valid"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval/valid/kl"] for row in rows if row["kind"] == "eval"][-1] == pytest.approx(held["kl"], abs=1e-7)
    assert held["kl"] == pytest.approx(held["nats_per_record"] - held["source_nats_per_record"], abs=1e-9)
    assert held["source_entropy_per_record"] == pytest.approx(found["entropy"])
    low, high = held["kl_interval"]
    assert low < held["kl"] < high
    assert abs(held["kl"] - exact["forward_kl"]) < 4 * (high - low) / (2 * 1.96)
    capped = asked("eval", run, "--split", "valid", "--set", "eval.max_symbols=900")["valid"]
    assert capped["records"] == 100
    assert abs(capped["kl"] - held["kl"]) < 0.2
    described = lmtrain("eval", run)
    assert "KL(source || model)" in described.out

    other = trained(tmp_path, ISING, model, name="other", steps=5)
    both = asked("divergence", run, other, "-n", 2000)
    back = asked("divergence", other, run, "-n", 0)
    assert both["exact"]["forward_kl"] == pytest.approx(back["exact"]["reverse_kl"], abs=1e-12)
    assert both["exact"]["jensen_shannon"] == pytest.approx(back["exact"]["jensen_shannon"], abs=1e-12)
    assert "sampled" not in back
    for name, estimate in both["sampled"].items():
        assert abs(estimate["value"] - both["exact"][name]) < 4 * estimate["error"], name
    words = lmtrain("divergence", run, other).out
    assert "Hellinger" in words
    assert "from samples" in words


@pytest.mark.slow
def test_two_models_of_text_and_what_has_no_source(tmp_path: Path) -> None:
    texts(tmp_path / "text")
    path = config(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        assert lmtrain("train", path, f"run.name={name}", f"train.seed={seed}", "train.steps=1").code == 0
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    short = asked("divergence", one, two, "--length", 1, "-n", 500)
    assert short["exact"]["outcomes"] == 257
    assert abs(short["sampled"]["forward_kl"]["value"] - short["exact"]["forward_kl"]) < (
        4 * short["sampled"]["forward_kl"]["error"] + 1e-6
    )
    long = asked("divergence", one, two, "--length", 8, "-n", 300)
    assert "exact" not in long
    assert (
        long["sampled"]["forward_kl"]["value"]
        >= short["exact"]["forward_kl"] - 4 * (long["sampled"]["forward_kl"]["error"])
    ), "the chain rule: more symbols tell more"
    for arguments, words in (
        ((one,), "is not known"),
        ((one, two, "--length", 99), "more than the 16 symbols"),
        ((one, two, "--length", 2, "-n", 0), "too many values to be counted out; give -n"),
        ((one, two, "-n", 1), "one sample has no standard error"),
    ):
        ran = lmtrain("divergence", *arguments)
        assert ran.code == 7
        assert words in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "steps", "most"),
    [
        ({"kind": "gpt", "layers": 1, "width": 16, "heads": 2}, 100, 0.08),
        ({"kind": "rnn", "cell": "lstm", "layers": 1, "width": 16, "embed_width": 8}, 100, 0.08),
    ],
    ids=["gpt", "lstm"],
)
def test_training_comes_near_the_entropy_of_a_chain(
    tmp_path: Path, model: dict[str, Any], steps: int, most: float
) -> None:
    """A short training; the long one, to half a per cent, is in benchmarks/RESULTS.md."""
    source = {"kind": "markov", "alphabet": 2, "order": 2, "length": 12, "records": 3000, "seed": 1}
    run = trained(tmp_path, source, model, steps=steps)
    held = asked("eval", run, "--split", "test")["test"]
    assert -0.01 < held["kl"] / held["source_entropy_per_record"] < most
    exact = asked("divergence", run, "-n", 0)
    assert exact["exact"]["outcomes"] == 2**12
    assert exact["forward_kl_by_evaluator"] == pytest.approx(exact["exact"]["forward_kl"], abs=1e-6)
