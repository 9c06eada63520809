"""The files of launch/: against the Kubernetes schema, and a SLURM job played through with programs of our own."""

import copy
import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest

from lmtrain.config import parse_yaml
from lmtrain.launch import hostfile
from lmtrain.place import find

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
VERSION = "1.37"


def manifests():
    parts = (LAUNCH / "kubernetes.yaml").read_text().split("\n---\n")
    return [parse_yaml(part, where="kubernetes.yaml") for part in parts]


def test_the_manifest_is_what_kubernetes_takes():
    service, job = manifests()
    for one in (service, job):
        kubernetes_validate.validate(one, VERSION, strict=True)
    for break_it in (
        lambda spec: spec.update(completionModus="Indexed"),
        lambda spec: spec.update(completions="2"),
        lambda spec: spec["template"]["spec"].update(restartPolicy=3),
        lambda spec: spec["podFailurePolicy"]["rules"][0].pop("action"),
    ):
        broken = copy.deepcopy(job)
        break_it(broken["spec"])
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, VERSION, strict=True)


def test_the_manifest_agrees_with_itself_and_with_us():
    service, job = manifests()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["WORLD_SIZE"])
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    places = [find({**variables, "JOB_COMPLETION_INDEX": str(i)}) for i in range(spec["completions"])]
    assert [(place.rank, place.world, place.local_rank) for place in places] == [(0, 2, 0), (1, 2, 0)]
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {75: "Ignore", **dict.fromkeys((2, 3, 4, 6, 7), "FailJob")}
    assert "backoffLimit" not in spec, "one pod that is lost fails all: a sum over them says nothing"
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"], pod["restartPolicy"]) == (20, 0, "Never")
    secrets = [one["name"] for one in container["env"] if "secretKeyRef" in one.get("valueFrom", {})]
    assert secrets == ["WANDB_API_KEY", "HF_TOKEN"]


@pytest.mark.parametrize(
    ("code", "count", "requeued"),
    [(0, "", False), (75, "", True), (75, "99", True), (5, "", True), (137, "19", True), (5, "20", False)]
    + [(code, "", False) for code in (2, 3, 4, 6, 7)],
)
def test_the_slurm_job_is_requeued_when_that_helps(tmp_path, code, count, requeued):
    for name, text in {"srun": f'echo "$@" > srun.log\nexit {code}', "scontrol": 'echo "$@" > scontrol.log'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    if count:
        environment["SLURM_RESTART_COUNT"] = count
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "configs/a b.yaml", "x=$(touch pwned)"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    asked = "--label --kill-on-bad-exit=1 python -m lmtrain train configs/a b.yaml x=$(touch pwned)\n"
    assert (tmp_path / "srun.log").read_text() == asked
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 77\n" if requeued else "")
    assert not (tmp_path / "pwned").exists()


def test_the_example_is_a_hostfile():
    hosts = hostfile.read(LAUNCH / "hostfile.example")
    assert [(host.name, len(host.slots)) for host in hosts] == [("node-0", 8), ("node-1", 8)]
