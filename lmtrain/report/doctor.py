"""`lmtrain doctor`: what on this machine would make a run fail, hang or leak, found before the run.

Nothing here imports deepspeed or wandb, opens a connection or prints a secret.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from lmtrain import place
from lmtrain.errors import ConfigError, EngineError
from lmtrain.follower import environment_settings, wandb_key
from lmtrain.launch import hostfile as hostfiles
from lmtrain.launch import variables

GIB = 1 << 30
FREE_FAIL, FREE_WARN = 1 * GIB, 10 * GIB
SHM_WARN = 1 * GIB
FILES_WARN = 1024
INCLUDE = (Path("/usr/include"), Path("/usr/local/include"))
LAUNCHER_HOSTFILE = Path("/job/hostfile")
"""Where the launcher looks when it is given no --hostfile."""


@dataclass(frozen=True, slots=True)
class Finding:
    """level: ok, warn (a run may suffer) or fail (a run will). advice: what to do; empty when ok."""

    level: Literal["ok", "warn", "fail"]
    what: str
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


def examine(
    *, environment: Mapping[str, str], folder: Path, hostfile: Path | None = None, shm: Path = Path("/dev/shm")
) -> list[Finding]:
    """Look at everything. folder: where runs go. hostfile: of a multi-node run; None: where the launcher looks."""
    return [
        *packages(),
        *devices(),
        *launch_variables(environment),
        *compiler(environment),
        *libaio(),
        *jit_locks(environment),
        *hosts(hostfile, environment),
        *launcher_environment(environment, folder),
        *disk(folder, what="disk"),
        *shared_memory(shm),
        *limits(),
        *weights_and_biases(environment),
    ]


def show(findings: list[Finding]) -> None:
    """A table for a person, and one line of summary."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        advice = f"\n[dim]{_plain(finding.advice)}[/dim]" if finding.advice else ""
        level = f"[{colours[finding.level]}]{finding.level}[/]"
        table.add_row(level, finding.what, _plain(finding.found) + advice)
    console.print(table)
    count = {level: sum(f.level == level for f in findings) for level in colours}
    console.print(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} to mend")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def packages() -> Iterator[Finding]:
    """Python, and every package that lmtrain depends on, against the range it asks for."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", "python", f"{python} at {sys.executable}")
    wanted = [Requirement(text) for text in importlib.metadata.requires("lmtrain") or []]
    good = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        mend = f"pip install '{requirement}' (make venv pins what was tested)"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", "packages", f"{requirement.name} is not installed", mend)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good.append(f"{requirement.name} {version}")
        else:
            found = f"{requirement.name} {version}, wanted {requirement.specifier}"
            yield Finding("fail", "packages", found, mend)
    yield Finding("ok", "packages", ", ".join(good))


def devices() -> Iterator[Finding]:
    """Accelerators, and whether the collective library that they need is in this torch."""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
            yield Finding("ok", "devices", f"cuda:{i} {text}")
        half = "bf16 runs" if torch.cuda.is_bf16_supported(including_emulation=False) else "no native bf16: fp16 runs"
        yield Finding("ok", "precision", half)
        if torch.distributed.is_nccl_available():
            yield Finding("ok", "backend", "nccl")
        else:
            yield Finding("fail", "backend", "this torch has no NCCL", "install a CUDA build of torch from its index")
        return
    memory = psutil.virtual_memory().total / GIB
    text = f"no accelerator; CPU with {os.cpu_count()} cores ({torch.get_num_threads()} threads), {memory:.0f} GiB"
    yield Finding("ok", "devices", text)
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        yield Finding("ok", "backend", "gloo")
    else:
        yield Finding("fail", "backend", "this torch has no gloo", "install a build of torch with torch.distributed")


def launch_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the variables of a launcher, if any, make sense together."""
    try:
        here = place.find(environment)
    except EngineError as error:
        yield Finding("fail", "launch", str(error), "unset what a launcher left behind in this shell")
        return
    if here.world > 1:
        found = (
            f"the variables say rank {here.rank} of {here.world}; a plain `lmtrain train` here would wait for others"
        )
        yield Finding("warn", "launch", found, "unset RANK and WORLD_SIZE unless this is a launcher's shell")
    else:
        yield Finding("ok", "launch", "one process unless a launcher says otherwise")


def compiler(environment: Mapping[str, str]) -> Iterator[Finding]:
    """g++ and ninja: for torch.compile, Muon, and the fused optimizers that are built on first use."""
    path = environment.get("PATH", os.defpath) + os.pathsep + str(Path(sys.executable).parent)
    uses = "needed by engine.compile, optimizer.kind = muon with ZeRO, and offloaded or fused optimizers"
    for name, package in ((environment.get("CXX") or "g++", "apt-get install g++"), ("ninja", "pip install ninja")):
        found = shutil.which(name, path=path)
        if found:
            yield Finding("ok", "compiler", found)
        else:
            yield Finding("warn", "compiler", f"no {name}: {uses}", package)


def libaio(folders: Sequence[Path] = INCLUDE) -> Iterator[Finding]:
    """The header that DeepSpeed's offload to NVMe is built with; nothing else needs it."""
    found = next((folder / "libaio.h" for folder in folders if (folder / "libaio.h").is_file()), None)
    none = "none: engine.offload = nvme could not be built; for it, apt-get install libaio-dev"
    yield Finding("ok", "libaio", none if found is None else str(found))


def jit_locks(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Lock files of extension builds that were killed: every later start would wait for them without a word."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or Path.home()) / ".cache")
    roots = {cache / "torch_extensions", Path("/tmp/torch_extensions")}
    if environment.get("TORCH_EXTENSIONS_DIR"):
        roots.add(Path(environment["TORCH_EXTENSIONS_DIR"]))
    locks = sorted({lock for root in roots if root.is_dir() for lock in root.rglob("lock") if lock.is_file()})
    if not locks:
        yield Finding("ok", "JIT locks", "none")
        return
    holders = _holders(locks)
    for lock in locks:
        if lock in holders:
            yield Finding("warn", "JIT locks", f"{lock}: process {holders[lock]} is building", "wait until it is done")
        else:
            advice = f"rm {lock} (a build was killed; every start that needs {lock.parent.name} hangs)"
            yield Finding("fail", "JIT locks", f"{lock}: no process of yours holds it", advice)


def _holders(files: list[Path]) -> dict[Path, int]:
    """Who has the files open, as far as we may see."""
    wanted = {str(file.resolve()): file for file in files}
    out: dict[Path, int] = {}
    for process in psutil.process_iter():
        try:
            for file in process.open_files():
                if file.path in wanted:
                    out[wanted[file.path]] = process.pid
        except psutil.Error:
            continue
    return out


def hosts(hostfile: Path | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """A hostfile as DeepSpeed's launcher reads it: `host slots=N` a line, comments and blank lines allowed."""
    if hostfile is None:
        if not LAUNCHER_HOSTFILE.is_file():
            return
        hostfile = LAUNCHER_HOSTFILE
    try:
        text = hostfile.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        advice = "the launcher takes a hostfile that is missing for one machine, without an error: give the right path"
        yield Finding("fail", "hostfile", f"{hostfile}: {reason}", advice)
        return
    seen, faults = hostfiles.lint(text)
    for fault in faults:
        yield Finding("fail", "hostfile", f"{hostfile} line {fault.line}: {fault.problem}", fault.advice)
    if not seen and not faults:
        yield Finding("fail", "hostfile", f"{hostfile} names no host", "write `host slots=N`, a line a host")
    elif not faults:
        yield Finding("ok", "hostfile", f"{hostfile}: {len(seen)} hosts")
    local = hostfiles.LOCAL_NAMES & set(seen)
    if local and len(seen) > 1:
        name = min(local)
        advice = "the others cannot reach it by that name; write the name they know it by"
        yield Finding("warn", "hostfile", f"{hostfile} line {seen[name][0]}: {name} among other hosts", advice)
    if len(seen) > 1:
        for program in ("ssh", "pdsh"):
            if shutil.which(program, path=environment.get("PATH", os.defpath)) is None:
                advice = f"apt-get install {program if program == 'pdsh' else 'openssh-client'}"
                yield Finding("warn", "hostfile", f"no {program}, with which the launcher starts other hosts", advice)


def launcher_environment(environment: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """`.deepspeed_env`, in the home and the working folder: what the launcher gives to all hosts, and prints."""
    name = environment.get(variables.FILE_VARIABLE) or variables.FILE
    for path in variables.places(environment, folder):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            yield Finding("fail", name, f"{path}: {error.strerror}", "the launcher stops at it; mend it or remove it")
            continue
        bad = 0
        for fault in variables.lint(text):
            bad += 1
            yield Finding("fail", name, f"{path} line {fault.line} is {fault.problem}", fault.advice)
        for number, key in variables.secret_lines(text):
            bad += 1
            advice = "the launcher prints every value; use a netrc file on each host, or lmtrain launch"
            yield Finding("warn", name, f"{path} line {number}: {key} looks like a secret", advice)
        if not bad:
            yield Finding("ok", name, f"{path}")


def disk(folder: Path, *, what: str) -> Iterator[Finding]:
    """Room for checkpoints."""
    at = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(at).free
    found = f"{free / GIB:.1f} GiB free at {at}"
    advice = "a checkpoint takes 12 bytes a parameter with AdamW, and at least two are kept: free some, or set run.dir"
    if free < FREE_FAIL:
        yield Finding("fail", what, found, advice)
    elif free < FREE_WARN:
        yield Finding("warn", what, found, advice)
    else:
        yield Finding("ok", what, found)
    if not os.access(at, os.W_OK):
        yield Finding("fail", what, f"{at} is not writable", "set run.dir to a folder that is")


def shared_memory(shm: Path) -> Iterator[Finding]:
    """Ranks of one host talk through it; containers give 64 MiB unless told otherwise."""
    if not shm.is_dir():
        yield Finding("warn", "shared memory", f"no {shm}", "mount a tmpfs there")
        return
    free = shutil.disk_usage(shm).free
    found = f"{free / GIB:.1f} GiB free at {shm}"
    if free < SHM_WARN:
        yield Finding("warn", "shared memory", found, "docker run --shm-size=8g (or --ipc=host); remove leftovers")
    else:
        yield Finding("ok", "shared memory", found)


def limits() -> Iterator[Finding]:
    """Limits that make a run fail late: open files, file size, locked memory where there is InfiniBand."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < FILES_WARN:
        yield Finding("warn", "limits", f"{files} open files", f"ulimit -n {FILES_WARN * 16}")
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY:
        yield Finding("warn", "limits", f"files of at most {size / GIB:.1f} GiB", "ulimit -f unlimited")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        found = f"{locked / GIB:.1f} GiB of locked memory, and there is InfiniBand"
        yield Finding("warn", "limits", found, "ulimit -l unlimited")
    text = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    yield Finding("ok", "limits", f"open files: {text}")


def weights_and_biases(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether a key is there, never the key."""
    try:
        asked = environment_settings(environment)
    except ConfigError as error:
        yield Finding("fail", "W&B", str(error), "unset WANDB_MODE or give one of these")
        return
    source = wandb_key(environment)
    if source is None:
        level: Literal["ok", "warn"] = "warn" if asked.get("mode") == "online" or "project" in asked else "ok"
        found = "no key: runs with wandb.project are kept offline, and `wandb sync` uploads them"
        yield Finding(level, "W&B", found, "wandb login, or set WANDB_API_KEY" if level == "warn" else "")
        return
    if source == "WANDB_API_KEY" and len(environment["WANDB_API_KEY"].strip()) < 40:
        found = "WANDB_API_KEY is shorter than 40 characters: no key of W&B's"
        yield Finding("warn", "W&B", found, "copy the whole key from the settings page")
        return
    yield Finding("ok", "W&B", f"a key is in {source}; used when wandb.project is set")
