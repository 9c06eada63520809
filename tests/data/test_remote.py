"""A corpus behind a URL gives the batches of the same corpus on disk, through outages, from a cache with a bound."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lmtrain.data.cache import Cache
from lmtrain.data.layout import MIB
from lmtrain.data.loader import DataConfig, Loader
from lmtrain.data.shards import PreparedCorpus, open_corpus
from lmtrain.data.shelf import RemoteConfig
from lmtrain.errors import ConfigError, CorpusError
from tests.data.small import random_documents, write
from tests.data.test_loader import flat

SERVER = Path(__file__).with_name("range_server.py")
BOUND = 16 * MIB


class Server:
    """Serves a folder; `kill` is a SIGKILL, `start` comes back on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/corpus"

    def start(self) -> None:
        command = [sys.executable, "-S", str(SERVER), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A served folder whose `corpus` has three blocks of some 8 MiB of symbols: more than the cache may hold."""
    top = tmp_path_factory.mktemp("served")
    blocks = [random_documents(40, seed=seed, longest=400_000) for seed in range(3)]
    write(top / "corpus", blocks, dropped=["0:3", "2:0"])
    size = sum(path.stat().st_size for path in (top / "corpus").glob("tokens-*"))
    assert size > BOUND + 4 * MIB
    return top


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    served = Server(folder)
    yield served
    served.kill()


def settings(tmp_path: Path, **more: object) -> RemoteConfig:
    return RemoteConfig(**{"cache": str(tmp_path / "cache"), "cache_bytes": BOUND, "patience": 60.0, **more})


def loader(corpus: PreparedCorpus, *, block: int = 40) -> Loader:
    config = DataConfig(corpus="c", context=500, global_batch=24, micro_batch=6, block_windows=block)
    return Loader([corpus], config, seed=5, masking=True)


def taken(cache: Path) -> int:
    total = 0
    for path in list(cache.iterdir()) if cache.exists() else []:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def same_steps(near: Loader, afar: Loader, steps: list[int], cache: Path) -> None:
    for rank in range(2):
        with near.prefetching() as wanted, afar.prefetching() as given:
            for step in steps:
                ours, theirs = given.batch(step, rank, 2), wanted.batch(step, rank, 2)
                assert [flat(batch) for batch in ours] == [flat(batch) for batch in theirs]
                assert taken(cache) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 40])
def test_batches_over_http_are_those_from_disk(folder: Path, server: Server, tmp_path: Path, block: int) -> None:
    near = open_corpus(folder / "corpus")
    afar = open_corpus(server.url, remote=settings(tmp_path))
    assert str(afar.path) == server.url
    assert afar.fingerprint == near.fingerprint
    last = near.split("train").rows(500) // 24
    same_steps(
        loader(near, block=block), loader(afar, block=block), [0, 1, 2, 3, last - 1, last, last + 1], tmp_path / "cache"
    )
    for name in ("valid", "train"):
        one, other = near.split(name), afar.split(name)
        assert (one.symbols, one.documents, one.words, one.bytes) == (
            other.symbols,
            other.documents,
            7 * one.documents,
            one.bytes,
        )
        assert np.array_equal(one.document_ends(), other.document_ends())
        # Everything, in order: more than the cache may hold.
        for start, stop in pairwise([*range(0, one.symbols, 3 * MIB), one.symbols]):
            assert np.array_equal(one.read(start, stop), other.read(start, stop))
            assert taken(tmp_path / "cache") <= BOUND
    assert afar.decode(afar.encode(b"a b")) == b"a b"
    afar.verify()
    assert taken(tmp_path / "cache") > 8 * MIB
    afar.close()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_batches_from_memory_are_those_from_disk(folder: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(folder / "corpus"), "/here/corpus", recursive=True)
    near = open_corpus(folder / "corpus")
    afar = open_corpus("memory://here/corpus", remote=settings(tmp_path))
    same_steps(loader(near), loader(afar), [0, 1, 2, 70], tmp_path / "cache")
    afar.close()
    assert not (tmp_path / "cache").exists()
    assert open_corpus(f"file://{folder}/corpus").is_local


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back(folder: Path, server: Server, tmp_path: Path) -> None:
    waiting = threading.Event()
    near = loader(open_corpus(folder / "corpus"))
    corpus = open_corpus(server.url, remote=settings(tmp_path, ahead=2), note=lambda text: waiting.set())
    afar = loader(corpus)
    same_steps(near, afar, [0, 1], tmp_path / "cache")
    server.kill()

    def revive() -> None:
        if waiting.wait(60):  # somebody has asked, and waits
            server.start()

    thread = threading.Thread(target=revive)
    thread.start()
    same_steps(near, afar, [30, 31, 60, 90, 91], tmp_path / "cache")
    thread.join()
    assert waiting.is_set()
    corpus.close()
    assert not (tmp_path / "cache").exists()


def test_a_server_that_stays_away_is_an_error_that_names_the_shard(server: Server, tmp_path: Path) -> None:
    corpus = open_corpus(server.url, remote=settings(tmp_path, patience=1.0))
    split = corpus.split("train")
    server.kill()
    with pytest.raises(CorpusError, match=r"http://127.0.0.1:\d+/corpus/\S+ could not be read for \d s .*patience"):
        split.read(0, 10)
    corpus.close()
    server.start()


def test_a_shard_that_is_gone_or_damaged_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "tokens-00001.bin").unlink()
    path = tmp_path / "corpus" / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[MIB + 9] ^= 1
    path.write_bytes(data)
    served = Server(tmp_path)
    try:
        corpus = open_corpus(served.url, remote=settings(tmp_path))
        assert corpus.tokens(0).read(0, 100) == bytes(data[:100])
        with pytest.raises(CorpusError, match=r"tokens-00000\.bin arrived damaged in its MiB 1 .*3 times"):
            corpus.tokens(0).read(MIB, MIB + 1)
        with pytest.raises(CorpusError, match=r"tokens-00001\.bin is gone"):
            corpus.tokens(1).read(0, 10)
        corpus.close()
        with pytest.raises(CorpusError, match=r"nothing/manifest\.json is gone"):
            open_corpus(served.url.replace("corpus", "nothing"), remote=settings(tmp_path))
    finally:
        served.kill()


def test_a_piece_that_was_damaged_in_the_cache_is_fetched_anew(folder: Path, server: Server, tmp_path: Path) -> None:
    first = open_corpus(server.url, remote=settings(tmp_path))
    wanted = first.tokens(0).read(0, 1000)
    for path in (tmp_path / "cache").glob("*.piece"):
        if path.stat().st_size == MIB:
            path.write_bytes(bytes(MIB))
    second = open_corpus(server.url, remote=settings(tmp_path))
    assert second.tokens(0).read(0, 1000) == wanted
    first.close()
    assert (tmp_path / "cache").exists()
    second.close()
    assert not (tmp_path / "cache").exists()


def test_what_was_not_used_for_longest_goes_and_the_last_one_out_removes_all(tmp_path: Path) -> None:
    one, other = (Cache(tmp_path / "c", bound=10_000) for _ in range(2))
    for number in range(50):
        (one, other)[number % 2].put(f"p{number}", bytes([number]) * 1000)
        assert one.get("p0") == bytes(1000)  # used all the time
        assert other.get(f"p{number}") == bytes([number]) * 1000
        assert taken(tmp_path / "c") <= 10_000
    assert other.get("p20") is None
    one.put("huge", bytes(5000))
    assert one.get("huge") is None
    (tmp_path / "c" / "theirs").write_text("not ours")
    one.close()
    assert other.get("p49") is not None
    other.close()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["theirs"]


HAMMER = """
import sys
from pathlib import Path
from lmtrain.data.cache import Cache

cache = Cache(Path(sys.argv[1]), bound=100_000)
print("in", flush=True)
for turn in range(int(sys.argv[2])):
    number = turn * 7919 % 97
    with cache.busy(str(number)):
        found = cache.get(str(number))
        assert found in (None, bytes([number]) * 5000), number
        cache.put(str(number), bytes([number]) * 5000)
cache.close()
print("out", flush=True)
"""


@pytest.mark.slow
def test_processes_share_the_cache_and_one_that_is_killed_does_no_harm(tmp_path: Path) -> None:
    def start(turns: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HAMMER, str(tmp_path / "c"), str(turns)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        return process

    endless = start(10**9)
    workers = [start(1500), start(1500)]
    looks = 0
    while any(worker.poll() is None for worker in workers):
        assert taken(tmp_path / "c") <= 100_000
        looks += 1
        if looks == 5:
            endless.kill()
    assert looks > 5
    endless.kill()
    endless.wait()
    for worker in workers:
        assert worker.communicate()[0] == "out\n"
        assert worker.returncode == 0
    Cache(tmp_path / "c", bound=100_000).close()  # whoever comes last removes what is left
    assert not (tmp_path / "c").exists()


def test_credentials_do_not_belong_in_a_url() -> None:
    with pytest.raises(ConfigError, match=r"http://example\.org/c of a corpus carries credentials") as refused:
        open_corpus("http://user:secret@example.org/c")
    assert "secret" not in str(refused.value)
