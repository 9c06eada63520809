"""Held-out text under a trained run against general compressors: the file alone, and the file with the model.

    python benchmarks/compression.py RUN [--split test] [--bytes N] [--lanes N] [--alone 100000]

Codes the raw text of a split, or its first `--bytes`, and decodes it again; then the first `--alone` bytes in one lane,
which must take as many bits per byte as the evaluation of the same bytes cut in the same way. Prints one table and
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from lmtrain import use
from lmtrain.data.corpus import PreparedCorpus
from lmtrain.likelihood import container, rivals
from lmtrain.likelihood.compress import CompressConfig, compress_bytes, decompress_bytes
from lmtrain.protocol import Place

WANTED = 1e-3
"""The payload of one lane and the evaluation of the same bytes differ by at most so many bits per byte."""
ROUNDING = 1e-4
"""Tables of integers may lengthen a held-out text by this share."""


def whole(opened: use.Opened, folder: Path, raw: bytes, *, lanes: int | None) -> dict[str, object]:
    """What coding gave, with seconds there and back."""
    began = time.perf_counter()
    packed = compress_bytes(opened, folder, raw, config=CompressConfig(lanes=lanes))
    coded = time.perf_counter()
    if decompress_bytes(opened, folder, *container.unpack(packed.data, where="the file")) != raw:
        raise SystemExit("the text did not come back")
    return packed.told | {"seconds": coded - began, "seconds_back": time.perf_counter() - coded}


def alone(opened: use.Opened, folder: Path, raw: bytes) -> dict[str, float]:
    """Bits per byte of one lane in windows that do not overlap, and of the evaluation."""
    context = opened.config.data.row_length(opened.corpus)
    bounded = opened.model.context is not None
    told = compress_bytes(opened, folder, raw, config=CompressConfig(lanes=1, stride=context if bounded else None)).told
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "text"
        file.write_bytes(raw)
        found = use.evaluate_run(
            folder,
            data=[str(file)],
            split="test",
            checkpoint=str(opened.saved.step),
            overrides=[f"eval.mode={'window' if bounded else 'carried'}"],
            place=Place(),
            environment=os.environ,
        )[str(file)]
    assert found.score.bits_per_byte is not None
    return {
        "bytes": len(raw),
        "payload": told["bits_per_byte"],
        "table": told["table_bits"] / len(raw),
        "float": told["float_bits"] / len(raw),
        "eval": found.score.bits_per_byte,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--bytes", type=int, help="take so many bytes of the split; default all")
    parser.add_argument("--alone", type=int, default=100_000, help="bytes that are coded in one lane; 0 = none")
    parser.add_argument("--out", type=Path, default=Path("compression.json"))
    given = parser.parse_args()
    opened = use.open_run(given.run)
    corpus, part = opened.corpus, opened.corpus.split(given.split)
    assert isinstance(corpus, PreparedCorpus)
    raw = corpus.decode(part.read(0, part.symbols).tolist())[: given.bytes]
    # float32, as they are read; the tokenizer is needed too.
    weights = 4 * sum(p.numel() for p in opened.model.parameters()) + len(corpus.tokenizer.content)
    told = whole(opened, given.run, raw, lanes=given.lanes)
    sizes = {"lmtrain": told["file_bytes"], **rivals.sizes(raw)}
    print(f"{given.split}: {len(raw):,} bytes; step {told['step']}, {told['lanes']} lanes, {weights:,} bytes of model")
    print(f"{'':12s} {'file':>10s} {'bits/byte':>10s} {'with model':>12s} {'bits/byte':>10s}")
    rows = []
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        both = size + (weights if name == "lmtrain" else 0)
        rows.append({"name": name, "bytes": size, "with_model": both})
        print(f"{name:12s} {size:10,d} {8 * size / len(raw):10.3f} {both:12,d} {8 * both / len(raw):10.3f}")
    longer = told["table_bits"] / told["float_bits"] - 1
    print(f"V = {corpus.alphabet:,}: by tables {longer:+.1e} of the model's own length, -sum log2 p")
    if abs(longer) > ROUNDING:
        raise SystemExit(f"tables of integers lengthen the text by more than {ROUNDING}")
    print(f"coded in {told['seconds']:.0f} s, decoded in {told['seconds_back']:.0f} s: the same bytes")
    result = {"split": given.split, "raw": len(raw), "model": weights, "rows": rows, "told": told}
    if given.alone:
        one = result["alone"] = alone(opened, given.run, raw[: given.alone])
        print(
            f"one lane, first {one['bytes']:,} bytes: payload {one['payload']:.5f} bits/byte, "
            f"tables {one['table']:.5f}, model {one['float']:.5f}, lmtrain eval {one['eval']:.5f}"
        )
        if abs(one["payload"] - one["eval"]) > WANTED:
            raise SystemExit(f"payload and evaluation differ by more than {WANTED}")
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
