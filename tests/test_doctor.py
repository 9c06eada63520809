"""The doctor finds what would make a run fail, hang or leak, names it, and says what to do."""

from __future__ import annotations

import importlib.metadata
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lmtrain.report import doctor
from lmtrain.report.doctor import Finding, examine

Usage = namedtuple("Usage", "total used free")


def variables(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), "PATH": "/usr/bin:/bin", **more}


def of(findings: Any, what: str) -> list[Finding]:
    return [finding for finding in findings if finding.what == what]


def bad(findings: Any) -> list[tuple[str, str]]:
    found = [finding for finding in findings if finding.level != "ok"]
    assert all(finding.advice for finding in found), "every finding says what to do"
    return [(finding.level, finding.found) for finding in found]


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    findings = examine(environment=variables(tmp_path), folder=tmp_path)
    assert not [finding for finding in findings if finding.level == "fail"]
    packages = of(findings, "packages")[0].found
    for name in ("torch", "deepspeed", "numpy", "wandb"):
        assert f"{name} {importlib.metadata.version(name)}" in packages
    assert {"python", "packages", "devices", "backend", "compiler", "JIT locks", "disk", "W&B"} <= {
        finding.what for finding in findings
    }
    assert findings[0].to_json() == {
        "level": "ok",
        "what": "python",
        "found": findings[0].found,
        "advice": "",
    }


def test_it_does_not_import_what_it_looks_for() -> None:
    code = (
        "import os, sys; from pathlib import Path; from lmtrain.report import doctor;"
        "doctor.show(doctor.examine(environment=os.environ, folder=Path.cwd()));"
        "print(sorted({'deepspeed', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "to mend" in done.stdout


def test_packages_out_of_range_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "no-such-package-of-ours", "numpy>=2.0", "nothing>=1 ; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = bad(doctor.packages())
    assert [level for level, _ in found] == ["fail", "fail"]
    assert "torch" in found[0][1]
    assert "wanted >=99" in found[0][1]
    assert "no-such-package-of-ours is not installed" in found[1][1]


def test_a_torch_without_its_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.distributed, "is_gloo_available", lambda: False)
    assert bad(doctor.devices()) == [("fail", "this torch has no gloo")]


def test_cards_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("Properties", "name total_memory")("NVIDIA A100-SXM4-80GB", 80 << 30)
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(doctor.torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(doctor.torch.distributed, "is_nccl_available", lambda: False)
    findings = list(doctor.devices())
    assert of(findings, "devices")[1].found == "cuda:1 NVIDIA A100-SXM4-80GB, 80 GiB"
    assert bad(findings) == [("fail", "this torch has no NCCL")]


def test_variables_that_a_launcher_left_behind() -> None:
    assert bad(doctor.launch_variables({})) == []
    assert bad(doctor.launch_variables({"RANK": "0"}))[0][0] == "fail"
    assert bad(doctor.launch_variables({"RANK": "3", "WORLD_SIZE": "2"}))[0][0] == "fail"
    (level, found) = bad(doctor.launch_variables({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}))[0]
    assert (level, "rank 0 of 2" in found) == ("warn", True)


def test_libaio_is_told_of(tmp_path: Path) -> None:
    (found,) = doctor.libaio([tmp_path])
    assert (found.level, "libaio-dev" in found.found) == ("ok", True)
    (tmp_path / "libaio.h").touch()
    (found,) = doctor.libaio([tmp_path / "none", tmp_path])
    assert found.found == str(tmp_path / "libaio.h")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    found = bad(doctor.compiler({"PATH": str(tmp_path)}))
    assert [level for level, _ in found] == ["warn", "warn"]
    assert "no g++" in found[0][1]
    assert "no ninja" in found[1][1]
    for name in ("my-cxx", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    assert bad(doctor.compiler({"PATH": str(tmp_path), "CXX": "my-cxx"})) == []


def test_the_lock_of_a_killed_build(tmp_path: Path) -> None:
    home, private = tmp_path / "home", tmp_path / "private"
    assert bad(doctor.jit_locks(variables(home))) == []
    stale = home / ".cache" / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    held = private / "cpu_adam" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    environment = variables(home, TORCH_EXTENSIONS_DIR=str(private))
    with held.open():
        findings = {finding.found.split(":")[0]: finding for finding in doctor.jit_locks(environment)}
    assert findings[str(stale)].level == "fail"
    assert f"rm {stale}" in findings[str(stale)].advice
    assert findings[str(held)].level == "warn"
    assert "is building" in findings[str(held)].found
    stale.unlink()
    assert [level for level, _ in bad(doctor.jit_locks(environment))] == ["fail"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("worker-1", "line 2: 'worker-1'"),
        ("worker-1 slots = 4", "slots = 4"),
        ("worker-1 slots=four", "slots=four"),
        ("worker-1 slots=4x", "slots=4x"),
        ("worker-0 slots=4", "stands in line 1 too"),
        ("-oProxyCommand=touch${IFS}x slots=1", "is an option of ssh"),
        ("worker-1 slots=0", "no slots"),
    ],
)
def test_hostfile_lines_that_stop_the_launcher_or_worse(tmp_path: Path, line: str, problem: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(f"worker-0 slots=8\n{line}\n")
    found = [item for item in bad(doctor.hosts(hostfile, variables(tmp_path))) if item[0] == "fail"]
    assert len(found) == 1
    assert problem in found[0][1]
    assert f"{hostfile} line 2" in found[0][1]


def test_hostfiles_that_are_good_missing_empty_or_mixed(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    environment = variables(tmp_path, PATH=str(tmp_path))
    for name in ("ssh", "pdsh"):
        (tmp_path / name).touch(mode=0o755)
    hostfile.write_text("# cards\n\nworker-0 slots=8\n  worker-1   slots=8  # the old one\n")
    assert bad(doctor.hosts(hostfile, environment)) == []
    assert "2 hosts" in next(iter(doctor.hosts(hostfile, environment))).found
    (tmp_path / "pdsh").unlink()
    assert "no pdsh" in bad(doctor.hosts(hostfile, environment))[0][1]
    hostfile.write_text("worker-0 slots=8\nlocalhost slots=8\n")
    assert ("warn", f"{hostfile} line 2: localhost among other hosts") in bad(doctor.hosts(hostfile, environment))
    hostfile.write_text("# nobody\n")
    assert bad(doctor.hosts(hostfile, environment)) == [("fail", f"{hostfile} names no host")]
    assert "No such file" in bad(doctor.hosts(tmp_path / "none", environment))[0][1]
    hostfile.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in bad(doctor.hosts(hostfile, environment))[0][1]
    assert list(doctor.hosts(None, environment)) == []


def test_deepspeed_env_lines(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    environment = variables(home)
    assert list(doctor.launcher_environment(environment, folder)) == []
    (home / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nA=b=c\n")
    assert bad(doctor.launcher_environment(environment, folder)) == []
    (folder / ".deepspeed_env").write_text(
        "NCCL_DEBUG=WARN\n\n# note=1\nJUSTAKEY\nWANDB_API_KEY=sesame123\nHF_TOKEN=abc\n"
    )
    findings = list(doctor.launcher_environment(environment, folder))
    assert [(level, found.split()[-3:]) for level, found in bad(findings)] == [
        ("fail", ["2", "is", "blank"]),
        ("fail", ["is", "a", "comment"]),
        ("fail", ["is", "no", "KEY=VALUE"]),
        ("warn", ["like", "a", "secret"]),
        ("warn", ["like", "a", "secret"]),
    ]
    assert not any("sesame123" in finding.found + finding.advice for finding in findings)
    other = tmp_path / "mine"
    other.write_text("\n")
    (level, found) = bad(doctor.launcher_environment({**environment, "DS_ENV_FILE": str(other)}, folder))[0]
    assert (level, str(other) in found) == ("fail", True)


@pytest.mark.parametrize(("free", "level"), [(5 << 20, "fail"), (5 << 30, "warn"), (500 << 30, "ok")])
def test_free_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))
    (finding,) = doctor.disk(tmp_path / "not" / "there" / "yet", what="disk")
    assert finding.level == level
    assert str(tmp_path) in finding.found


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bad(doctor.shared_memory(tmp_path / "none"))[0][0] == "warn"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert "0.1 GiB free" in bad(doctor.shared_memory(tmp_path))[0][1]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    inf = resource.RLIM_INFINITY
    now = {resource.RLIMIT_NOFILE: (256, inf), resource.RLIMIT_FSIZE: (1 << 30, inf), resource.RLIMIT_MEMLOCK: (0, 0)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: now[which])
    found = bad(doctor.limits())
    assert ("warn", "256 open files") in found
    assert ("warn", "files of at most 1.0 GiB") in found
    now.update(
        {resource.RLIMIT_NOFILE: (inf, inf), resource.RLIMIT_FSIZE: (inf, inf), resource.RLIMIT_MEMLOCK: (inf, inf)}
    )
    assert bad(doctor.limits()) == []


def test_a_key_is_found_and_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "0123456789" * 4
    findings = list(doctor.weights_and_biases(variables(tmp_path, WANDB_API_KEY=key)))
    assert [(f.level, f.found) for f in findings] == [
        ("ok", "a key is in WANDB_API_KEY; used when wandb.project is set")
    ]
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    findings += doctor.weights_and_biases(variables(tmp_path))
    assert str(tmp_path / ".netrc") in findings[-1].found
    (tmp_path / ".netrc").unlink()
    findings += doctor.weights_and_biases(variables(tmp_path, WANDB_API_KEY="tooshort99"))
    assert findings[-1].level == "warn"
    findings += doctor.weights_and_biases(variables(tmp_path))
    assert findings[-1].level == "ok"
    findings += doctor.weights_and_biases(variables(tmp_path, WANDB_PROJECT="p"))
    assert findings[-1].level == "warn"
    findings += doctor.weights_and_biases(variables(tmp_path, WANDB_MODE="sometimes"))
    assert findings[-1].level == "fail"
    doctor.show(findings)
    out = capsys.readouterr().out
    assert "tooshort99" not in out
    assert key not in out
    assert "3 ok, 2 to look at, 1 to mend" in out


def test_brackets_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([Finding("fail", "hostfile", "'[red]x[/red]'", "write [host]")])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "write [host]" in out
