"""`lmtrain compress` and `decompress`: every byte back, at the model's own length, and nothing from a damaged file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain import models, use
from lmtrain.corpora import spec_of
from lmtrain.data import images, tokenizer
from lmtrain.data.memory import MemoryCorpus
from lmtrain.data.symbols import Bytes, Characters
from lmtrain.errors import InputError, LmtrainError
from lmtrain.likelihood import container
from lmtrain.likelihood.compress import CompressConfig, Packed, compress_bytes, decompress_bytes
from lmtrain.protocol import LN2
from tests.house import config, lmtrain, texts

ROOT = Path(__file__).resolve().parents[1]
UNIGRAM = ROOT / "tokenizers" / "sotu-unigram-1024"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained just so far that text like its own takes less than it has."""
    folder = tmp_path_factory.mktemp("compress")
    texts(folder / "text")
    steps = {"steps": 60, "eval_every": 60, "save_every": 60, "log_every": 60}
    ran = lmtrain("train", config(folder, train={**steps, "seed": 3}, optimizer={"kind": "adamw", "lr": 0.01}))
    assert ran.code == 0, ran.err
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def opened(run: Path) -> use.Opened:
    return use.open_run(run)


def read_with(opened: use.Opened, tok: tokenizer.Tokenizer) -> use.Opened:
    """The run with another tokenizer, and a model of its alphabet away from uniform."""
    corpus = MemoryCorpus(tok, [b"a"])
    torch.manual_seed(0)
    model = models.build(opened.config.model, spec_of(corpus, opened.config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.1)
    return replace(opened, corpus=corpus, model=model)


@pytest.fixture(scope="module")
def readers(opened: use.Opened) -> dict[str, use.Opened]:
    characters = Characters(code_points=map(ord, "abc é"), byte_fallback=True, recipe={})
    bare = Characters(code_points=map(ord, "abcdefghijklmnop\n "), byte_fallback=False, recipe={})
    found = {"trained": opened, "bytes": read_with(opened, Bytes(recipe={}))}
    found |= {"characters": read_with(opened, characters), "characters alone": read_with(opened, bare)}
    return found | {"sentencepiece": read_with(opened, tokenizer.load(UNIGRAM))}


def back(opened: use.Opened, run: Path, packed: Packed) -> bytes:
    header, payloads = container.unpack(packed.data, where="x")
    if header.kind == "stored":
        return b"".join(payloads)
    return decompress_bytes(opened, run, header, payloads)


def holds(opened: use.Opened, run: Path, data: bytes, **how: int) -> Packed:
    """There and back; what must hold of the lengths."""
    packed = compress_bytes(opened, run, data, config=CompressConfig(**how), store=False)
    assert back(opened, run, packed) == data
    told = packed.told
    assert told["overhead_bytes"] <= 256 + 8 * told["blocks"]
    assert len(packed.data) == told["file_bytes"]
    if told["kind"] == "bytes":
        lanes = told["lanes"] if data else 0
        assert told["table_bits"] - 1e-6 <= told["payload_bits"] <= told["table_bits"] + 96 * lanes
        assert told["payload_bits"] == told["coded_bits"]
    return packed


def png() -> bytes:
    return images.encode(np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8))


AWKWARD = {
    "empty": b"",
    "one byte": b"\xff",
    "nul": b"\0",
    "crlf": b"a\r\nb\rc\n\n\0 \t\x1a",
    "text": "A model gives every symbol its probability. ▁ é\u0301 \U0001f600\n".encode(),
    "invalid utf-8": b"\xc3(\xed\xa0\x80\xf4\x90\x80\x80 ok \x80",
    "special": b"</s><unk><0x41>\xe2\x96\x81",
    "code": Path(__file__).read_bytes()[:60],
    "png": png()[:60],
    "random": np.random.default_rng(1).bytes(50),
    "zeros": bytes(60),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_files_come_back(readers: dict[str, use.Opened], run: Path, name: str) -> None:
    for reader, one in readers.items():
        packed = holds(one, run, AWKWARD[name])
        wanted = ("bytes", "stored") if reader == "characters alone" else ("bytes",)
        assert packed.told["kind"] in wanted, reader


@pytest.mark.slow
def test_whole_files_come_back_in_the_lanes_of_the_default(opened: use.Opened, run: Path) -> None:
    picture = images.encode(np.random.default_rng(0).integers(256, size=(40, 23, 3), dtype=np.uint8))
    data = picture + bytes(3_000) + np.random.default_rng(1).bytes(900) + Path(__file__).read_bytes()[:2_000]
    packed = holds(opened, run, data, stride=16)
    assert packed.told["lanes"] == len(data) // 4096 == 2


def _any_bytes(readers: dict[str, use.Opened], run: Path, *, count: int) -> None:
    pieces = st.one_of(st.binary(max_size=40), st.text(max_size=20).map(lambda text: text.encode("utf-8", "ignore")))
    text = st.lists(pieces, max_size=3).map(b"".join)

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(text, st.sampled_from(sorted(readers)), st.integers(1, 4), st.sampled_from([1, 7, 1000]), st.integers(1, 16))
    def check(data: bytes, reader: str, lanes: int, block: int, stride: int) -> None:
        holds(readers[reader], run, data, lanes=lanes, block=block, stride=stride)

    check()


@pytest.mark.slow
def test_any_bytes_come_back(readers: dict[str, use.Opened], run: Path) -> None:
    _any_bytes(readers, run, count=40)


@pytest.mark.exhaustive
def test_any_bytes_come_back_many_times(readers: dict[str, use.Opened], run: Path) -> None:
    _any_bytes(readers, run, count=600)


@pytest.mark.parametrize("stride", [16, 4])
def test_the_length_is_that_of_the_evaluation(opened: use.Opened, run: Path, tmp_path: Path, stride: int) -> None:
    """One lane in blocks; the evaluation scores the end symbol too, and nothing else differs."""
    data = ROOT.joinpath("README.md").read_bytes()[:400]
    (tmp_path / "f").write_bytes(data)
    mode = ["--set", "eval.mode=sliding", "--set", f"eval.stride={stride}"] if stride < 16 else []
    result = json.loads(lmtrain("eval", run, "-d", tmp_path / "f", "--json", *mode).out)[str(tmp_path / "f")]
    told = holds(opened, run, data, lanes=1, block=110, stride=stride).told
    assert told["blocks"] == 4
    out = tmp_path / "scores.jsonl"
    ran = lmtrain("score", run, tmp_path / "f", "--per-symbol", "--out", out, *mode)
    assert ran.code == 0, ran.err
    _, row = (json.loads(line) for line in out.read_text().splitlines())
    assert row["symbols"] == told["symbols"] + 1 == 401
    end = row["symbol_nats"][-1] / LN2
    assert abs(result["nats"] / LN2 - end - told["table_bits"]) / len(data) <= 1e-3
    assert 0 <= told["payload_bits"] - (result["nats"] / LN2 - end) <= 96 + 1e-3 * len(data)


@pytest.fixture(scope="module")
def coded(opened: use.Opened, run: Path) -> bytes:
    data = (b"a model gives every symbol its probability and an engine makes it grow\n" * 9)[:600]
    return compress_bytes(opened, run, data, config=CompressConfig(lanes=2, block=100, stride=16)).data


def damaged(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    how = draw.randrange(4)
    if how == 0:
        return data[:at]
    if how == 1:
        return data + draw.randbytes(draw.randint(1, 9))
    if how == 2:
        return data[:at] + data[at + draw.randint(1, 9) :]
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def test_damage_is_named_before_a_model_is_opened(coded: bytes) -> None:
    header, payloads = container.unpack(coded, where="x")
    assert (len(payloads), container.pack(header, payloads)) == (6, coded)
    draw = random.Random(0)
    for _ in range(300):
        with pytest.raises(InputError, match=r"x.*(header|block \d of 6|last of 6 blocks)"):
            container.unpack(damaged(coded, draw), where="x")
    for byte in range(len(header.pack())):  # every byte of the header
        with pytest.raises(InputError, match="header"):
            container.unpack(coded[:byte] + bytes([coded[byte] ^ 1]) + coded[byte + 1 :], where="x")
    at = len(header.pack())
    first, second = (len(payload) + 8 for payload in payloads[:2])
    one, two, rest = coded[at : at + first], coded[at + first :][:second], coded[at + first + second :]
    with pytest.raises(InputError, match="block 0 of 6 is damaged"):
        container.unpack(coded[:at] + two + one + rest, where="x")


def test_a_damaged_file_leaves_no_output(run: Path, coded: bytes, tmp_path: Path) -> None:
    draw, file = random.Random(1), tmp_path / "a.lmz"
    for _ in range(30):
        file.write_bytes(damaged(coded, draw))
        ran = lmtrain("decompress", run, file)
        assert (ran.code, len(ran.err.splitlines())) == (7, 1), ran.err
        assert [path.name for path in tmp_path.iterdir()] == ["a.lmz"]


def test_whatever_cannot_be_is_one_line(run: Path, coded: bytes, tmp_path: Path, opened: use.Opened) -> None:
    file, other = tmp_path / "a.lmz", tmp_path / "other"
    file.write_bytes(coded)
    ran = lmtrain("decompress", run, file, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (told["raw_bytes"], told["kind"], told["out"]) == (600, "bytes", str(tmp_path / "a"))
    (tmp_path / "plain").write_text("no such file")
    header, payloads = container.unpack(coded, where="x")
    elsewhere = tmp_path / "elsewhere.lmz"
    elsewhere.write_bytes(container.pack(replace(header, machine="an abacus"), payloads))
    stranger = tmp_path / "stranger.lmz"
    stranger.write_bytes(container.pack(replace(header, model=bytes(16)), payloads))
    foreign = tmp_path / "foreign.lmz"
    foreign.write_bytes(container.pack(replace(header, meaning=bytes(16)), payloads))
    missing = tmp_path / "missing.lmz"
    missing.write_bytes(container.pack(replace(header, step=77), payloads))
    lying = tmp_path / "lying.lmz"  # sound checksums of what is not the coder's: another machine's numbers look so
    lying.write_bytes(container.pack(header, [payloads[0][:-2], *payloads[1:]]))
    for code, arguments, words in (
        (7, ("decompress", run, file), "is there already; give another name, or --force"),
        (7, ("decompress", run, tmp_path / "plain"), "no file of `lmtrain compress`"),
        (7, ("decompress", run, tmp_path / "none.lmz"), "cannot be read"),
        (7, ("compress", run, tmp_path / "none"), "cannot be read"),
        (7, ("compress", run, file, tmp_path), "is a folder"),
        (7, ("compress", run, file, tmp_path / "no" / "where"), "cannot be written"),
        (7, ("compress", run, file, other, "--pixels"), "--pixels is for images"),
        (7, ("compress", run, file, other, "--label", 1), "not told classes"),
        (2, ("compress", run, file, other, "--stride", 17), "stride 17 does not fit the context 16"),
        (5, ("decompress", run, elsewhere), "was coded with an abacus, and here is lmtrain"),
        (4, ("decompress", run, stranger), "coded by another model"),
        (4, ("decompress", run, foreign), "another tokenizer"),
        (4, ("decompress", run, missing), "no checkpoint of step 77"),
        (5, ("decompress", run, lying), "block 0 of 6: its words ran out"),
    ):
        ran = lmtrain(*arguments)
        assert (ran.code, len(ran.err.splitlines())) == (code, 1), (arguments, ran.err)
        assert words in ran.err
        assert not other.exists()
    assert lmtrain("decompress", run, elsewhere, "--try").code == 0
    assert (tmp_path / "elsewhere").read_bytes() == (tmp_path / "a").read_bytes()
    assert lmtrain("decompress", run, file, "--force").code == 0
    assert not list(tmp_path.glob(".*"))


def test_what_is_told(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    file.write_bytes(b"it and a model " * 60)
    ran = lmtrain("compress", run, file, "--json", "--lanes", 2)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (tmp_path / "f.txt.lmz").stat().st_size == told["file_bytes"]
    assert told["file_bytes"] == told["payload_bits"] / 8 + told["overhead_bytes"]
    assert told["bits_per_byte"] == pytest.approx(told["payload_bits"] / 900)
    assert set(told["rivals"]) == {"gzip -9", "bzip2 -9", "xz -9e", "zstd -19", "brotli -11"}
    assert max(told["rivals"].values()) < 900
    ran = lmtrain("compress", run, file, "--force", "--no-compare")
    assert "payload (1 lanes)" in ran.err
    assert "gzip" not in ran.err
    assert ran.out == ""


def test_what_the_model_would_lengthen_is_kept_as_it_is(opened: use.Opened, run: Path) -> None:
    data = np.random.default_rng(0).bytes(500)
    packed = compress_bytes(opened, run, data, config=CompressConfig())
    assert packed.told["kind"] == "stored"
    assert packed.told["payload_bits"] == 4000 < packed.told["coded_bits"]
    assert back(opened, run, packed) == data


@pytest.mark.slow
def test_processes_with_other_threads_agree(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"a model gives every symbol its probability " * 20)

    def lmtrain_with(threads: int, *arguments: object) -> None:
        command, environment = [sys.executable, "-m", "lmtrain", *map(str, arguments)], dict(os.environ)
        environment["OMP_NUM_THREADS"] = str(threads)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    lmtrain_with(1, "compress", run, file, "--lanes", 3, "--no-compare", "--verify")
    coded = (tmp_path / "f.lmz").read_bytes()
    lmtrain_with(4, "compress", run, file, tmp_path / "again.lmz", "--lanes", 3, "--no-compare")
    assert (tmp_path / "again.lmz").read_bytes() == coded
    for threads in (1, 3):
        lmtrain_with(threads, "decompress", run, tmp_path / "f.lmz", tmp_path / f"{threads}")
        assert (tmp_path / f"{threads}").read_bytes() == file.read_bytes()


def test_verify_refuses_what_does_not_come_back(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that claims another step: the fresh process cannot decode, and no file is left."""
    pack = container.pack
    monkeypatch.setattr(container, "pack", lambda header, payloads: pack(replace(header, step=99), payloads))
    (tmp_path / "f").write_bytes(b"a model gives it and an engine " * 5)
    ran = lmtrain("compress", run, tmp_path / "f", "--verify")
    assert ran.code == 5
    assert "no checkpoint of step 99" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_hashes_know_models_apart(opened: use.Opened, readers: dict[str, use.Opened], run: Path, coded: bytes) -> None:
    header, payloads = container.unpack(coded, where="x")
    for one in readers.values():
        if one is not opened:
            with pytest.raises(LmtrainError, match=r"another (model|tokenizer)"):
                decompress_bytes(one, run, header, payloads)
