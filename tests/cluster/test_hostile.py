"""The worst of tests/launch over real ssh and pdsh: refused before anything starts, or arriving as it was."""

import hashlib
import json

import pytest
import yaml

from tests.cluster import test_launch as launching
from tests.cluster.test_launch import place  # noqa: F401 - a fixture

HOSTS = ["-oProxyCommand=touch${IFS}CANARY", "$(touch${IFS}CANARY)", "beta;touch${IFS}CANARY", "`touch${IFS}CANARY`"]
VARIABLES = {
    "PYTHONX": 'a"; touch CANARY; "',
    "NCCL_DEBUG": "$(touch CANARY)",
    "OMP_X": "`touch CANARY`",
    "HF_X;touch CANARY;": "1",
}
OVERRIDES = [
    'wandb.tags=["$(touch CANARY)","`touch CANARY`","; touch CANARY;","\\"; touch CANARY; \\"","a > CANARY","*"]',
    "wandb.name=$(touch${IFS}CANARY)",
    "wandb.group='; touch CANARY; '",
    "wandb.entity=x|touch CANARY&&touch${IFS}CANARY",
]
"""wandb.mode is disabled in this config: these are texts that nobody uses."""
TRAVELLING = {"WANDB_NOTES": "$(touch CANARY)", "HF_NOTE": "`touch CANARY`", "HF_OTHER": "x; touch CANARY; '"}


def armed(text, folder):
    """With CANARY's path; whatever runs it makes the file, on either host."""
    return text.replace("CANARY", str(folder / "canary"))


def untouched(folder, place, job):  # noqa: F811
    assert not list(folder.rglob("canary*"))
    assert not list(place.glob("CANARY*"))
    assert "Traceback" not in job.text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(HOSTS)))
def test_a_hostile_host_is_refused(cluster, place, tmp_path, number):  # noqa: F811
    (tmp_path / "hosts").write_text(f"alpha slots=1\n{armed(HOSTS[number], tmp_path)} slots=1\n")
    job = launching.start(cluster, place, f"host{number}", hosts=tmp_path / "hosts")
    assert job.wait() == [7], job.text()
    assert "hosts line 2: " in job.text()
    untouched(tmp_path, place, job)
    assert not (place / "runs" / f"host{number}").exists()
    launching.nobody(cluster, 0, 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", VARIABLES)
def test_a_hostile_variable_is_refused_by_name(cluster, place, tmp_path, name):  # noqa: F811
    value = armed(VARIABLES[name], tmp_path)
    run = f"variable{list(VARIABLES).index(name)}"
    job = launching.start(cluster, place, run, **{armed(name, tmp_path): value})
    assert job.wait() == [7], job.text()
    assert name.partition(";")[0] in job.text()
    untouched(tmp_path, place, job)
    assert not (place / "runs" / run).exists()
    launching.nobody(cluster, 0, 1)


@pytest.mark.exhaustive
def test_what_may_travel_arrives_as_it_was(cluster, place, tmp_path):  # noqa: F811
    """Arguments and variables full of shell go to both hosts; the run's config has the very same texts."""
    given = [armed(text, tmp_path) for text in OVERRIDES]
    values = {name: armed(value, tmp_path) for name, value in TRAVELLING.items()}
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(launching.SITE % (tuple(values), str(tmp_path)))
    path = {"PYTHONPATH": f"{site}:{launching.ROOT}"}
    job = launching.start(cluster, place, "travelled", "train.steps=2", "train.eval_every=0", *given, **values, **path)
    assert job.wait() == [0], job.text()[-6000:]
    untouched(tmp_path, place, job)
    kept = yaml.safe_load((place / "runs" / "travelled" / "config.yaml").read_text())["wandb"]
    for text in given:
        key, _, value = text.removeprefix("wandb.").partition("=")
        assert kept[key] == yaml.safe_load(value), key
    wanted = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}
    assert [json.loads((tmp_path / f"told.{rank}").read_text()) for rank in (0, 1)] == [wanted, wanted]
    launching.nobody(cluster, 0, 1)
