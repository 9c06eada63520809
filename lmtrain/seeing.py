"""What a run that reads records can show: sheets of samples, completed images, maps of what each pixel cost.

Shapes in names: N records, D symbols of a record, H, W, C the grid of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.config import build
from lmtrain.corpora import classes_in_turn, spec_of, told_classes
from lmtrain.data import images, pictures
from lmtrain.data.view import View
from lmtrain.errors import InputError
from lmtrain.heldout import SAMPLES
from lmtrain.inference.records import draw, surprisal
from lmtrain.inference.sample import SampleConfig
from lmtrain.protocol import LN2, Corpus, Draws, Spec
from lmtrain.use import Opened


def sample_records(
    opened: Opened, folder: Path, *, settings: Mapping[str, Any], label: int | None = None, out: Path | None = None
) -> list[dict[str, Any]]:
    """Draw records as JSON mappings; images also as a sheet, written to `out` or below the run folder."""
    spec, corpus = spec_of(opened.corpus, opened.config), opened.corpus
    config = build(SampleConfig, {**settings, "max_symbols": spec.context}, where="sample")
    label_N = _labels(opened, spec, label, config.n)
    drawn = draw(opened.model, spec=spec, config=config, label_N=label_N)
    path = None
    if pictures.can_show(corpus):
        path = out or folder / SAMPLES / f"step-{opened.saved.step:08d}-seed-{config.seed}.png"
        in_turn = spec.labels if label_N is not None and label is None and config.n >= spec.labels else None
        pictures.write(path, pictures.sheet(pictures.show(drawn.x_NT, corpus), columns=in_turn))
    nats_N = drawn.nats_NT.sum(1)
    return [
        {
            "values": pictures.numbers(drawn.x_NT[i], corpus).tolist(),
            "label": None if label_N is None else int(label_N[i]),
            "symbols": spec.context,
            "log_prob": -float(nats_N[i]),
            "step": opened.saved.step,
            "seed": config.seed,
            "index": i,
            "picture": None if path is None else str(path),
        }
        for i in range(config.n)
    ]


def _labels(opened: Opened, spec: Spec, label: int | None, count: int) -> np.ndarray | None:
    """The class asked for, or the classes in turn; None for a model that is not told any."""
    if label is None:
        return classes_in_turn(opened.config, spec, count)
    if not told_classes(opened.config):
        raise InputError(f"--label {label}: the model is not told classes (model.conditional is false)")
    return np.full(count, label)


def complete_image(
    opened: Opened,
    folder: Path,
    image: Path,
    *,
    mask: Path | None,
    keep: float,
    settings: Mapping[str, Any],
    label: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Fill in a part of an image `n` times: where `mask` is black, or below the first `keep` of its rows.

    The sheet has the image, what was given of it (the rest grey), and the completions. Given pixels are the file's own.
    Raises InputError for an image or a mask that is not of the corpus's size.
    """
    spec, corpus = spec_of(opened.corpus, opened.config), opened.corpus
    pixels_HWC = _read(image, corpus)
    height, width, channels = pixels_HWC.shape
    if mask is None:
        given_HW = np.repeat(np.arange(height) < round(keep * height), width).reshape(height, width)
    else:
        given_HW = _read(mask, corpus, channels=1)[..., 0] >= 128
    if given_HW.all():
        raise InputError("every pixel is given and nothing is left to fill in; give another --mask or --keep")
    config = build(SampleConfig, {**settings, "max_symbols": spec.context}, where="complete")
    given_D = given_HW.repeat(channels)
    x_ND = np.repeat(_symbols(pixels_HWC, corpus), config.n, axis=0)
    label_N = _labels(opened, spec, label, config.n)
    filled = draw(
        opened.model, spec=spec, config=config, x_NT=x_ND, given_NT=np.tile(given_D, (config.n, 1)), label_N=label_N
    )
    given_HWC = given_HW[..., None]
    done_NHWC = np.where(given_HWC, pixels_HWC, pictures.show(filled.x_NT, corpus))
    first = np.stack([pixels_HWC, np.where(given_HWC, pixels_HWC, 128).astype(np.uint8)])
    path = out or folder / SAMPLES / f"complete-{image.stem}-step-{opened.saved.step:08d}-seed-{config.seed}.png"
    pictures.write(path, pictures.sheet(np.concatenate([first, done_NHWC])))
    return {
        "picture": str(path),
        "given": int(given_D.sum()),
        "filled": int((~given_D).sum()),
        "log_prob": [-float(nats) for nats in filled.nats_NT.sum(1)],
        "step": opened.saved.step,
        "seed": config.seed,
    }


def map_bits(
    opened: Opened,
    folder: Path,
    files: Sequence[Path] = (),
    *,
    split: str = "valid",
    n: int = 16,
    out: Path | None = None,
) -> dict[str, Any]:
    """A map of bits a pixel beside each image: of files, or of the first `n` of a split. The scale is in the answer."""
    spec, corpus = spec_of(opened.corpus, opened.config), opened.corpus
    if corpus.grid is None or not spec.alphabet:
        raise InputError(f"{corpus.path}: bits a pixel are there for images of symbols, as {folder} does not read")
    if isinstance(opened.model, Draws):
        raise InputError(f"{folder} is a mixture over orderings: it tells an image's bits, and not those of a pixel")
    grid, label_N = pictures.grid_of(corpus), None
    if files:
        x_ND = np.concatenate([_symbols(_read(file, corpus), corpus) for file in files])
    else:
        part = corpus.split(split)
        batch = part.fetch(np.arange(min(n, part.documents)), spec.context)
        x_ND = batch.x_BT.numpy()
        label_N = None if batch.cond.label_B is None else batch.cond.label_B.numpy()
    if told_classes(opened.config) and label_N is None:
        raise InputError("the model is told classes, and files have none; give --split instead")
    nats_ND = surprisal(opened.model, x_ND, spec=spec, label_N=label_N)
    bits_NHW = (nats_ND / LN2).reshape(-1, *grid).sum(-1)
    top = float(np.quantile(bits_NHW, 0.995)) or 1.0
    pairs = np.stack([pictures.colour(pictures.show(x_ND, corpus)), pictures.heat(bits_NHW, top=top)], axis=1)
    path = out or folder / SAMPLES / f"bits-{'files' if files else split}-step-{opened.saved.step:08d}.png"
    sides = int(np.ceil(np.sqrt(len(pairs) / 2))) * 2
    pictures.write(path, pictures.sheet(pairs.reshape(-1, *pairs.shape[2:]), columns=sides))
    return {
        "picture": str(path),
        "white_is_bits": top,
        "bits": [float(bits) for bits in bits_NHW.sum((1, 2))],
        "bits_per_dim": float(bits_NHW.sum() / nats_ND.size),
        "step": opened.saved.step,
    }


def _read(path: Path, corpus: Corpus, *, channels: int | None = None) -> np.ndarray:
    """uint8 [H, W, C] of a file of the corpus's size."""
    height, width, own = pictures.grid_of(corpus)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    pixels = images.decode(data, channels=channels or own, where=str(path))
    if pixels.shape[:2] != (height, width):
        raise InputError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, the run reads {width} x {height}; scale it first"
        )
    return pixels


def _symbols(pixels_HWC: np.ndarray, corpus: Corpus) -> np.ndarray:
    """[1, D]: an image as the model reads it, through the run's view."""
    if not isinstance(corpus, View):
        return pictures.symbols(pixels_HWC[None], alphabet=corpus.alphabet)
    x_ND = pictures.symbols(pixels_HWC[None], alphabet=corpus.corpus.alphabet)
    return corpus.apply(x_ND, seed=corpus.config.seed, place_B=np.zeros(1, np.int64), use="file")
