"""Offload to NVMe is plain, and its checkpoints are those of every stage; what it leaves on the disk is nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmtrain.engine import nvme
from lmtrain.errors import EngineError
from lmtrain.protocol import Place
from tests.engine.jobs import engine_for, run_cases, small_model
from tests.engine.test_stages import MUON, compare, plain  # noqa: F401 - a fixture
from tests.spawn import spawn

WIDE = {"layers": 1, "width": 368, "heads": 2}
"""DeepSpeed leaves in memory what is less than 1 MiB of a rank: two matrices of this have more, on two ranks."""
CASE: dict[str, Any] = {"model": "gpt", "steps": 8, "changes": WIDE, "micro": 3, "zero_stage": 3, "offload": "nvme"}
GROUPS = {"sub_group_size": 270_000, "stage3_param_persistence_threshold": 0}


def missing() -> str | None:
    """Why the extension cannot be built here, or None."""
    header = "#include <libaio.h>\nint main() { return 0; }\n"
    if shutil.which("g++") is None:
        return "offload to NVMe is built with g++"
    tried = subprocess.run(
        ["g++", "-x", "c++", "-", "-o", "/dev/null", "-laio"], input=header, text=True, capture_output=True, check=False
    )
    return None if tried.returncode == 0 else "offload to NVMe needs libaio-dev (.ci/setup installs it)"


@pytest.fixture(scope="module")
def libaio() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


def cases(path: Path) -> list[dict[str, Any]]:
    """AdamW with the optimizer state on the disk; Muon with it read ahead and written behind, the weights in memory."""
    ahead = {"pipeline_read": True, "pipeline_write": True}
    weights = {"device": "cpu", "pin_memory": False}
    state = CASE | {"label": "nvme-state", "deepspeed": {"zero_optimization": GROUPS}}
    added = GROUPS | {"offload_optimizer": ahead, "offload_param": weights}
    behind = CASE | {"label": "nvme-ahead", "deepspeed": {"zero_optimization": added}, "optimizer": MUON}
    return [case | {"nvme_path": str(path)} for case in (state, behind)]


def swapped(place: Place, folder: Path, *, cases: list[dict[str, Any]], references: str) -> Any:
    """`run_cases`, and what lay on the disk meanwhile: bytes by what they are, counted when an engine leaves."""
    seen: dict[str, int] = {}
    close = nvme.SwapFolder.close

    def look(self: nvme.SwapFolder) -> None:
        for path in self.folder.rglob("*.swp"):
            kind = path.name.split("-")[0] if "-" in path.name else "weights"
            seen[kind] = seen.get(kind, 0) + path.stat().st_size
        close(self)

    nvme.SwapFolder.close = look  # type: ignore[method-assign]
    done = run_cases(place, folder, cases=cases, references=references)
    (folder / f"seen{place.rank}").write_text(repr(sorted(seen)))
    return done


@pytest.mark.exhaustive
@pytest.mark.usefixtures("libaio")
@pytest.mark.timeout(1800)
def test_nvme_is_plain(plain: Any, tmp_path: Path) -> None:  # noqa: F811
    """Curves, restored runs bit for bit, checkpoints of plain, steps that are skipped: as for every other stage."""
    disk = tmp_path / "disk"
    compare(
        plain, 3, 2, cases(disk), relative=1e-6, folder=tmp_path, job="tests.engine.test_nvme:swapped", timeout=1500
    )
    for rank in range(2):
        seen = (tmp_path / f"seen{rank}").read_text()
        for kind in ("weights", "exp_avg", "exp_avg_sq", "momentum"):
            assert f"'{kind}'" in seen, f"rank {rank} had no {kind} on the disk, but {seen}"
    assert [path.name for path in disk.iterdir()] == [".lmtrain-swap-lock"]


def test_a_folder_of_this_process_alone(tmp_path: Path) -> None:
    mine, other = nvme.SwapFolder(str(tmp_path / "new")), nvme.SwapFolder(str(tmp_path / "new"))
    assert mine.folder != other.folder
    assert mine.folder.stat().st_mode & 0o777 == 0o700
    (mine.folder / "weights").write_bytes(bytes(100))
    mine.close()
    mine.close()
    assert not mine.folder.exists()
    assert other.folder.is_dir()
    other.close()


KILLED = """
import os, signal, sys
from lmtrain.engine.nvme import SwapFolder
swap = SwapFolder(sys.argv[1])
(swap.folder / "weights").write_bytes(bytes(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    living = nvme.SwapFolder(str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    left = [path for path in tmp_path.glob("lmtrain-swap-*") if path != living.folder]
    assert len(left) == 1
    nvme.SwapFolder(str(tmp_path)).close()
    assert not left[0].exists()
    assert living.folder.is_dir(), "a living process lost its weights"
    living.close()


def test_where_no_file_can_be_read_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"nvme_path = .*file cannot be used"):
        nvme.SwapFolder(str(tmp_path / "file"))
    real = os.open

    def no_direct(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", no_direct)
    with pytest.raises(EngineError, match="no direct reads and writes"):
        nvme.SwapFolder(str(tmp_path))
    monkeypatch.undo()
    assert list(tmp_path.glob("lmtrain-swap-*")) == []


def _build(folder: Path, inside: Path) -> None:
    with nvme.only_builder(folder):
        assert not inside.exists(), "two build at a time"
        inside.touch()
        for _ in range(200):
            os.sched_yield()
        inside.unlink()


def test_one_builds_at_a_time_and_the_lock_of_a_killed_build_goes(tmp_path: Path) -> None:
    lock = tmp_path / "ext" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=_build, args=(tmp_path / "ext", tmp_path / "inside")) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0] * 4
    assert not lock.exists()


def without_libaio(place: Place, folder: Path) -> str:
    """An engine on a host whose compiler finds no libaio."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder.has_function = lambda self, *given: False
    try:
        engine_for(small_model("rnn"), place, micro=12, zero_stage=3, offload="nvme", nvme_path=str(folder / "disk"))
    except EngineError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_host_without_libaio(tmp_path: Path) -> None:
    (said,) = spawn("tests.engine.test_nvme:without_libaio", world=1, folder=tmp_path)
    assert said == "offload to NVMe needs libaio with its headers; apt-get install libaio-dev"
    assert not (tmp_path / "disk").exists()
