"""Real processes tied together, one of which is killed, stopped, stuck, fails or leaves: it is named, and all end."""

import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lmtrain.hub import Hub
from lmtrain.keeper import Keeper
from tests.spawn import free_port

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 2.0
DEEDS = [("kill", 0), ("stop", 0), ("stop", 1), ("hang", 1), ("raise", 0), ("raise", 1), ("exit", 1), ("leave", 1)]
RANK = """
    import ctypes, os, signal, socket, sys, time
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
        section.begin()
        section.enter("batch of step 7")
        time.sleep(0.7)  # some beats
        if what in ("well", "busy"):
            if what == "busy" and rank == guilty:  # no thread can run meanwhile: PyDLL keeps the lock
                ctypes.PyDLL(None).usleep(int(2.5e6 * timeout))
        elif rank != guilty:
            while not os.path.exists(sys.argv[7]):
                time.sleep(0.01)
            section.enter("step 7")
            with section.waiting():
                time.sleep(100)
        if rank == guilty:
            open(sys.argv[7], "w").close()
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


def run(world, guilty, what, folder):
    """Exit codes and what was printed by rank, and the seconds from the deed to the last other rank's end."""
    port = free_port()
    script = textwrap.dedent(RANK)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, (rank, world, port, guilty, TIMEOUT, what, folder / "done"))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for rank, one in enumerate(ranks):
            if rank != guilty:
                one.wait(120)
        ended = time.time()
        ranks[guilty].wait(120)
    finally:
        for one in ranks:
            if one.poll() is None:
                one.kill()
        text = [one.communicate() for one in ranks]
    done = float(text[guilty][0].split()[1])
    return [one.returncode for one in ranks], [err for _, err in text], ended - done, ranks[guilty].pid


@pytest.mark.slow
@pytest.mark.parametrize(("what", "guilty"), DEEDS)
def test_the_guilty_rank_is_named_and_all_end(what, guilty, tmp_path):
    codes, errors, seconds, pid = run(3, guilty, what, tmp_path)
    print(f"{what} of rank {guilty}: all ended {seconds:.1f} s later, time-out {TIMEOUT:g} s")
    assert seconds < 30 * TIMEOUT  # on a machine that does other things; tests/cluster holds it to 3 time-outs
    others = [code for rank, code in enumerate(codes) if rank != guilty]
    assert all(code not in (0, None) for code in others), (codes, errors)
    assert codes[guilty] == {"stop": -9, "kill": -9, "leave": 0, "raise": 1, "exit": 1, "hang": 5}[what]
    speaker = errors[0] if guilty else "".join(errors[1:])
    assert f"rank {guilty} of 3" in speaker, errors
    if guilty:
        assert f"on {socket.gethostname()} (pid {pid})" in errors[0]
        assert "'batch of step 7'" in errors[0]
    reason = {
        "kill": "killed, or left early",
        "leave": "killed, or left early",
        "stop": "no sign of life",
        "hang": "makes no progress",
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
def test_a_rank_that_the_hub_does_not_answer_leaves_by_itself():
    """As when the host of rank 0, or the link to it, is down: rank 1 waits, and hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        script = textwrap.dedent(RANK)
        arguments = [*map(str, (1, 2, mute.getsockname()[1], 0, TIMEOUT, "kill", __file__))]
        ended = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 5
    assert "lmtrain [rank 1]: rank 0 of 2 at 127.0.0.1 does not come" in ended.stderr
    assert "its host has given no sign of life" in ended.stderr


@pytest.mark.slow
def test_an_error_of_ours_keeps_its_exit_code_on_all_ranks(tmp_path):
    codes, errors, _, _ = run(2, 1, "config", tmp_path)
    assert codes[0] == 2, errors
    assert "planted" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["well", "busy"])
def test_when_all_is_well_nobody_says_anything(what, tmp_path):
    """Not even when a rank shows no sign of life for longer than the time-out, as long as no other one waits."""
    codes, errors, _, _ = run(3, 1, what, tmp_path)
    assert codes == [0, 0, 0]
    assert errors == ["", "", ""]


def test_a_stranger_is_shown_the_door():
    """Who does not know the secret, or talks nonsense, is cut off; nobody is accused of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(listener, 2, "secret", limit=100.0, patience=100.0, beat=0.05)
    threading.Thread(target=hub.serve, daemon=True).start()
    hello = {"rank": 1, "host": "h", "pid": 1, "token": "secret"}
    for words in (
        b"GET / HTTP/1.0\n",
        b"[]\n",
        b"null\n",
        b'"token"\n',
        json.dumps({**hello, "token": "guess"}).encode() + b"\n",
        b'{"rank": Infinity}\n',
        b'{"rank": Infinity, "token": "guess"}\n',
        b'{"rank": Infinity, "token": "secret"}\n',
        b'{"rank": 1, "host": "h", "pid": Infinity, "token": "secret"}\n',
        b"[" * 4_000 + b"\n",
        b"[" * 60_000 + b"\n",
        bytes(range(256)) + b"\n",
        b"\x00\xff" * 3_000,
        b"x" * 5_000,
        b"x" * 200_000,
        json.dumps({**hello, "host": "h" * 5_000}).encode() + b"\n",
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


def test_a_last_word_arrives_whatever_the_hub_says_meanwhile():
    """The keeper closes its connection in order, never with lines unread: that would be a reset, which may lose it."""
    ours, theirs = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, ours, theirs:
        hello = {"rank": 1, "world": 2, "host": "h", "pid": 1, "token": "secret"}
        limits = {"limit": 100.0, "patience": 100.0, "beat": 0.05}
        keeper = Keeper(theirs, {"where": listener.getsockname(), "hello": hello, **limits})
        thread = threading.Thread(target=keeper.keep, daemon=True)
        thread.start()
        line, _ = listener.accept()
        with line:
            line.settimeout(60)
            ours.sendall(b'{"kind": "bye"}\n')
            ours.shutdown(socket.SHUT_WR)
            line.sendall(b'{"kind": "beat"}\n' * 20_000)
            said = b""
            while read := line.recv(1000):
                said += read
        thread.join(60)
    assert not thread.is_alive()
    words = [json.loads(word) for word in said.splitlines()]
    assert words[0] == hello
    assert {"kind": "bye"} in words
