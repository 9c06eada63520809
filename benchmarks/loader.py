"""Rates of the loader beside a plain memory map and torch's DataLoader, and the time to the first batch.

    python -m benchmarks.loader [--tokens 50000000] [--seconds 2] [--rounds 5] [--json benchmarks/results/loader.json]

One synthetic corpus in the real format (uint16, rows of 1,024 symbols, batches of 8, one process; CRC32C on). All
contenders take turns in one run, so that a busy machine is busy for all of them: read the ratios, not the rates.
The peers give symbols only; the loader gives symbols, weights, start symbols and positions. "Cold" is the first epoch,
in which every MiB is verified; the files are in the page cache for every contender alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lmtrain.data import layout
from lmtrain.data.loader import DataConfig, Loader
from lmtrain.data.shards import finish, open_corpus, write_block

CONTEXT, BATCH, ALPHABET = 1024, 8, 50_257
END = ALPHABET - 1
HEADER = {
    "kind": "text",
    "alphabet": ALPHABET,
    "bos": END,
    "split": {"kind": "hash", "splits": {"train": {"groups": [0], "buckets": [0, 1000]}}},
}


def synthetic_corpus(folder, *, tokens):
    """A corpus of `tokens` symbols, documents of about 600 symbols, blocks of 16 M; returns a flat copy's path."""
    random = np.random.default_rng(0)
    infos = []
    for number, start in enumerate(range(0, tokens, 16_000_000)):
        symbols = np.minimum(random.zipf(1.2, min(16_000_000, tokens - start)), END - 1)
        ends = np.unique(np.append(np.cumsum(random.integers(1, 1200, len(symbols) // 500)), len(symbols)))
        parts = np.split(symbols, ends[ends < len(symbols)])
        for part in parts:
            part[-1] = END
        documents = [(f"{number}:{at}".encode(), part, 0, 0) for at, part in enumerate(parts)]
        infos.append(write_block(folder, number, documents, dtype="uint16"))
    finish(folder, header=HEADER, blocks=infos)
    flat = folder / "flat.u16"
    with flat.open("wb") as file:
        for number in range(len(infos)):
            file.write((folder / layout.tokens_name(number)).read_bytes())
    return flat


def sparse_corpus(folder, *, symbols, blocks, document, marks=None):
    """A corpus of any size whose token files are holes: zeros, an end symbol every `document` symbols, and `marks`.

    symbols must be a multiple of blocks * document. marks: {position: symbol}. Every checksum is right, except the
    token files' sha256, which only `verify` would read.
    """
    each = symbols // blocks
    assert each % document == 0
    assert each * blocks == symbols
    written = dict.fromkeys(range(document - 1, symbols, document), END) | (marks or {})
    zeros = layout.crc32c(bytes(layout.MIB))
    files, dtype = {}, np.dtype("<u2")
    for number in range(blocks):
        path = folder / layout.tokens_name(number)
        size = each * dtype.itemsize
        checks = np.full(-(-size // layout.MIB), zeros, "<u4")
        with path.open("w+b") as file:
            file.truncate(size)
            touched = {(each * dtype.itemsize - 1) // layout.MIB}
            for at, symbol in written.items():
                if number * each <= at < (number + 1) * each:
                    offset = (at - number * each) * dtype.itemsize
                    file.seek(offset)
                    file.write(np.array(symbol, dtype).tobytes())
                    touched.add(offset // layout.MIB)
            for mib in touched:
                file.seek(mib * layout.MIB)
                checks[mib] = layout.crc32c(file.read(layout.MIB))
        files[path.name] = {"size": size, "sha256": ""}
        rows = np.zeros(each // document, layout.DOCUMENT)
        rows["offset"] = np.arange(len(rows), dtype=np.uint64) * np.uint64(document)
        rows["symbols"] = rows["bytes"] = document
        for name, data in ((layout.documents_name(number), rows), (layout.checks_name(number), checks)):
            files[name] = layout.write_file(folder / name, data)
    index = np.zeros((len(layout.FIELDS), layout.GROUPS * layout.BUCKETS + 1, blocks), "<i8")
    for field, value in enumerate((each, each // document, each, 0)):
        index[field, 1:] = value
    files[layout.INDEX] = layout.write_file(folder / layout.INDEX, index)
    crcs = layout.crc32c_per_mib(memoryview(index.tobytes()))
    files[layout.INDEX_CHECKS] = layout.write_file(folder / layout.INDEX_CHECKS, crcs)
    splits = {"kind": "hash", "splits": {"train": {"groups": [0], "buckets": [[0, 1000]]}}}
    manifest = {
        **HEADER,
        "version": layout.VERSION,
        "dtype": "uint16",
        "blocks": blocks,
        "split": splits,
        "counts": {"train": {"documents": symbols // document, "symbols": symbols, "bytes": symbols, "words": 0}},
        "dropped": [],
        "files": files,
    }
    manifest["fingerprint"] = layout.fingerprint(manifest)
    layout.write_file(folder / layout.MANIFEST, layout.canonical(manifest))


class Ours:
    """The loader; `cold` opens the corpus afresh each time."""

    def __init__(self, folder, *, cold=False, config=None):
        self.folder, self.cold = folder, cold
        self.config = config or DataConfig(corpus=str(folder), context=CONTEXT, global_batch=BATCH)
        self.loader, self.step = self.fresh(), 0
        self.epoch = -(-open_corpus(folder).split("train").rows(CONTEXT) // BATCH)
        if not cold:
            self.batches(self.epoch)  # touches, and verifies, every MiB

    def fresh(self):
        return Loader([open_corpus(self.folder)], self.config, seed=1)

    def batches(self, count):
        if self.cold:
            self.loader, self.step, count = self.fresh(), 0, self.epoch
        for _ in range(count):
            self.loader.batch(self.step, 0, 1)
            self.step += 1
        return count


class PlainMap:
    """A memory map cut into rows, a permutation as an array, a gather, a conversion."""

    def __init__(self, flat):
        data = np.memmap(flat, np.uint16, "r")
        self.rows = data[: len(data) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
        self.order, self.at = np.random.default_rng(1).permutation(len(self.rows)), 0

    def batches(self, count):
        for _ in range(count):
            if self.at + BATCH > len(self.order):
                self.at = 0
            torch.from_numpy(self.rows[self.order[self.at : self.at + BATCH]].astype(np.int64))
            self.at += BATCH
        return count


class Windows(Dataset):
    """The map-style dataset that one writes for a memory map."""

    def __init__(self, flat):
        self.flat, self.data = flat, None

    def __len__(self):
        return os.path.getsize(self.flat) // 2 // CONTEXT

    def __getitem__(self, at):
        if self.data is None:
            self.data = np.memmap(self.flat, np.uint16, "r")
        return torch.from_numpy(self.data[at * CONTEXT : (at + 1) * CONTEXT].astype(np.int64))


class TorchLoader:
    """torch.utils.data.DataLoader over it, shuffled; workers are started before the clock."""

    def __init__(self, flat, workers):
        self.loader = DataLoader(
            Windows(flat), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        self.iterator = iter(self.loader)

    def batches(self, count):
        for _ in range(count):
            try:
                next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.loader)
        return count


def rate(contender, seconds):
    """Symbols a second over at least `seconds`."""
    began, done = time.perf_counter(), 0
    while True:
        done += contender.batches(50)
        spent = time.perf_counter() - began
        if spent >= seconds:
            return done * BATCH * CONTEXT / spent


FIRST = """
import json, sys, time
import torch
from lmtrain.data.loader import DataConfig, Loader
from lmtrain.data.shards import open_corpus
torch.set_num_threads(1)
began = time.perf_counter()
loader = Loader([open_corpus(sys.argv[1])], DataConfig(corpus=sys.argv[1], context=1024, global_batch=8), seed=1)
loader.batch(int(sys.argv[2]), 0, 1)
print(time.perf_counter() - began)
"""


def first_batch(folder, step):
    """Seconds from nothing open to the first batch, in a process of its own; imports are not timed."""
    command = [sys.executable, "-c", FIRST, str(folder), str(step)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(folder, *, tokens, seconds, rounds):
    """All rates (M symbols/s, one a round) and first batches (seconds)."""
    small, huge = folder / "small", folder / "huge"
    small.mkdir()
    huge.mkdir()
    flat = synthetic_corpus(small, tokens=tokens)
    contenders = {
        "lmtrain, from the second epoch": Ours(small),
        "lmtrain, cold (first touch)": Ours(small, cold=True),
        "plain memory map": PlainMap(flat),
        "torch DataLoader, 0 workers": TorchLoader(flat, 0),
        "torch DataLoader, 2 workers": TorchLoader(flat, 2),
    }
    rates = {name: [] for name in contenders}
    for contender in contenders.values():
        rate(contender, 0.2)
    for _ in range(rounds):
        for name, contender in contenders.items():
            rates[name].append(rate(contender, seconds) / 1e6)
    del contenders
    steps = tokens // CONTEXT // BATCH
    first = {
        f"{tokens:.0e} symbols, step {step}": first_batch(small, step) for step in (0, steps // 2, 1000 * steps + 7)
    }
    sparse_corpus(huge, symbols=10**12, blocks=64, document=15_625_000, marks={})
    for step in (0, 61_035_156, 10**12):
        first[f"1e+12 symbols (sparse), step {step}"] = first_batch(huge, step)
    return rates, first


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rates, first = measure(Path(folder), tokens=given.tokens, seconds=given.seconds, rounds=given.rounds)
    peers = [name for name in rates if name.startswith("torch")]
    best = [max(pair) for pair in zip(*(rates[name] for name in peers), strict=True)]
    print(f"{'loader (uint16, 8 x 1,024, one process)':42} {'M symbols/s':>12} {'x the better DataLoader':>24}")
    table = {}
    for name, values in rates.items():
        ratio = statistics.median(value / other for value, other in zip(values, best, strict=True))
        table[name] = {"million_symbols_per_second": values, "times_better_dataloader": ratio}
        print(f"{name:42} {statistics.median(values):12.1f} {ratio:24.2f}")
    print(f"\n{'first batch, from nothing open':42} {'ms':>12}")
    for name, seconds in first.items():
        print(f"{name:42} {seconds * 1e3:12.1f}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"rates": table, "first_batch_seconds": first}, indent=1) + "\n")


if __name__ == "__main__":
    main()
