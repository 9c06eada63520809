"""What is strange to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmtrain.commands.options import AsJson, RunPath, WhichWeights, print_json, say
from lmtrain.commands.scoring import Limit, Piece, SplitName
from lmtrain.errors import InputError

app = typer.Typer()


@app.command()
def anomaly(
    folder: RunPath,
    outside: Annotated[
        list[str],
        typer.Option("--outside", help="what is to be found: a set, or @permuted, @constant, @noise, @shuffled"),
    ],
    inside: Annotated[str, typer.Option("--inside", help="what is usual")] = "own:test",
    calibrate: Annotated[
        str, typer.Option("--calibrate", help="inside units that set thresholds; of --reverse its own:valid")
    ] = "own:valid",
    background: Annotated[
        Path | None, typer.Option("--background", help="a run trained with data.view.corrupt")
    ] = None,
    reverse: Annotated[
        Path | None, typer.Option("--reverse", help="a run trained on the first --outside: also the other way round")
    ] = None,
    reverse_background: Annotated[
        Path | None, typer.Option("--reverse-background", help="the background model of --reverse")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="units a batch, for typicality; default: 1 and 10")
    ] = None,
    fpr: Annotated[float, typer.Option(help="share of inside units that a threshold may flag")] = 0.05,
    split: SplitName = "test",
    piece: Piece = None,
    limit: Limit = 2000,
    seed: Annotated[int, typer.Option(help="of sets that are made up")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="each unit's scores: .jsonl or .parquet")] = None,
    histogram: Annotated[Path | None, typer.Option("--histogram", help="nats of inside and outside: a PNG")] = None,
    weights: WhichWeights = None,
    checkpoint: Annotated[
        str,
        typer.Option("--checkpoint", "-c", help="of both runs: last, best or a step; of background models the last"),
    ] = "last",
    as_json: AsJson = False,
) -> None:
    """Tell what is outside of a run's data by its likelihood, beside controls that need no model."""
    from lmtrain.journal import strict
    from lmtrain.likelihood import anomaly as asking
    from lmtrain.likelihood import plots, scorefile
    from lmtrain.use import open_run

    if out is not None:
        scorefile.check_name(out)
    if histogram is not None:
        plots.check_name(histogram)
    if not 0 < fpr < 1:
        raise InputError(f"--fpr {fpr:g} is no rate between 0 and 1")
    if reverse is None and reverse_background is not None:
        raise InputError("--reverse-background belongs to --reverse; give both")
    settings = asking.Settings(batches=tuple(batch or (1, 10)), fpr=fpr, seed=seed)

    def side(run: Path, behind: Path | None) -> asking.Side:
        opened = open_run(run, checkpoint=checkpoint, weights=weights)
        return asking.Side(str(run), opened, None if behind is None else open_run(behind, weights=weights))

    sides = [(side(folder, background), inside, outside, calibrate)]
    if reverse is not None:
        if outside[0].startswith("@"):
            raise InputError(f"--reverse needs a run trained on the first --outside, and {outside[0]} is made up")
        back = asking.names_swapped(sides[0][0].opened, inside, split)
        sides.append((side(reverse, reverse_background), outside[0], [back], "own:valid"))
    found = []
    for one, within, beyond, usual in sides:
        for told in asking.ask(
            one,
            inside=within,
            outside=beyond,
            calibrate=usual,
            split=split,
            settings=settings,
            piece=piece,
            limit=limit,
        ):
            found.append(told)
            if not as_json:
                print(asking.table(told, settings), flush=True)
    if out is not None:
        asking.write_units(out, found)
        say(f"written: {out}")
    if histogram is not None:
        plots.histogram(histogram, asking.nats_by_set(found), title=str(folder), x_label="nats")
        say(f"written: {histogram}")
    if as_json:
        print_json(strict([told.to_json() for told in found]))
