"""What holds for every file: no code from data, one door a library, no environment below run.py, no file too long.

Each check is first run on a few lines that break it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lmtrain import errors, models
from lmtrain.console import Console
from lmtrain.data.known import KINDS as KNOWN_KINDS
from lmtrain.data.layout import KINDS
from lmtrain.data.record_sources import KINDS as RECORD_KINDS
from lmtrain.fleet import COLUMNS, Fleet, WatchConfig
from lmtrain.hardware import MEASURED, Peak
from lmtrain.journal import METRICS, read
from lmtrain.protocol import Score
from lmtrain.tracker import Tracker, WandbConfig
from tests.fake_ranks import engines
from tests.test_tracker import SAVE, Result, record

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "lmtrain").rglob("*.py"))
MOST_LINES = 450

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle", "joblib"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
}  # fmt: skip
DOORS = {
    "deepspeed": {"engine/zero.py"},
    "wandb": {"tracker.py"},
    "datasets": {"data/sources.py"},
    "sentencepiece": {"data/tokenizer.py"},
    "fsspec": {"data/remote.py"},
    "sklearn": {"data/embedded.py"},
    "mlxtend": {"data/embedded.py"},
    "PIL": {"data/images.py"},
    "brotli": {"likelihood/rivals.py"},
    "constriction": set(),
    "transformers": set(),
}
READS_THE_ENVIRONMENT = {"__main__.py", "run.py", "use.py"}

Check = Callable[[ast.AST, str], Iterator[str]]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement or an `import_module("...")` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module or ""]
    if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "import_module":
        return [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def code_from_data(node: ast.AST, file: str) -> Iterator[str]:
    for name in imported(node):
        if name.split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"imports {name}"
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if name in FORBIDDEN_BUILTINS or name in FORBIDDEN_CALLS:
            yield f"calls {name}"
        for keyword in node.keywords:
            if keyword.arg in {"shell", "allow_pickle", "trust_remote_code"} and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield f"passes {keyword.arg}"
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if f"{node.module}.{alias.name}" in FORBIDDEN_CALLS:
                yield f"imports {node.module}.{alias.name}"


def doors(node: ast.AST, file: str) -> Iterator[str]:
    for name in imported(node):
        library = name.split(".")[0]
        if library in DOORS and file not in DOORS[library]:
            yield f"imports {library}, whose door is {sorted(DOORS[library]) or 'the tests'}"


def environment(node: ast.AST, file: str) -> Iterator[str]:
    """Reading os.environ below run.py; zero.py may set what DeepSpeed needs."""
    if file in READS_THE_ENVIRONMENT or file.startswith(("report/", "commands/")):
        return
    if isinstance(node, ast.Call) and dotted(node.func) in {"os.getenv", "os.environ.get", "os.environ.copy"}:
        yield f"calls {dotted(node.func)}"
    if isinstance(node, ast.Subscript) and dotted(node.value) == "os.environ" and isinstance(node.ctx, ast.Load):
        yield "reads os.environ[...]"
    if isinstance(node, ast.Attribute) and dotted(node) == "os.environ" and file != "engine/zero.py":
        yield "uses os.environ"
    if (
        isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and {"environ", "getenv"} & {a.name for a in node.names}
    ):
        yield "imports environ"


def unfinished(node: ast.AST, file: str) -> Iterator[str]:
    if isinstance(node, ast.Raise) and node.exc is not None:
        name = dotted(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        if name == "NotImplementedError":
            yield "raises NotImplementedError"


def undocumented(node: ast.AST, file: str) -> Iterator[str]:
    """Modules, and the functions and classes in them; a method may be documented where its protocol declares it."""
    if not isinstance(node, ast.Module):
        return
    if ast.get_docstring(node) is None:
        yield "has no docstring"
    for item in node.body:
        public = isinstance(item, ast.FunctionDef | ast.ClassDef) and not item.name.startswith("_")
        if public and ast.get_docstring(item) is None:
            yield f"{item.name} has no docstring"


def faults(check: Check, source: str, file: str) -> list[str]:
    return [
        f"{file}:{getattr(node, 'lineno', 1)} {fault}"
        for node in ast.walk(ast.parse(source))
        for fault in check(node, file)
    ]


BROKEN: list[tuple[Check, str]] = [
    (code_from_data, "import pickle"),
    (code_from_data, "from pickle import loads"),
    (code_from_data, "import torch\nx = torch.load('a', weights_only=True)"),
    (code_from_data, "from torch import load"),
    (code_from_data, "import yaml\nyaml.load('a', Loader=yaml.SafeLoader)"),
    (code_from_data, "eval('1')"),
    (code_from_data, "exec('1')"),
    (code_from_data, "__import__('pickle')"),
    (code_from_data, "import importlib\nimportlib.import_module('pickle')"),
    (code_from_data, "import numpy as np\nnp.load('a', allow_pickle=True)"),
    (code_from_data, "import subprocess\nsubprocess.run('a', shell=True)"),
    (doors, "import deepspeed"),
    (doors, "def f():\n    from deepspeed.ops import adam"),
    (doors, "from importlib import import_module\nimport_module('wandb')"),
    (environment, "import os\nx = os.environ['RANK']"),
    (environment, "import os\nx = os.getenv('RANK')"),
    (environment, "from os import environ"),
    (environment, "import os\nf(os.environ)"),
    (unfinished, "def f():\n    raise NotImplementedError"),
    (unfinished, "def f():\n    raise NotImplementedError('x')"),
    (undocumented, "x = 1"),
    (undocumented, "'''m'''\ndef f(): pass"),
    (undocumented, "'''m'''\nclass C: pass"),
]
SOUND = "'''m'''\nimport os\nmodel.eval()\nre.compile('a')\nnp.load('a', allow_pickle=False)\nos.cpu_count()\n"
CHECKS = (code_from_data, doors, environment, unfinished, undocumented)


@pytest.mark.parametrize(("check", "source"), BROKEN)
def test_the_checks_can_fail(check: Check, source: str) -> None:
    assert faults(check, source, "models/x.py")
    assert not faults(check, SOUND, "models/x.py")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package(check: Check) -> None:
    assert len(PACKAGE) > 40
    found = [f for path in PACKAGE for f in faults(check, path.read_text(), str(path.relative_to(ROOT / "lmtrain")))]
    assert not found, "\n".join(found)


def kinds_named(source: str, kinds: set[str]) -> set[str]:
    """The kinds that code compares with, as whole strings, or imports; docstrings may speak of them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in kinds:
            found.add(node.value)
        if isinstance(node, ast.Compare) and any(dotted(one).endswith("corpus.kind") for one in ast.walk(node)):
            found.add("corpus.kind")
        if isinstance(node, ast.alias):
            found |= set(node.name.split(".")) & kinds
    return found


def test_what_trains_and_scores_names_no_model_and_no_kind_of_corpus() -> None:
    kinds = {*models.kinds(), *KINDS, *RECORD_KINDS, *KNOWN_KINDS}
    assert {"gpt", "rnn", "text", "image", "table", "digits"} <= kinds
    package = ROOT / "lmtrain"
    blind = [package / name for name in ("train.py", "data/order.py", "data/loader.py", "inference/score.py")]
    blind += [*sorted((package / "engine").glob("*.py")), *sorted((package / "checkpoint").glob("*.py"))]
    assert len(blind) > 20
    assert kinds_named("if corpus.kind == 'text':\n    import lmtrain.models.gpt", kinds) == {
        "text",
        "corpus.kind",
        "gpt",
    }
    assert kinds_named("from lmtrain.models import rnn\nkind = 'digits'", kinds) == {"rnn", "digits"}
    named = {str(path.relative_to(package)): kinds_named(path.read_text(), kinds) for path in blind}
    assert {path: found for path, found in named.items() if found} == {}


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): n for path in PACKAGE if (n := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def project_files() -> list[Path]:
    """Every text file of the project, as git knows them, or by walking where there is no git."""
    if shutil.which("git") and (ROOT / ".git").exists():
        out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in out.decode().split("\0") if name]
    else:
        kept = ("lmtrain", "tests", "configs", "docs", "launch", "benchmarks", "tokenizers", ".ci")
        paths = [p for folder in kept for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
        paths += list(ROOT.glob("*.*"))
    return [path for path in paths if path.is_file()]


def test_no_machine_is_named() -> None:
    pattern = re.compile(r"/(?:home|Users)/\w+/|(?<![\w.])/root/|" + re.escape(f"{ROOT}/") + r"|\.\./shared\b")
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a tokenizer's model
        if path == Path(__file__).resolve():
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


def test_watching_needs_no_torch() -> None:
    """The W&B process imports tracker.py: half a second and 200 MB less."""
    code = "import sys, lmtrain.tracker; print(sorted({'torch', 'numpy', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_every_metric_is_documented(tmp_path: Path) -> None:
    log = Tracker(tmp_path, WandbConfig(), rank=0, environment={}, console=Console(file=io.StringIO()))
    peak = Peak(1e9, MEASURED)
    log.start(
        step=0, steps=9, config={}, facts={}, flops_per_symbol=1.0, peak=peak, bytes_per_symbol=4.0, dims_per_symbol=1.0
    )
    log.log_step(record(1))
    log.log_eval("valid", Result(Score(1.0, 2.0, 3.0, 4.0, 5.0)), step=1, tokens=1)
    log.log_save(SAVE)
    log.log_load({"step": 1, "bytes": 5, "seconds": 1.0})
    log.samples(["text"], [["a"]], step=1)
    log.picture(tmp_path / "a.png", caption="a", step=1)
    fleet = Fleet(WatchConfig(every=1), log, host="h")
    for step in (1, 2):
        fleet(engines(1)[0], {"step": step, "step_seconds": 0.1, "data_wait": 0.0, "communication": 0.0})
    log.alert("a", "b")
    log.preempting()
    log.finish()
    rows = list(read(tmp_path / METRICS))
    text = (ROOT / "docs" / "metrics.md").read_text()
    names = {key.replace("/valid/", "/<set>/") for row in rows for key in row if "/" in key}
    assert len(names) >= 20
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert {row["kind"] for row in rows if f"| `{row['kind']}` |" not in text} == set()
    assert {name for name in COLUMNS if f"`{name}`" not in text} == set()
    documented = set(re.findall(r"^\| `((?:train|perf|eval|ranks)/[^`]+)`", text, re.MULTILINE))
    assert documented == names


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_dependency_is_pinned_in_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, sign, version = line.partition("==")
            assert sign, line
            assert "+" not in version, f"{line}: a local version is found on one index only"
            pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = settings()["project"]
    wanted = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} but {pins[name]} in constraints.txt"


@pytest.mark.parametrize(("files", "extra"), [("lmtrain", "mnist"), ("tests", "test")])
def test_every_import_is_declared(files: str, extra: str) -> None:
    project = settings()["project"]
    declared = {
        re.sub(r"[-_.]+", "_", Requirement(text).name).lower()
        for text in project["dependencies"] + project["optional-dependencies"][extra]
    }
    modules = {"yaml": "pyyaml", "google_crc32c": "google_crc32c", "sklearn": "scikit_learn", "PIL": "pillow"}
    used = {
        name.split(".")[0]
        for path in (ROOT / files).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in imported(node)
    }
    own = {"lmtrain", "tests", "benchmarks", "__future__"}
    foreign = {name for name in used if name and name not in sys.stdlib_module_names and name not in own}
    assert {name for name in foreign if modules.get(name, name).lower() not in declared} == set()


def test_make_installs_torch_first_and_needs_nothing_before(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def plan(*arguments: str) -> list[str]:
        done = subprocess.run(["make", "-n", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    for target in ("demo", "test"):
        lines = plan(target, "PYTHON=python3")
        installs = [line for line in lines if "pip install" in line]
        assert installs[0].endswith("torch")
        assert "--index-url" not in installs[0]
        assert "-e '.[test,lint]'" in installs[1]
        assert all("-c constraints.txt" in line for line in installs)
    assert "--index-url https://example.org/cpu --no-deps torch" in " ".join(
        plan("venv", "TORCH_INDEX_URL=https://example.org/cpu")
    )
    assert any("lmtrain demo" in line for line in plan("demo"))
    assert any('-m "not exhaustive"' in line for line in plan("test"))
    assert not any("exhaustive" in line for line in plan("test-all"))

    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert not [line for line in plan("test") if "pip" in line]
    os.utime(stamp, (1, 1))  # older than the pins, whatever the clock's grain
    assert [line for line in plan("test") if "pip" in line]
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ntest "$1" = --version && echo Python 3.10.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(["make", "venv", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "lmtrain needs Python 3.11 or newer" in done.stderr
    assert "Python 3.10.1" in done.stderr


@pytest.mark.parametrize(
    "name", ["launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch", ".ci/run", ".ci/setup"]
)
def test_scripts_are_sound_and_stop_at_the_first_fault(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True, capture_output=True)
    if not name.endswith(".sbatch"):
        assert (ROOT / name).stat().st_mode & 0o111


def test_launch_files_pass_what_they_are_given(tmp_path: Path) -> None:
    """With programs that only print their arguments in the place of the real ones."""
    for name in ("deepspeed", "srun", "scontrol"):
        program = tmp_path / name
        code = errors.EXIT_STOPPED if name == "srun" else 0
        program.write_text(f'#!/bin/sh\necho {name} "$@" ssh:$PDSH_SSH_ARGS_APPEND\nexit {code}\n')
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "hosts").write_text("a slots=1\n")

    def run(script: str, *arguments: str, **more: str) -> tuple[int, str]:
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", **more}
        command = ["bash", str(ROOT / "launch" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    tail = "--module lmtrain train c.yaml a.b=1"
    assert run("local.sh", "c.yaml", "a.b=1") == (0, f"deepspeed --num_gpus 2 {tail} ssh:\n")
    assert run("local.sh", "c.yaml", "a.b=1", RANKS="4")[1].startswith(f"deepspeed --num_gpus 4 {tail}")
    code, out = run("multinode.sh", "hosts", "c.yaml", "a.b=1")
    assert code == 0
    assert out.startswith(f"deepspeed --hostfile hosts {tail} ssh:-o ServerAliveInterval=10")
    assert run("multinode.sh", "none", "c.yaml")[0] != 0
    code, out = run("slurm.sbatch", "c.yaml", "a.b=1", SLURM_JOB_ID="7")
    assert code == errors.EXIT_STOPPED
    assert out.splitlines()[0].startswith("srun --label --kill-on-bad-exit=1 python -m lmtrain train c.yaml a.b=1")
    assert out.splitlines()[1].startswith("scontrol requeue 7")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 6\n")
    assert run("slurm.sbatch", "c.yaml", SLURM_JOB_ID="7") == (6, "")


def test_the_kubernetes_job_agrees_with_itself_and_with_our_exit_codes() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["WORLD_SIZE"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    codes = {r["action"]: r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r}
    failures = (
        errors.ConfigError,
        errors.CorpusError,
        errors.CheckpointError,
        errors.DivergenceError,
        errors.InputError,
    )
    assert codes == {"Ignore": [errors.EXIT_STOPPED], "FailJob": [one.exit_code for one in failures]}
    assert pod["restartPolicy"] == "Never"
    assert container["command"][:4] == ["python", "-m", "lmtrain", "train"]
    assert (ROOT / container["command"][4]).is_file()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_sweep_is_one_that_an_agent_can_run() -> None:
    tree = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())
    assert re.fullmatch(r"eval/\w+/loss", tree["metric"]["name"])
    script = tree["command"][tree["command"].index("-c") + 1]
    assert (ROOT / script.split()[3]).is_file()
    assert tree["command"][-1] == "${args_no_hyphens}"


def test_the_licence_is_the_one_that_is_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text.splitlines()[1]
    assert "END OF TERMS AND CONDITIONS" in text
    assert settings()["project"]["license"] == "Apache-2.0"
    assert importlib.metadata.metadata("lmtrain")["License-Expression"] == "Apache-2.0"
