"""Small prepared corpora for tests, and what they hold according to the plainest reading of the format."""

import hashlib

import numpy as np

from lmtrain.data.shards import finish, write_block
from lmtrain.data.tokenizer import TokenizerConfig, train

SPLITS = {
    "train": {"groups": [0], "buckets": [0, 700]},
    "valid": {"groups": [0], "buckets": [[700, 850]]},
    "test": {"groups": [0], "buckets": [[850, 1000]]},
}


def random_documents(count, *, seed=0, longest=200, top=256):
    """Raw bytes (below `top`) of `count` documents, some of them empty."""
    random = np.random.default_rng(seed)
    return [random.integers(0, top, random.integers(0, longest + 1)).astype(np.uint8).tobytes() for _ in range(count)]


def write(
    folder, blocks, *, splits=SPLITS, dropped=(), dtype="uint16", shift=0, end=256, alphabet=257, group=None, label="a"
):
    """Prepare blocks of raw documents, symbol = byte + shift, and the bytes tokenizer; returns the fingerprint.

    group: a function of the raw bytes, default 0.
    """
    infos = []
    for number, raws in enumerate(blocks):
        documents = [
            (raw, np.append(np.frombuffer(raw, np.uint8).astype(np.int64) + shift, end), group(raw) if group else 0, 7)
            for raw in raws
        ]
        infos.append(write_block(folder, number, documents, dtype=dtype))
    tokenizer = train(TokenizerConfig(kind="bytes"), iter(()), recipe={})
    tokenizer.save(folder / "tokenizer")
    header = {
        "kind": "text",
        "alphabet": alphabet,
        "bos": end,
        "tokenizer": {"kind": "bytes", "sha256": tokenizer.sha256, "file": "tokenizer"},
        "split": {"kind": "hash", "splits": splits},
        "label": label,
    }
    count = np.ones(alphabet, np.int64)
    count[end] = 0
    return finish(folder, header=header, blocks=infos, dropped=dropped, symbol_bytes_V=count)


def one_split(folder, raws, **more):
    """A corpus of one block whose only split, `train`, has every document."""
    return write(folder, [raws], splits={"train": {"groups": [0, 1, 2], "buckets": [0, 1000]}}, **more)


def bucket(raw):
    """The bucket of a document, as the format's definition says it."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") % 1000


def documents_of(blocks, wanted, *, dropped=(), group=None):
    """The raw documents of a split, in order: block by block, by (group, bucket), then by arrival.

    wanted: function of (group, bucket). dropped: "block:row" with rows counted in that order.
    """
    out = []
    for number, raws in enumerate(blocks):
        keyed = [(group(raw) if group else 0, bucket(raw), arrival, raw) for arrival, raw in enumerate(raws)]
        for row, (of, at, _, raw) in enumerate(sorted(keyed)):
            if wanted(of, at) and f"{number}:{row}" not in dropped:
                out.append(raw)
    return out
