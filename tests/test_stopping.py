"""Signals and the file STOP: only a flag, agreed by all ranks; and no rank outlives its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lmtrain.errors import EngineError
from lmtrain.stopping import STOP_FILE, Stop
from tests.fake_ranks import FakeEngine, engines, on_all

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_a_flag_and_handlers_come_back(tmp_path: Path, name: str) -> None:
    (engine,) = engines(1)
    number = signal.Signals[name]
    received: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    mine = lambda n, frame: received.append(n)  # noqa: E731
    signal.signal(number, mine)
    try:
        with Stop(tmp_path) as stop:
            assert stop.requested(engine) is None
            for _ in range(3):
                os.kill(os.getpid(), number)
            assert stop.requested(engine) == name
            assert stop.requested(engine) == name
            assert received == []
        assert signal.getsignal(number) is mine
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_handlers_come_back_after_an_error(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="boom"), Stop(tmp_path):
        raise RuntimeError("boom")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("flagged", [0, 1, 2])
def test_all_ranks_agree_when_one_was_signalled(tmp_path: Path, flagged: int) -> None:
    ranks = engines(3)
    stops = [Stop(tmp_path) for _ in ranks]
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == [None] * 3
    stops[flagged]._on_signal(signal.SIGUSR1, None)
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == ["SIGUSR1"] * 3
    stops[(flagged + 1) % 3]._on_signal(signal.SIGTERM, None)
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == ["SIGTERM"] * 3
    stops[(flagged + 1) % 3]._on_signal(signal.SIGUSR1, None)
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == ["SIGTERM"] * 3


def test_the_file_is_seen_obeyed_and_removed(tmp_path: Path) -> None:
    ranks = engines(2)
    stops = [Stop(tmp_path) for _ in ranks]
    for stop in stops:
        stop.__enter__()
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == [None] * 2
    (tmp_path / STOP_FILE).touch()
    assert on_all(ranks, lambda e: stops[e.rank].requested(e)) == ["the file STOP"] * 2
    assert (tmp_path / STOP_FILE).exists(), "until the run has saved"
    for stop in reversed(stops):
        stop.__exit__(None, None, None)
    assert not (tmp_path / STOP_FILE).exists()


def test_the_file_stays_when_it_was_not_obeyed(tmp_path: Path) -> None:
    (engine,) = engines(1)
    with Stop(tmp_path):
        (tmp_path / STOP_FILE).touch()
    assert (tmp_path / STOP_FILE).exists()

    def fail_to_save(stop: Stop) -> None:
        assert stop.requested(engine) == "the file STOP"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Stop(tmp_path) as stop:
        fail_to_save(stop)
    assert (tmp_path / STOP_FILE).exists()


def test_another_thread_is_refused(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def enter() -> None:
        try:
            Stop(tmp_path).__enter__()
        except EngineError as error:
            found.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert [str(error) for error in found] == ["signals are handled in the main thread; train in it"]


@pytest.mark.slow
def test_a_storm_of_signals_cannot_cut_a_save_short(tmp_path: Path) -> None:
    """A real process saves in a loop under SIGTERM and SIGUSR1 from outside; it ends by itself, all saves whole."""
    script = """
        import sys
        from pathlib import Path
        from lmtrain.checkpoint import CheckpointConfig, Checkpoints, faults
        from lmtrain.stopping import Stop
        from tests.fake_ranks import engines
        folder = Path(sys.argv[1])
        engine, = engines(1)
        checkpoints = Checkpoints(folder, CheckpointConfig())
        with Stop(folder) as stop:
            print("ready", flush=True)
            while stop.requested(engine) is None:
                pass
            for step in range(15):
                checkpoints.save(engine, step=step, state={})
                assert stop.requested(engine)
            assert not any(faults(saved.path) for saved in checkpoints.list())
            print("saved", checkpoints.newest().step, flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        done = threading.Event()

        def storm() -> None:
            while not done.wait(0.001):
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGUSR1)

        thread = threading.Thread(target=storm)
        thread.start()
        answer = process.stdout.readline()
        done.set()
        thread.join()
        process.stdin.close()
        assert answer == "saved 14\n"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_ends_with_the_launcher_that_was_killed(tied: bool) -> None:
    child = f"""
        import os, time
        from lmtrain.stopping import die_with_parent
        if {tied}:
            assert die_with_parent()
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, textwrap.dedent(child)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        assert alive(pid)
        parent.kill()
        parent.wait()
        end = time.monotonic() + (20 if tied else 0.5)
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert alive(pid) is not tied
    finally:
        parent.kill()
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_the_fake_engine_is_collective() -> None:
    """What the tests above rest on: nobody passes `agree` before all have come."""
    ranks: list[FakeEngine] = engines(3)
    assert on_all(ranks, lambda e: e.agree(e.rank)) == [2, 2, 2]


def test_leaving_loses_no_word_and_runs_what_was_registered() -> None:
    """But no thread is waited for, and the interpreter is not taken down."""
    script = """
        import atexit, sys, threading, time
        from lmtrain.stopping import leave
        class Last:
            def __del__(self):
                print("taken down", flush=True)
        kept = Last()
        atexit.register(lambda: print("registered"))
        threading.Thread(target=time.sleep, args=(1000,)).start()
        sys.stdout.write("said ")
        leave(75)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (75, "said registered\n", "")
