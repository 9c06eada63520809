"""Files without loss: compress and decompress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lmtrain.commands.options import AsJson, RunPath, Which, WhichWeights, print_json, say

app = typer.Typer()
Force = Annotated[bool, typer.Option("--force", help="replace OUT if it is there")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bar")]


@contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time that is left, on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    disabled = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=disabled) as bar:
        task = bar.add_task(title, total=None)

        def progress(done: int, total: int) -> None:
            if not disabled:
                bar.update(task, completed=done, total=total)

        yield progress


@app.command()
def compress(
    folder: RunPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="any file; image models: PGM, PPM or .npy")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="default: FILE.lmz")] = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="keep an image's pixels instead of its file")] = False,
    label: Annotated[int | None, typer.Option("--label", min=0, help="the class, for a model that is told one")] = None,
    lanes: Annotated[
        int | None, typer.Option("--lanes", min=1, max=4096, help="side by side: faster, some bytes more each")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="text: symbols between openings; default: half the context")
    ] = None,
    block: Annotated[int, typer.Option("--block", min=1, help="symbols a block, each with a checksum")] = 1 << 16,
    verify: Annotated[bool, typer.Option("--verify", help="decode in a fresh process before OUT is there")] = False,
    compare: Annotated[bool, typer.Option(help="what gzip, bzip2, xz, zstd and brotli make of the same bytes")] = True,
    force: Force = False,
    quiet: Quiet = False,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Write a file in as many bits as the model needs to tell it, without loss."""
    from lmtrain.likelihood import compress as files

    config = files.CompressConfig(lanes=lanes, stride=stride, block=block, label=label, pixels=pixels)
    with _bar("coding", quiet=quiet) as progress:
        told = files.compress_file(
            folder,
            file,
            out,
            config=config,
            checkpoint=checkpoint,
            weights=weights,
            force=force,
            verify=verify,
            compare=compare,
            progress=progress,
        )
    if as_json:
        print_json(told)
    else:
        say(files.describe(told))


@app.command()
def decompress(
    folder: RunPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what `compress` wrote")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="default: FILE without .lmz")] = None,
    any_machine: Annotated[
        bool, typer.Option("--try", help="although versions or CPU are not those that coded")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Give back what `compress` was given; a file that is damaged, or another model's, is refused."""
    from lmtrain.likelihood import compress as files

    with _bar("decoding", quiet=quiet) as progress:
        told = files.decompress_file(folder, file, out, any_machine=any_machine, force=force, progress=progress)
    if as_json:
        print_json(told)
    else:
        say(f"{told['file']}: {told['file_bytes']:,} bytes -> {told['out']}: {told['raw_bytes']:,} bytes")
