"""What people get wrong: each gives one clear line on stderr, nothing on stdout, and a non-zero exit code."""

import json
import os
import shutil

import pytest
import yaml

from tests.house import config, lmtrain, texts


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A copy of the finished run's folder, and what the cases need beside it."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(trained / "corpus", folder / "corpus")
    shutil.copytree(trained / "runs", folder / "runs")
    texts(folder / "text", documents=8)
    config(folder)
    stored = folder / "runs" / "tiny" / "config.yaml"
    tree = yaml.safe_load(stored.read_text())
    tree["data"]["corpus"] = str(folder / "corpus")
    stored.write_text(yaml.safe_dump(tree))
    (folder / "empty").mkdir()
    (folder / "broken.yaml").write_text("a: [1,\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "twice.yaml").write_text("data: {corpus: x}\ndata: {corpus: y}\n")
    (folder / "nothing.txt").write_bytes(b"")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (folder / "typo.json").write_text(json.dumps({"zero_optimisation": {"stage": 1}}))
    (folder / "no.json").write_text("{")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "field.jsonl").write_text('{"body": "a"}\n')
    (folder / "foreign").mkdir()
    (folder / "foreign" / "manifest.json").write_text("{}")
    return folder


ZERO = ("engine.kind=zero",)

CASES = [
    # configs
    ("no such config", 2, ["train", "{p}/none.yaml"], "no config file"),
    ("broken yaml", 2, ["train", "{p}/broken.yaml"], "not valid YAML"),
    ("a list for a config", 2, ["train", "{p}/list.yaml"], "holds a list"),
    ("a key twice", 2, ["train", "{p}/twice.yaml"], "is given twice"),
    ("a folder for a config", 2, ["train", "{p}"], "cannot be read"),
    ("unknown section", 2, ["train", "{c}", "optimiser.lr=1"], "did you mean 'optimizer'"),
    ("unknown key", 2, ["train", "{c}", "optimizer.learning_rate=1"], "unknown key"),
    ("unknown model key", 2, ["train", "{c}", "model.layer=1"], "did you mean 'layers'"),
    ("unknown model", 2, ["train", "{c}", "model.kind=gtp"], "did you mean 'gpt'"),
    ("a word for a number", 2, ["train", "{c}", "optimizer.lr=fast"], "optimizer.lr = 'fast'"),
    ("a negative rate", 2, ["train", "{c}", "optimizer.lr=-1"], "greater than 0"),
    ("no steps", 2, ["train", "{c}", "train.steps=null"], "train.steps = None and train.tokens = None"),
    ("steps and tokens", 2, ["train", "{c}", "train.tokens=5"], "exactly one"),
    ("an override without a value", 2, ["train", "{c}", "train.steps"], "key.sub=value"),
    ("an override below a value", 2, ["train", "{c}", "train.steps.x=1"], "is a value"),
    ("heads that do not divide", 2, ["train", "{c}", "model.heads=3"], "heads"),
    ("a path for a run name", 2, ["train", "{c}", "run.name=a/b"], "no folder name"),
    ("a batch that does not divide", 2, ["train", "{c}", "data.micro_batch=3"], "use 3 or 6"),
    ("no context", 2, ["train", "{c}", "data.context=0"], "data.context = 0"),
    ("test while training", 2, ["train", "{c}", "eval.sets=[test]"], "on request"),
    ("a stride without sliding", 2, ["train", "{c}", "eval.stride=3"], "eval.stride"),
    ("one checkpoint kept", 2, ["train", "{c}", "checkpoint.keep=1"], "checkpoint.keep = 1"),
    ("stage 4", 2, ["train", "{c}", "engine.zero_stage=4"], "engine.zero_stage = 4"),
    ("bf16 at stage 0", 2, ["train", "{c}", *ZERO, "engine.zero_stage=0", "engine.precision=bf16"], "zero_stage = 1"),
    ("an unknown mode of wandb", 2, ["train", "{c}", "wandb.mode=on"], "wandb.mode = 'on'"),
    ("muon with clipping", 2, ["train", "{c}", *ZERO, "optimizer.kind=muon", "optimizer.momentum=2"], "momentum = 2"),
    # DeepSpeed
    ("a JSON that contradicts", 2, ["train", "{c}", *ZERO, "engine.deepspeed={p}/ds.json"], "zero_optimization.stage"),
    ("a typo in the JSON", 2, ["train", "{c}", *ZERO, "engine.deepspeed={p}/typo.json"], "zero_optimization"),
    ("a broken JSON", 2, ["train", "{c}", *ZERO, "engine.deepspeed={p}/no.json"], "no.json"),
    ("no such JSON", 2, ["train", "{c}", *ZERO, "engine.deepspeed={p}/none.json"], "none.json"),
    ("DeepSpeed's own monitor", 2, ["train", "{c}", *ZERO, "engine.deepspeed={{wandb: {{enabled: true}}}}"], "wandb"),
    ("another batch size", 2, ["train", "{c}", *ZERO, "engine.deepspeed={{train_batch_size: 7}}"], "7"),
    ("DeepSpeed's JSON for plain", 2, ["train", "{c}", "engine.deepspeed={{}}"], "engine.kind = plain"),
    # corpora
    ("no corpus", 3, ["train", "{c}", "data.corpus={p}/nowhere", "prepare=null"], "nowhere"),
    ("no source", 3, ["prepare", "{c}", "data.corpus={p}/new", "prepare.source.paths=[{p}/none.txt]"], "none.txt"),
    ("an empty glob", 3, ["prepare", "{c}", "data.corpus={p}/new", "prepare.source.paths=['{p}/*.xyz']"], "xyz"),
    ("broken jsonl", 3, ["prepare", "{c}", "data.corpus={p}/new", "prepare.source.paths=[{p}/bad.jsonl]"], "bad.jsonl"),
    ("no such field", 3, ["prepare", "{c}", "data.corpus={p}/new", "prepare.source.paths=[{p}/field.jsonl]"], "body"),
    (
        "nothing in it",
        3,
        ["prepare", "{c}", "data.corpus={p}/new", "prepare.source.paths=[{p}/nothing.txt]"],
        "gave no text",
    ),
    ("no prepare", 2, ["prepare", "{c}", "prepare=null"], "prepare is not given"),
    ("another preparation", 3, ["prepare", "{c}", "prepare.tokenizer.kind=characters"], "corpus"),
    ("splits that leave nothing", 2, ["prepare", "{c}", "prepare.split.valid=0.6", "prepare.split.test=0.5"], "split"),
    ("a foreign manifest", 3, ["train", "{c}", "data.corpus={p}/foreign"], "manifest.json"),
    # tokenizers
    (
        "no such tokenizer",
        3,
        ["prepare", "{c}", "data.corpus={p}/new", "prepare.tokenizer.path={p}/none.model"],
        "none.model",
    ),
    (
        "too large a vocabulary",
        3,
        ["prepare", "{c}", "data.corpus={p}/new", "prepare.tokenizer={{kind: sentencepiece-bpe, vocab: 30000}}"],
        "vocab",
    ),
    (
        "a file that is no tokenizer",
        3,
        ["prepare", "{c}", "data.corpus={p}/new", "prepare.tokenizer.path={p}/bad.jsonl"],
        "bad.jsonl",
    ),
    # runs and checkpoints
    ("no run", 7, ["eval", "{p}/empty"], "no run folder"),
    ("no such split", 3, ["eval", "{r}", "--split", "tset"], "tset"),
    ("no such step", 4, ["eval", "{r}", "--checkpoint", "99"], "99"),
    ("no step at all", 7, ["eval", "{r}", "--checkpoint", "newest"], "neither last, best nor a step"),
    ("no such data", 7, ["eval", "{r}", "--data", "{p}/none.txt"], "none.txt"),
    ("empty data", 7, ["eval", "{r}", "--data", "{p}/nothing.txt"], "not one byte"),
    ("an unknown setting", 2, ["eval", "{r}", "--set", "eval.strde=4"], "strde"),
    ("carried without a state", 2, ["eval", "{r}", "--set", "eval.mode=carried"], "carried"),
    ("two prompts", 7, ["sample", "{r}", "--prompt", "a", "--prompt-file", "{p}/text/000.txt"], "use one"),
    ("no such prompt", 7, ["sample", "{r}", "--prompt-file", "{p}/none"], "cannot be read"),
    ("top_p of 2", 2, ["sample", "{r}", "--top-p", "2"], "top_p = 2"),
    ("a negative temperature", 2, ["sample", "{r}", "--temperature", "-1"], "temperature = -1"),
    ("export to nowhere new", 4, ["checkpoint", "export", "{r}", "--out", "{p}/text"], "not an empty folder"),
    ("verify nothing", 7, ["checkpoint", "verify", "{p}/none"], "neither"),
    ("required but absent", 4, ["train", "{c}", "run.name=fresh", "run.resume=required"], "no checkpoint"),
    ("another order", 2, ["train", "{c}", "data.context=8"], "data.context"),
    ("another width", 4, ["train", "{c}", "model.width=32"], "has shape"),
    ("another activation", 2, ["train", "{c}", "model.activation=gelu"], "model.activation = gelu, but"),
    ("another seed", 2, ["train", "{c}", "train.seed=4"], "train.seed"),
]


@pytest.mark.parametrize(("code", "arguments", "message"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_one_clear_line(place, code, arguments, message):
    names = {"p": place, "c": place / "tiny.yaml", "r": place / "runs" / "tiny"}
    ran = lmtrain(*(text.format(**names) for text in arguments))
    lines = [line for line in ran.err.splitlines() if line.startswith("lmtrain: ")]
    assert ran.code == code, ran
    assert len(lines) == 1, ran
    assert message in lines[0], ran
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_there_are_at_least_fifty():
    assert len(CASES) >= 50


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "a rank lies in"),
    ],
)
def test_bad_ranks(place, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = lmtrain("train", place / "tiny.yaml")
    assert ran.code == 5
    assert message in ran.err


def test_a_batch_that_does_not_divide_among_ranks(place, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    ran = lmtrain("train", place / "tiny.yaml", "run.name=three")
    assert ran.code == 2
    assert "data.global_batch = 4 does not divide among 3 ranks; use 3 or 6" in ran.err
    assert not (place / "runs" / "three").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place(place):
    ran = lmtrain("train", place / "tiny.yaml", "run.dir=/proc/nowhere")
    assert ran.code != 0
    assert "Traceback" not in ran.err
