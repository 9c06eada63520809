"""Image files as arrays: PNG, JPEG and what else Pillow reads (its only import)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmtrain.errors import CorpusError

ENDINGS = (".png", ".jpg", ".jpeg")
MOST_PIXELS = 1 << 24
_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, *, channels: int | None, where: str) -> np.ndarray:
    """uint8 [H, W, C] of an encoded image. channels: 1 or 3; None = 1 where the file is grey, else 3.

    CorpusError naming `where` when it cannot be decoded, has more than 2^24 pixels, more than a byte a value, or is
    transparent somewhere.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise CorpusError(f"{where} has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            if image.mode[0] in "IF":
                raise CorpusError(f"{where} has more than a byte a value ({image.mode}); make it an 8-bit image")
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise CorpusError(f"{where} is transparent in places; put it on a background first")
            wide = channels or (1 if image.mode in ("1", "L") else 3)
            pixels = np.asarray(image.convert(_MODES[wide]))
    except UnidentifiedImageError:
        raise CorpusError(f"{where} is not an image, or is damaged") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorpusError(f"{where} cannot be decoded: {error}") from None
    return pixels.reshape(pixels.shape[0], pixels.shape[1], wide)


def exact(data: bytes, *, where: str) -> np.ndarray:
    """uint8 [H, W, C] of an image file none of whose values is changed on the way: black and white, grey, RGB, palette.

    CorpusError for what is no image, and for transparency or more than a byte a value.
    """
    from PIL import Image

    with (
        contextlib.suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
        Image.open(io.BytesIO(data)) as image,
    ):
        if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
            raise CorpusError(
                f"{where} has pixels of kind {image.mode}{' with transparency' * ('transparency' in image.info)}; "
                "grey or RGB of a byte a value can be kept"
            )
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise CorpusError(f"{where} holds {frames} pictures; give one at a time")
    return decode(data, channels=None, where=where)


def encode(pixels_HWC: np.ndarray) -> bytes:
    """A PNG of uint8 [H, W, C], C 1 or 3."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[-1] == 1 else pixels_HWC).save(out, "png", optimize=True)
    return out.getvalue()


def below(folder: Path) -> list[tuple[Path, str | None]]:
    """(file, class) of every image in a folder, sorted; the class is the subfolder's name, None in the folder itself.

    CorpusError when there is none, or when some have a class and others have not.
    """
    if not folder.is_dir():
        raise CorpusError(f"{folder} is no folder; give the folder that holds the images, classes as subfolders")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in ENDINGS)
    found = [(path, None if path.parent == folder else path.relative_to(folder).parts[0]) for path in paths]
    if not found:
        raise CorpusError(f"{folder} holds no {', '.join(ENDINGS)} file")
    if len({name is None for _, name in found}) > 1:
        loose = next(path for path, name in found if name is None)
        raise CorpusError(f"{folder} has images in subfolders (classes), but {loose} lies outside of them; move it")
    return found


def read(
    files: list[tuple[Path, str | None]], *, channels: int | None, piece_bytes: int
) -> Iterator[tuple[np.ndarray, list[str | None]]]:
    """(uint8 [N, H, W, C], classes), about `piece_bytes` at a time; CorpusError naming one of another size."""
    held: list[np.ndarray] = []
    names: list[str | None] = []
    first: tuple[Path, np.ndarray] | None = None
    for path, name in files:
        try:
            pixels = decode(path.read_bytes(), channels=channels, where=str(path))
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None
        first = first or (path, pixels)
        same_size(pixels, str(path), first[1], str(first[0]))
        held.append(pixels)
        names.append(name)
        if len(held) * pixels.size >= piece_bytes:
            yield np.stack(held), names
            held, names = [], []
    if held:
        yield np.stack(held), names


def same_size(pixels: np.ndarray, where: str, first: np.ndarray, first_where: str) -> None:
    """CorpusError when two images differ in size or channels."""
    if pixels.shape != first.shape:
        given, wanted = ("x".join(map(str, array.shape)) for array in (pixels, first))
        raise CorpusError(
            f"{where} is {given}, and {first_where} is {wanted}: images of a corpus have one size; scale them, or set "
            "source.channels to 1 or 3"
        )
