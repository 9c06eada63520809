"""The prepared corpus: what is written is read back, whatever is damaged is found and named."""

import hashlib
import json
import shutil
import threading
import tracemalloc

import numpy as np
import pytest

from benchmarks.loader import sparse_corpus
from lmtrain.data import checked
from lmtrain.data import corpus as reading
from lmtrain.data.layout import MIB, canonical, columns, crc32c, fingerprint, runs, smallest_dtype
from lmtrain.data.shards import finish, finished_block, open_corpus, read_documents, write_block
from lmtrain.errors import CorpusError, TokenizerError
from tests.data.small import SPLITS, bucket, documents_of, one_split, random_documents, write

BLOCKS = [random_documents(90, seed=1), random_documents(1, seed=2), [], random_documents(140, seed=3)]


def by_first_byte(raw):
    return raw[0] % 3 if raw else 0


# ---- what is written is read back ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "top", "more"),
    [
        ("uint8", 200, {"end": 200, "alphabet": 201}),
        ("uint16", 256, {"end": 256, "alphabet": 257}),
        ("uint32", 256, {"shift": 70_000, "end": 70_300, "alphabet": 70_301}),
    ],
)
@pytest.mark.parametrize("dropped", [(), ("0:0", "0:1", "0:40", "1:0", "3:139", "3:7", "3:8")])
def test_a_split_reads_as_the_concatenation_of_its_documents(tmp_path, dtype, top, more, dropped):
    blocks = [random_documents(len(block), seed=at, top=top) for at, block in enumerate(BLOCKS)]
    write(tmp_path, blocks, dtype=dtype, dropped=dropped, **more)
    corpus = open_corpus(tmp_path)
    end, shift = more["end"], more.get("shift", 0)
    random = np.random.default_rng(0)
    for name, low, high in (("train", 0, 700), ("valid", 700, 850), ("test", 850, 1000)):
        raws = documents_of(blocks, lambda _, b, low=low, high=high: low <= b < high, dropped=dropped)
        whole = [np.append(np.frombuffer(raw, np.uint8).astype(np.int64) + shift, end) for raw in raws]
        ends = np.cumsum([len(one) for one in whole])
        whole = np.concatenate(whole)
        split = corpus.split(name)
        assert (split.symbols, split.documents) == (len(whole), len(raws))
        assert (split.bytes, split.words) == (sum(map(len, raws)), 7 * len(raws))
        assert split.bytes == corpus.symbol_bytes_V[whole].sum()
        assert np.array_equal(split.read(0, split.symbols), whole)
        assert split.read(0, split.symbols).dtype == np.int64
        assert np.array_equal(split.document_ends(), ends)
        assert corpus.manifest["counts"][name]["symbols"] == len(whole)
        for start, stop in np.sort(random.integers(0, len(whole) + 1, (50, 2))).tolist():
            assert np.array_equal(split.read(start, stop), whole[start:stop])
        assert split.start_symbol(0) == end
        assert all(split.start_symbol(at) == whole[at - 1] for at in random.integers(1, len(whole), 20).tolist())
        for context in (1, 2, 7, 64, 1000, len(whole), len(whole) + 5):
            check_rows(split, context, whole, ends, end)
    corpus.verify()


def check_rows(split, context, whole, ends, end):
    """All rows of a context, and a padding row, against the whole padded and reshaped."""
    rows = -(-len(whole) // context)
    assert split.rows(context) == rows
    begins = np.zeros(len(whole), bool)
    begins[np.append(0, ends[:-1])] = True

    def cut(values):  # with a row of nothing at the end: that is row -1
        return np.append(values, np.zeros((rows + 1) * context - len(values), values.dtype)).reshape(rows + 1, context)

    index = np.append(np.random.default_rng(context).permutation(rows), -1)
    batch = split.fetch(index, context, masking=True)
    weights = cut(np.ones(len(whole), np.float32))
    assert np.array_equal(batch.x_BT.numpy(), cut(whole)[index])
    assert np.array_equal(batch.weight_BT.numpy(), weights[index])
    assert np.array_equal(batch.cond.first_BT.numpy(), cut(begins)[index])
    starts = np.append(end, whole)[np.arange(rows) * context]
    assert np.array_equal(batch.cond.start_B.numpy(), np.append(starts, end)[index])
    assert np.array_equal(batch.position_B.numpy(), np.where(index < 0, -1, index * context))
    assert np.array_equal(split.row_symbols(index, context), weights.sum(1)[index])
    assert batch.x_BT.is_contiguous()
    assert split.fetch(index, context).cond.first_BT is None


def test_a_row_that_there_is_not_is_refused(tmp_path):
    write(tmp_path, BLOCKS)
    split = open_corpus(tmp_path).split("valid")
    for index in (split.rows(64), split.rows(64) + 10**12, -2):
        with pytest.raises(IndexError, match="valid"):
            split.fetch(np.array([0, index]), 64)
    for start, stop in ((-1, 3), (0, split.symbols + 1), (5, 4)):
        with pytest.raises(IndexError):
            split.read(start, stop)


def test_the_sources_own_splits_are_groups(tmp_path):
    splits = {name: {"groups": [group]} for group, name in enumerate(("train", "valid", "test"))}
    write(tmp_path, BLOCKS, splits=splits, group=by_first_byte)
    corpus = open_corpus(tmp_path)
    for group, name in enumerate(splits):
        raws = documents_of(BLOCKS, lambda g, _, group=group: g == group, group=by_first_byte)
        found = corpus.split(name).read(0, corpus.split(name).symbols)
        assert np.array_equal(found, np.concatenate([[*raw, 256] for raw in raws]))


def test_folds_are_sets_of_cells_and_share_no_document(tmp_path):
    write(tmp_path, BLOCKS)
    corpus = open_corpus(tmp_path)
    total = sum(corpus.split(name).symbols for name in SPLITS)
    seen = 0
    for fold in range(5):
        inside = [b for b in range(1000) if b * 5 // 1000 == fold]
        held = corpus.select(f"fold {fold}", [0], [(inside[0], inside[-1] + 1)])
        rest = corpus.select(f"not {fold}", [0], [(0, inside[0]), (inside[-1] + 1, 1000)])
        assert held.symbols + rest.symbols == total
        seen += held.symbols
        raws = documents_of(BLOCKS, lambda _, b, inside=inside: b not in inside)
        assert np.array_equal(rest.read(0, rest.symbols), np.concatenate([[*raw, 256] for raw in raws]))
    assert seen == total


def test_duplicates_cannot_straddle_a_split(tmp_path):
    raws = random_documents(200, seed=5, longest=30)
    write(tmp_path, [raws, raws[::-1], raws])
    corpus = open_corpus(tmp_path)
    found = []
    for name in SPLITS:
        split = corpus.split(name)
        found.append(
            {tuple(part.tolist()) for part in np.split(split.read(0, split.symbols), split.document_ends()[:-1])}
        )
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]
    assert sum(map(len, found)) == len(set(raws))


def test_the_same_documents_are_the_same_bytes(tmp_path):
    names = []
    for folder in ("one", "two"):
        fingerprints = write(tmp_path / folder, BLOCKS)
        files = {
            str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in (tmp_path / folder).rglob("*") if p.is_file()
        }
        names.append((fingerprints, files))
    assert names[0] == names[1]
    assert not [name for name in names[0][1] if name.startswith("block-") or name.endswith(".part")]
    assert write(tmp_path / "three", BLOCKS, dropped=["0:3"]) != names[0][0]
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_bytes())
    assert manifest["fingerprint"] == names[0][0]
    assert set(names[0][1]) == {*manifest["files"], "manifest.json"}  # every file, with its true size and hash
    for name, entry in manifest["files"].items():
        data = names[0][1][name]
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_document_table_is_what_the_format_says(tmp_path):
    write(tmp_path, BLOCKS, group=by_first_byte)
    table = read_documents(tmp_path, 0)
    assert table.dtype.itemsize == 56
    raws = documents_of(BLOCKS[:1], lambda *_: True, group=by_first_byte)
    assert table["bucket"].tolist() == [bucket(raw) for raw in raws]
    assert table["group"].tolist() == [by_first_byte(raw) for raw in raws]
    assert table["symbols"].tolist() == [len(raw) + 1 for raw in raws]
    assert table["offset"].tolist() == np.cumsum([0] + [len(raw) + 1 for raw in raws])[:-1].tolist()
    digests = [hashlib.sha256(raw).digest() for raw in raws]
    assert np.array_equal(table["hash"], np.frombuffer(b"".join(d[:8] for d in digests), "<u8"))
    assert np.array_equal(table["hash2"], np.frombuffer(b"".join(d[8:16] for d in digests), "<u8"))


def test_the_tokenizer_of_the_folder(tmp_path):
    write(tmp_path, BLOCKS)
    corpus = open_corpus(tmp_path)
    assert corpus.encode(b"\x00ab").tolist() == [0, 97, 98]
    assert corpus.decode([97, 256, 98]) == b"ab"


@pytest.mark.parametrize(("key", "value"), [("sha256", "0" * 64), ("alphabet", 300), ("bos", 5)])
def test_another_tokenizer_is_refused(tmp_path, key, value):
    write(tmp_path, BLOCKS)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    (manifest["tokenizer"] if key == "sha256" else manifest)[key] = value
    manifest["fingerprint"] = fingerprint(manifest)
    file.write_bytes(canonical(manifest))
    with pytest.raises(TokenizerError, match=str(value)):
        open_corpus(tmp_path).encode(b"x")


# ---- restarts and refusals of the writer -----------------------------------------------------------------------------


def test_a_finished_block_is_known_until_it_is_touched(tmp_path):
    documents = [(raw, np.append(np.frombuffer(raw, np.uint8), np.int64(256)), 0, 1) for raw in BLOCKS[0]]
    info = write_block(tmp_path, 0, documents, dtype="uint16")
    assert finished_block(tmp_path, 0) == info
    assert finished_block(tmp_path, 1) is None
    for name in [*info["files"], "block-00000.json"]:
        data = (tmp_path / name).read_bytes()
        for bad in (data[:-1], data[:10] + bytes([data[10] ^ 1]) + data[11:] if len(data) > 10 else b"xxxx", b""):
            (tmp_path / name).write_bytes(bad)
            assert finished_block(tmp_path, 0) is None
        (tmp_path / name).unlink()
        assert finished_block(tmp_path, 0) is None
        (tmp_path / name).write_bytes(data)
        assert finished_block(tmp_path, 0) == info


def test_the_writer_refuses_what_it_cannot_store(tmp_path):
    def block(symbols, *, group=0, dtype="uint8"):
        return write_block(tmp_path, 0, [(b"x", np.array(symbols), group, 0)], dtype=dtype)

    for symbols, group, dtype, message in (
        ([256], 0, "uint8", "outside uint8"),
        ([-1], 0, "uint8", "outside uint8"),
        ([], 0, "uint8", "end symbol"),
        ([1], 3, "uint8", "group 3"),
        ([1], 0, "int64", "use one of uint8"),
    ):
        with pytest.raises(CorpusError, match=message):
            block(symbols, group=group, dtype=dtype)
    header = {"kind": "text", "alphabet": 3, "bos": 2, "split": {"splits": {"train": {}}}}
    good = block([1, 2])
    for blocks, message in (([], "no documents"), ([{**good, "number": 1}], "each once"), ([good, good], "each once")):
        with pytest.raises(CorpusError, match=message):
            finish(tmp_path, header=header, blocks=blocks)
    with pytest.raises(CorpusError, match="symbol 2, the alphabet has 2"):
        finish(tmp_path, header={**header, "alphabet": 2}, blocks=[good])
    with pytest.raises(CorpusError, match="for 4 symbols were given, the alphabet has 3"):
        finish(tmp_path, header=header, blocks=[good], symbol_bytes_V=np.ones(4, np.int64))
    with pytest.raises(CorpusError, match="0:1 is to be dropped"):
        finish(tmp_path, header=header, blocks=[good], dropped=["0:1"])
    assert not (tmp_path / "manifest.json").exists()
    finish(tmp_path, header=header, blocks=[good])
    assert open_corpus(tmp_path).split("train").read(0, 2).tolist() == [1, 2]


def test_splits_that_overlap_or_are_empty_are_refused_with_numbers(tmp_path):
    everything = {"groups": [0], "buckets": [0, 1000]}
    with pytest.raises(CorpusError, match=r"'a' and 'b' both hold group 0, bucket 500"):
        write(tmp_path, BLOCKS, splits={"a": {"buckets": [0, 501]}, "b": {"buckets": [500, 1000]}})
    with pytest.raises(CorpusError, match=r"split 'valid' is empty \(documents: train 231, valid 0\)"):
        write(tmp_path, BLOCKS, splits={"train": everything, "valid": {"groups": [1]}})
    for bad in ({"buckets": [0, 1001]}, {"buckets": [[5, 4]]}, {"groups": [3]}, {"groups": []}):
        with pytest.raises(CorpusError, match="split 'a'"):
            write(tmp_path, BLOCKS, splits={"a": bad})
    write(tmp_path, BLOCKS)
    corpus = open_corpus(tmp_path)
    with pytest.raises(CorpusError, match=r"no split 'dev'; it has test, train, valid"):
        corpus.split("dev")
    count = corpus.manifest["counts"]
    with pytest.raises(CorpusError, match=f"is empty; .*train {count['train']['documents']}"):
        corpus.select("own test", [2], [(0, 1000)])


def test_columns_and_their_runs():
    found = columns([1, 0], [(3, 5), (4, 6), (999, 1000)])
    assert found.tolist() == [3, 4, 5, 999, 1003, 1004, 1005, 1999]
    assert runs(found) == [(3, 6), (999, 1000), (1003, 1006), (1999, 2000)]
    assert runs(columns([0, 1], [(0, 1000)])) == [(0, 2000)]
    assert runs(columns([0], [])) == []
    assert [str(smallest_dtype(v)) for v in (2, 256, 257, 65_536, 65_537)] == [
        "uint8",
        "uint8",
        "uint16",
        "uint16",
        "uint32",
    ]


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A corpus whose token files span several MiB."""
    folder = tmp_path_factory.mktemp("healthy")
    blocks = [random_documents(40, seed=seed, longest=60_000) for seed in (1, 2)]
    write(folder, blocks, dropped=["0:3", "1:5"])
    assert (folder / "tokens-00000.bin").stat().st_size > 2 * MIB
    return folder


def use(folder):
    """What a run does with a corpus: every symbol, every count, every table."""
    corpus = open_corpus(folder)
    corpus.encode(b"x")
    _ = corpus.symbol_bytes_V
    for name in ("train", "valid", "test"):
        split = corpus.split(name)
        split.document_ends()
        split.fetch(np.arange(split.rows(4096)), 4096, masking=True)


def copies(healthy, tmp_path):
    """A fresh copy a time, so that one damage never meets another."""
    work = tmp_path / "copy"

    def fresh():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(healthy, work)
        return work

    return fresh


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_random_damage_is_found_and_named(healthy, tmp_path):
    use(healthy)
    open_corpus(healthy).verify()
    fresh = copies(healthy, tmp_path)
    random = np.random.default_rng(0)
    names = [path.relative_to(healthy) for path in files_of(healthy)]
    assert len(names) == 13  # 2 x (tokens, documents, checks), index + checks, dropped, bytes, tokenizer (2), manifest
    tried = 0
    folder = fresh()
    for name in names:
        path = folder / name
        good = path.read_bytes()
        damages = []
        for _ in range(8):
            at, bit = int(random.integers(len(good))), 1 << int(random.integers(8))
            damages.append(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        damages += [good[: int(random.integers(len(good)))], good[:-1], good + b"\0", b"", None]
        for damage in damages:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(CorpusError, match=name.name) as error:
                use(folder)
            assert "\n" not in str(error.value)
            if tried % 4 == 0:
                with pytest.raises(CorpusError, match=name.name):
                    open_corpus(folder).verify()
            path.write_bytes(good)
            tried += 1
    assert tried >= 150
    use(folder)  # all of it is whole again


def test_a_bit_anywhere_in_the_manifest(healthy, tmp_path):
    """Bits of whole stretches, including white space and digits inside sizes and hashes."""
    folder = copies(healthy, tmp_path)()
    path = folder / "manifest.json"
    good = path.read_bytes()
    for at in [*range(60), *range(len(good) // 2, len(good) // 2 + 60), *range(len(good) - 20, len(good))]:
        for bit in (0, 2, 5):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(CorpusError, match=r"manifest\.json"):
                open_corpus(folder)


def test_swapped_files_are_found(healthy, tmp_path):
    fresh = copies(healthy, tmp_path)
    for kind in ("tokens", "documents", "checks"):
        folder = fresh()
        one, two = folder / f"{kind}-00000.bin", folder / f"{kind}-00001.bin"
        first, second = one.read_bytes(), two.read_bytes()
        size = max(len(first), len(second))
        one.write_bytes(second)
        two.write_bytes(first)
        with pytest.raises(CorpusError, match=f"{kind}-0000[01].bin"):
            use(folder)
        if kind == "tokens":  # of equal size, so that only the checksum can tell
            one.write_bytes((second + first)[: len(first)])
            two.write_bytes(second)
            with pytest.raises(CorpusError, match=r"tokens-00000\.bin is damaged in its MiB 0"):
                use(folder)
        assert size
    folder = fresh()
    for kind in ("tokens", "documents", "checks"):  # a whole block in the place of the other
        one, two = folder / f"{kind}-00000.bin", folder / f"{kind}-00001.bin"
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    with pytest.raises(CorpusError, match=r"0000[01]\.bin"):
        use(folder)


def test_a_manifest_of_another_version_or_kind_is_refused_by_name(healthy, tmp_path):
    folder = copies(healthy, tmp_path)()
    for key, value in (("version", 2), ("kind", "sound")):
        manifest = json.loads((healthy / "manifest.json").read_bytes())
        manifest[key] = value
        manifest["fingerprint"] = fingerprint(manifest)
        (folder / "manifest.json").write_bytes(canonical(manifest))
        with pytest.raises(CorpusError, match=f"manifest.json has .*{value}"):
            open_corpus(folder)
    with pytest.raises(CorpusError, match="lmtrain prepare"):
        open_corpus(tmp_path / "nowhere")


def test_verify_finds_what_fits_its_hashes_and_is_wrong(tmp_path):
    """A corpus that a faulty program wrote, with right checksums: documents and symbols do not fit together."""

    def forge(folder, change):
        write(folder, BLOCKS)
        change(folder)
        rewrite(folder)
        with pytest.raises(CorpusError, match=r"00000\.bin") as error:
            open_corpus(folder).verify()
        return str(error.value)

    def edit(folder, name, dtype, function):
        data = np.fromfile(folder / name, dtype)
        function(data)
        data.tofile(folder / name)

    tokens, documents = "tokens-00000.bin", "documents-00000.bin"
    table = reading.DOCUMENT
    one_less = tmp_path / "0"
    assert "end symbol" in forge(one_less, lambda f: edit(f, tokens, "<u2", lambda t: t.__setitem__(t == 256, 3)))
    assert "alphabet" in forge(tmp_path / "1", lambda f: edit(f, tokens, "<u2", lambda t: t.__setitem__(5, 999)))
    assert "raw bytes" in forge(
        tmp_path / "2", lambda f: edit(f, documents, table, lambda d: d["bytes"].__setitem__(2, 1))
    )
    assert "order" in forge(
        tmp_path / "3", lambda f: edit(f, documents, table, lambda d: d["offset"].__setitem__(2, 1))
    )
    assert "order" in forge(
        tmp_path / "4", lambda f: edit(f, documents, table, lambda d: d["bucket"].__setitem__(0, 999))
    )


def rewrite(folder):
    """Make sizes, checksums and hashes fit whatever is in the folder."""
    for path in folder.glob("tokens-*.bin"):
        data = path.read_bytes()
        crcs = [crc32c(data[at : at + MIB]) for at in range(0, len(data), MIB)]
        np.array(crcs, "<u4").tofile(folder / path.name.replace("tokens", "checks"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_bytes(canonical(manifest))


def test_only_what_is_touched_is_verified_and_only_once(healthy, tmp_path, monkeypatch):
    folder = copies(healthy, tmp_path)()
    path = folder / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[MIB + 77] ^= 4
    path.write_bytes(data)
    computed = []
    monkeypatch.setattr(checked, "crc32c", lambda data: computed.append(len(data)) or crc32c(data))
    corpus = open_corpus(folder)
    every = corpus.select("all", [0], [(0, 1000)])
    tokens = corpus.tokens(0)
    computed.clear()
    clean = every.read(0, 1000)
    assert computed == [MIB]
    assert np.array_equal(every.read(0, 1000), clean)
    assert computed == [MIB]
    tokens.read(2 * MIB, 2 * MIB + 1)
    between = (MIB - 1, 2 * MIB + 1)  # both ends are verified, what lies between them is not
    for start, stop in (between, (MIB - 1, MIB + 1), (MIB, MIB + 1), (MIB + 5, 2 * MIB + 9)):
        with pytest.raises(CorpusError, match=r"tokens-00000\.bin is damaged in its MiB 1"):
            tokens.read(start, stop)
    assert tokens.read(MIB - 5, MIB) == bytes(data[MIB - 5 : MIB])


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_signal(healthy, tmp_path):
    folder = copies(healthy, tmp_path)()
    split = open_corpus(folder).select("all", [0], [(0, 1000)])
    split.read(0, split.symbols)  # everything is verified and open
    with (folder / "tokens-00000.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorpusError, match=r"tokens-00000\.bin became shorter"):
        split.read(5000, 6000)


def test_a_file_that_shrank_is_found_before_a_row_is_read_from_its_map(healthy, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHECK_OPEN", 0.0)
    folder = copies(healthy, tmp_path)()
    split = open_corpus(folder).select("all", [0], [(0, 1000)])
    split.fetch(np.arange(1, 5), 100)
    with (folder / "tokens-00000.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorpusError, match=r"tokens-00000\.bin became shorter"):
        split.fetch(np.array([50]), 100)


def test_the_weights_of_whole_rows_cannot_be_written_and_those_of_others_are_not_shared(healthy):
    split = open_corpus(healthy).select("all", [0], [(0, 1000)])
    whole = split.fetch(np.arange(3), 100).weight_BT
    with pytest.raises(RuntimeError):
        whole.mul_(2.0)
    rows = split.rows(96)
    ragged = split.fetch(np.array([0, -1, rows - 1]), 96).weight_BT
    assert ragged.sum(1).tolist() == [96, 0, split.symbols - 96 * (rows - 1)]
    assert split.fetch(np.arange(3), 96).weight_BT.eq(1).all()


def test_few_open_files_serve_many_blocks_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "OPEN_FILES", 2)
    blocks = [random_documents(6, seed=seed) for seed in range(9)]
    write(tmp_path, blocks, splits={"train": {"groups": [0]}})
    split = open_corpus(tmp_path).split("train")
    rows = split.rows(32)
    whole = np.concatenate([[*raw, 256] for raw in documents_of(blocks, lambda *_: True)])
    padded = np.append(whole, np.zeros(rows * 32 - len(whole), np.int64)).reshape(rows, 32)
    wrong = []

    def work(seed):
        for index in np.random.default_rng(seed).integers(0, rows, (40, 8)):
            batch = split.fetch(index, 32, masking=True)
            if not np.array_equal(batch.x_BT.numpy(), padded[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(split.corpus._open) <= 2


# ---- size ------------------------------------------------------------------------------------------------------------


def test_a_trillion_symbols_are_addressed_without_reading_them(tmp_path):
    """Sparse files: 10^12 symbols, 2 TB. Marks stand at known places; opening and reading stays small."""
    marks = {0: 1, 1_023: 7, 2**31: 8, 2**32 + 1: 9, 499_999_999_998: 11, 500_000_000_000: 12, 999_999_999_998: 13}
    sparse_corpus(tmp_path, symbols=10**12, blocks=4, document=10**9, marks=marks)
    tracemalloc.start()
    corpus = open_corpus(tmp_path)
    split = corpus.split("train")
    assert (split.symbols, split.documents) == (10**12, 1000)
    assert split.rows(1024) == 976_562_500
    for position, symbol in marks.items():
        assert split.read(position - 1 if position else 0, position + 1).tolist()[-1] == symbol
        batch = split.fetch(np.array([position // 1024]), 1024, masking=True)
        assert batch.x_BT[0, position % 1024] == symbol
        assert batch.x_BT[0].count_nonzero() <= 2  # the mark, and perhaps an end symbol
        assert bool(batch.cond.first_BT[0].any()) == any(
            (p % 10**9) == 0 for p in range(position // 1024 * 1024, position // 1024 * 1024 + 1024)
        )
        assert int(batch.position_B[0]) == position // 1024 * 1024
    assert split.start_symbol(10**12 - 1) == 13
    assert split.row_symbols(np.array([976_562_499]), 1024).tolist() == [1024]
    assert split.document_ends()[[0, 499, 999]].tolist() == [10**9, 500 * 10**9, 10**12]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 * MIB


def test_one_symbol_corpora(tmp_path):
    one_split(tmp_path, [b""])
    split = open_corpus(tmp_path).split("train")
    assert (split.symbols, split.rows(1), split.rows(5)) == (1, 1, 1)
    assert split.fetch(np.array([0]), 3).weight_BT.tolist() == [[1.0, 0.0, 0.0]]
