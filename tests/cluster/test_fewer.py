"""A run that loses one of three hosts goes on with two, over the same samples."""

import pytest

from tests.cluster.jobs import pdsh, rows, saved
from tests.house import config, lmtrain

STEPS = 60


@pytest.fixture(scope="module")
def folder(hosts_possible, trained, tmp_path_factory):
    """A config whose global batch divides among 2 and 3 hosts, and the plain engine's run of it."""
    made = tmp_path_factory.mktemp("fewer")
    train = {"steps": STEPS, "eval_every": 0, "save_every": 5}
    data = {"corpus": str(trained / "corpus"), "global_batch": 12, "micro_batch": 1}
    path = config(made, train=train, data=data, model={"dropout": 0.1})
    ran = lmtrain("train", path, "run.name=plain")
    assert ran.code == 0, ran.err
    return made


def start(cluster, folder, name, stage):
    arguments = ["engine.kind=zero", f"engine.zero_stage={stage}", "engine.timeout=20", f"run.name={name}"]
    return pdsh(cluster, folder, name, folder / "tiny.yaml", *arguments)


def assert_as_plain(folder, name):
    """Every step's loss and weight of symbols are the plain engine's: so every step read the same samples."""
    plain, other = rows(folder / "runs" / "plain"), rows(folder / "runs" / name)
    assert list(other) == list(plain) == list(range(1, STEPS + 1))
    for step, row in plain.items():
        assert other[step]["train/loss"] == pytest.approx(row["train/loss"], abs=1e-5), step
        assert other[step]["train/tokens"] == row["train/tokens"], step


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", [1, 3])
def test_three_hosts_then_two_train_on_the_same_samples(hosts, folder, stage):
    three, name = hosts(3), f"fewer{stage}"
    job = start(three, folder, name, stage)
    job.until(lambda: saved(folder / "runs" / name), "a checkpoint")
    three.kill(2)
    assert job.wait() != [0]
    assert "rank 2 of 3 on node2" in job.text(), job.text()[-6000:]
    three.close()
    reached = max(rows(folder / "runs" / name))
    assert reached < STEPS, "it was over before the host was lost"
    again = start(hosts(2), folder, name, stage)
    assert again.wait() == [0], again.text()[-6000:]
    assert "resumed step" in again.text()
    assert_as_plain(folder, name)
