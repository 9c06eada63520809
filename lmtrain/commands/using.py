"""What is asked of a trained model: held-out numbers, samples, completions, what each pixel costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtrain.commands.options import AsJson, RunPath, Which, WhichWeights, print_json
from lmtrain.errors import InputError

app = typer.Typer()


@app.command("eval")
def evaluate(
    context: typer.Context,
    folder: RunPath,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="a prepared corpus or a file; may be repeated")
    ] = None,
    split: Annotated[str, typer.Option("--split", "-s", help="valid or test")] = "valid",
    checkpoint: Which = "last",
    override: Annotated[list[str] | None, typer.Option("--set", help="eval.mode=sliding and the like")] = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity and bits per byte of held-out data: every symbol once, sums before quotients."""
    from lmtrain import place, use

    where = place.find(os.environ, local_rank=context.obj["local_rank"])
    results = use.evaluate_run(
        folder,
        data=data or [],
        split=split,
        checkpoint=checkpoint,
        overrides=override or [],
        place=where,
        environment=os.environ,
    )
    if where.rank:
        return
    if as_json:
        print_json({name: result.to_json() for name, result in results.items()})
    else:
        for name, result in results.items():
            print(f"{name}\n{result.describe()}")


@app.command()
def sample(
    folder: RunPath,
    prompt: Annotated[str | None, typer.Option("--prompt", help="text to go on from")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="a file to go on from")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="how many samples")] = 1,
    max_symbols: Annotated[int, typer.Option(min=1, help="length limit of a sample")] = 256,
    temperature: Annotated[float, typer.Option(help="1 = the model's own distribution")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest symbols")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep the likeliest symbols of this total probability")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same samples")] = 0,
    log_prob: Annotated[bool, typer.Option("--log-prob", help="each sample's log-probability under the model")] = False,
    label: Annotated[
        int | None, typer.Option("--label", min=0, help="records: the class; default: all in turn")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="images: the PNG; default: in the run folder")] = None,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Draw from the model: text that goes on from a prompt, a sheet of images, or rows of a table."""
    from lmtrain import seeing, use

    raw = _prompt(prompt, prompt_file)
    limits = {"n": n, "max_symbols": max_symbols, "seed": seed}
    settings = {**limits, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    opened = use.open_run(folder, checkpoint=checkpoint, weights=weights)
    if opened.corpus.record is not None:
        if raw:
            raise InputError(f"--prompt is for text, and {folder} reads {opened.corpus.unit}s; see lmtrain complete")
        samples = seeing.sample_records(opened, folder, settings=settings, label=label, out=out)
    else:
        samples = use.sample_run(opened, prompt=raw, settings=settings, stream=not as_json and n == 1)
    if as_json:
        print_json(samples)
        return
    if opened.corpus.record is not None:
        _show_records(samples, log_prob=log_prob)
        return
    for number, one in enumerate(samples):
        if n > 1:
            print(f"--- {number + 1} ---\n{one['text']}")
        if log_prob:
            print(f"log p = {one['log_prob']:.4f} nats over {one['symbols']} symbols")


def _show_records(samples: list[dict[str, Any]], *, log_prob: bool) -> None:
    for one in samples:
        label = "" if one["label"] is None else f"  class {one['label']}"
        nats = f"log p = {one['log_prob']:.4f} nats" if log_prob else ""
        values = "" if one["picture"] else " ".join(f"{value:.6g}" for value in one["values"])
        if line := "  ".join(part for part in (values, nats) if part):
            print(line + label)
    if samples[0]["picture"]:
        print(samples[0]["picture"])


@app.command()
def complete(
    folder: RunPath,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="an image of the size that the run reads")],
    mask: Annotated[Path | None, typer.Option("--mask", help="an image: white is given, black is filled in")] = None,
    keep: Annotated[float, typer.Option(min=0, max=1, help="without a mask: the upper share of rows given")] = 0.5,
    n: Annotated[int, typer.Option("-n", min=1, help="how many completions")] = 7,
    temperature: Annotated[float, typer.Option(help="1 = the model's own distribution")] = 1.0,
    seed: Annotated[int, typer.Option(help="the same seed gives the same completions")] = 0,
    label: Annotated[int | None, typer.Option("--label", min=0, help="the class, for a model that is told one")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the PNG; default: in the run folder")] = None,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Fill in a part of an image; what is given stays as it is."""
    from lmtrain import seeing, use

    opened = use.open_run(folder, checkpoint=checkpoint, weights=weights)
    settings = {"n": n, "temperature": temperature, "seed": seed}
    told = seeing.complete_image(opened, folder, image, mask=mask, keep=keep, settings=settings, label=label, out=out)
    if as_json:
        print_json(told)
    else:
        print(f"{told['filled']} of {told['filled'] + told['given']} symbols filled in, {n} times: {told['picture']}")


@app.command()
def bits(
    folder: RunPath,
    files: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="default: of a split")] = None,
    split: Annotated[str, typer.Option("--split", "-s", help="without images: of this split")] = "valid",
    n: Annotated[int, typer.Option("-n", min=1, help="how many of the split")] = 16,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the PNG; default: in the run folder")] = None,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Map what each pixel costs, in bits: a picture of images, each beside its map."""
    from lmtrain import seeing, use

    opened = use.open_run(folder, checkpoint=checkpoint, weights=weights)
    told = seeing.map_bits(opened, folder, files or [], split=split, n=n, out=out)
    if as_json:
        print_json(told)
    else:
        print(
            f"{len(told['bits'])} images, {told['bits_per_dim']:.4f} bits per dim; black is 0 bits, white "
            f"{told['white_is_bits']:.2f} and more: {told['picture']}"
        )


def _prompt(text: str | None, path: Path | None) -> bytes:
    if text is not None and path is not None:
        raise InputError("--prompt and --prompt-file are both given; use one")
    if path is None:
        return (text or "").encode("utf-8", "surrogateescape")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--prompt-file {path} cannot be read: {error.strerror}") from None
