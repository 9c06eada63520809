"""Real processes tied together, one of which is killed, stopped, stuck, fails or leaves: it is named, and all end."""

import json
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lmtrain.hub import Hub
from tests.spawn import free_port

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 5.0
RANK = """
    import os, signal, socket, sys, time
    from lmtrain import section
    from lmtrain.errors import ConfigError
    from lmtrain.lifeline import Lifeline
    rank, world, port, guilty = map(int, sys.argv[1:5])
    timeout, what = float(sys.argv[5]), sys.argv[6]
    where = ("127.0.0.1", port)
    listener = socket.create_server(where) if rank == 0 else None
    while rank:  # until rank 0 listens
        try:
            socket.create_connection(where).close()
            break
        except OSError:
            time.sleep(0.01)
    line = Lifeline(rank, world, where=where, token="secret", listener=listener, timeout=timeout)
    def planted_hang():
        time.sleep(100)
    with line:
        section.enter("batch of step 7")
        time.sleep(0.7)  # some beats
        if what != "well" and rank != guilty:
            section.enter("step 7")
            time.sleep(100)
        print("now", time.time(), flush=True)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            planted_hang()
        elif what == "raise":
            raise ValueError("planted")
        elif what == "config":
            raise ConfigError("planted")
        elif what == "exit":
            sys.exit(0)
        elif what == "leave":
            os._exit(0)
"""


def run(world, guilty, what):
    """Exit codes and what was printed by rank, and the seconds from the deed to the last other rank's end."""
    port = free_port()
    script = textwrap.dedent(RANK)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, (rank, world, port, guilty, TIMEOUT, what))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank, one in enumerate(ranks):
            if what != "stop" or rank != guilty:
                one.wait(60)
        ended = time.time()
    finally:
        for one in ranks:
            if one.poll() is None:
                one.kill()
        text = [one.communicate() for one in ranks]
    done = float(text[guilty][0].split()[1])
    return [one.returncode for one in ranks], [err for _, err in text], ended - done, ranks[guilty].pid


@pytest.mark.slow
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("what", ["kill", "stop", "hang", "raise", "exit", "leave"])
def test_the_guilty_rank_is_named_and_all_end(what, guilty):
    codes, errors, seconds, pid = run(3, guilty, what)
    print(f"{what} of rank {guilty}: all ended {seconds:.1f} s later, time-out {TIMEOUT:g} s")
    assert seconds < 3 * TIMEOUT
    others = [code for rank, code in enumerate(codes) if rank != guilty]
    assert all(code not in (0, None) for code in others), (codes, errors)
    speaker = errors[0] if guilty else "".join(errors[1:])
    assert f"rank {guilty} of 3" in speaker, errors
    if guilty:
        assert f"on {socket.gethostname()} (pid {pid})" in errors[0]
        assert "'batch of step 7'" in errors[0]
    reason = {
        "kill": "killed, or left early",
        "leave": "killed, or left early",
        "stop": "no sign of life",
        "hang": "made no progress",
        "raise": "ValueError: planted",
        "exit": "left early, with exit code 0",
    }[what]
    assert reason in speaker
    if what == "hang":
        assert "planted_hang" in speaker
    if what == "raise":
        assert "Traceback" in errors[guilty]
        assert not any("Traceback" in error for rank, error in enumerate(errors) if rank != guilty)


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_exit_code_on_all_ranks():
    codes, errors, _, _ = run(2, 1, "config")
    assert codes[0] == 2, errors
    assert "planted" in errors[0]


@pytest.mark.slow
def test_when_all_is_well_nobody_says_anything():
    codes, errors, _, _ = run(3, 0, "well")
    assert codes == [0, 0, 0]
    assert errors == ["", "", ""]


def test_a_stranger_is_shown_the_door():
    """Who does not know the secret, or talks nonsense, is cut off; nobody is accused of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(listener, 2, "secret", limit=100.0, beat=0.05)
    hub.start()
    hello = {"rank": 1, "host": "h", "pid": 1, "token": "secret"}
    for words in (
        b"GET / HTTP/1.0\n",
        b"[]\n",
        json.dumps({**hello, "token": "guess"}).encode() + b"\n",
        b"x" * 200_000,
    ):
        with socket.create_connection(listener.getsockname()) as line:
            line.settimeout(20)
            try:
                line.sendall(words)
                assert line.recv(10) == b""
            except ConnectionError:
                pass
    assert hub.verdict is None
    with socket.create_connection(listener.getsockname()) as line:
        line.settimeout(20)
        line.sendall(json.dumps(hello).encode() + b"\n")
        assert json.loads(line.makefile().readline()) == {"kind": "beat"}
    end = time.monotonic() + 20
    while hub.verdict is None and time.monotonic() < end:
        time.sleep(0.01)
    assert hub.verdict is not None
    assert hub.verdict["rank"] == 1
