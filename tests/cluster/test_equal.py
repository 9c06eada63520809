"""Two hosts with a rank each train as one host with two ranks and as plain torch, however they were started."""

import pytest
import yaml

from tests.cluster.jobs import STARTERS, Job, rows
from tests.house import config, lmtrain

STEPS = 8
MODELS = {
    "gpt": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2, "dropout": 0.1},
    "rnn": {"kind": "rnn", "cell": "lstm", "layers": 1, "width": 16, "embed_width": 12, "dropout": 0.1},
}


@pytest.fixture(scope="module")
def folder_of(trained, tmp_path_factory):
    """`folder_of("gpt")`: a folder with a model's config, in which the plain engine has run already."""
    made = {}

    def find(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            train = {"steps": STEPS, "eval_every": 4, "save_every": 4}
            path = config(made[kind], train=train, data={"corpus": str(trained / "corpus"), "micro_batch": 2})
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "model": MODELS[kind]}))
            ran = lmtrain("train", path, "run.name=plain")
            assert ran.code == 0, ran.err
        return made[kind]

    return find


def assert_same(folder, name, base="plain"):
    """Every loss and every held-out loss is the plain engine's within 1e-5."""
    for kind, key in (("train", "train/loss"), ("eval", "eval/valid/loss")):
        plain, other = rows(folder / "runs" / base, kind), rows(folder / "runs" / name, kind)
        assert list(plain) == list(other), kind
        assert len(plain) == {"train": STEPS, "eval": 2}[kind]
        for step, row in plain.items():
            assert other[step][key] == pytest.approx(row[key], abs=1e-5), (kind, step)


def arguments(folder, name, stage):
    return [folder / "tiny.yaml", "engine.kind=zero", f"engine.zero_stage={stage}", f"run.name={name}"]


def on_two_hosts(cluster, folder, how, stage):
    name = f"{how}{stage}"
    job = STARTERS[how](cluster, folder, name, *arguments(folder, name, stage))
    assert not any(job.wait()), job.text()[-6000:]
    assert_same(folder, name)
    for node in cluster.nodes:
        assert cluster.processes(node.number) == []
    return job


EVERY = [(kind, stage, how) for kind in MODELS for stage in range(4) for how in STARTERS]
SOME = [("gpt", 1, "pdsh"), ("gpt", 3, "torchrun"), ("rnn", 2, "torchrun")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage", "how"), SOME)
def test_two_hosts_train_as_one_process(cluster, folder_of, kind, stage, how):
    on_two_hosts(cluster, folder_of(kind), how, stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "stage", "how"), [one for one in EVERY if one not in SOME])
def test_two_hosts_train_as_one_process_every_way(cluster, folder_of, kind, stage, how):
    on_two_hosts(cluster, folder_of(kind), how, stage)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stage", range(4))
def test_one_host_with_two_ranks_trains_as_one_process(cluster, folder_of, kind, stage):
    folder, name = folder_of(kind), f"one-host{stage}"
    job = Job(cluster, folder, name)
    job.on(1, "deepspeed", "--num_gpus", 2, "--module", "lmtrain", "train", *arguments(folder, name, stage))
    assert job.wait() == [0], job.text()[-6000:]
    assert_same(folder, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "stage"), [("gpt", 3), ("rnn", 1)])
def test_four_hosts_train_as_one_process(hosts, folder_of, kind, stage):
    """A row a rank: the global batch has four. Noise is drawn by micro-batch, so plain has to have the same ones."""
    ran = lmtrain("train", folder_of(kind) / "tiny.yaml", "data.micro_batch=1", f"run.name=rows{stage}")
    assert ran.code == 0, ran.err
    four, folder, name = hosts(4), folder_of(kind), f"four{stage}"
    job = STARTERS["pdsh"](four, folder, name, *arguments(folder, name, stage), "data.micro_batch=1")
    assert not any(job.wait(500)), job.text()[-6000:]
    assert rows(folder / "runs" / name, "start")[0]["facts"]["world"] == 4
    assert_same(folder, name, f"rows{stage}")
    for node in four.nodes:
        assert four.processes(node.number) == []
