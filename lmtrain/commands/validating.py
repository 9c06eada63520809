"""Cross-validation and the choice of a candidate; how far a model is from its source, or from another model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lmtrain.commands.options import AsJson, ConfigPath, Overrides, RunPath, Which, WhichWeights, print_json, say
from lmtrain.errors import EXIT_STOPPED, InputError

app = typer.Typer()


@app.command()
def crossval(
    config: ConfigPath,
    overrides: Overrides = None,
    folds: Annotated[
        int | None,
        typer.Option("--folds", "-k", min=2, help="how many folds: of buckets, or those that the source has"),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="no folds: the corpus's own valid chooses, its test is scored once")
    ] = False,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", "-g", help="key.sub=value,value,... from complex to simple; once or twice"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="results folder; default <run.dir>/crossval-<config>")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", "-p", min=1, help="trainings at a time")] = 1,
    rule: Annotated[
        str, typer.Option(help="one-se: the simplest within a standard error of the best; or best")
    ] = "one-se",
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", help="of each run: best or last")] = "best",
    as_json: AsJson = False,
) -> None:
    """Train on every fold, or on every point of a grid; mean and spread of the held-out score, and a choice."""
    from lmtrain import schema
    from lmtrain.likelihood import crossval as validation
    from lmtrain.likelihood import folds_report
    from lmtrain.likelihood.candidates import Axis

    if (folds is None) != published:
        raise InputError("give --folds K, or --published for the corpus's own splits (not both)")
    if published and not grid:
        raise InputError(
            "--published compares candidates on the published valid split; give --grid key=value,value,..."
        )
    settings = schema.load(config, overrides or [], environment=os.environ)
    folder = out or Path(settings.run.dir) / f"crossval-{settings.run.name}"
    wish = validation.Wish(
        folds=folds,
        axes=tuple(Axis.parse(text) for text in grid or ()),
        parallel=parallel,
        checkpoint=checkpoint,
        rule=rule,
    )
    result = validation.crossval(settings, wish, folder, environment=os.environ, note=say)
    if result is None:
        say("stopped; the same command goes on")
        raise typer.Exit(EXIT_STOPPED)
    files = folds_report.write(result, folder)
    if as_json:
        print_json({**result, "files": [str(path) for path in files]})
        return
    print(folds_report.table(result))
    for path in files:
        print(path)


@app.command()
def divergence(
    folder: RunPath,
    other: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="a second run; without it: the source")] = None,
    samples: Annotated[int, typer.Option("-n", min=0, help="records drawn of either side; 0 = none")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="the same seed draws the same")] = 0,
    length: Annotated[int | None, typer.Option(min=1, help="models of text: symbols of a record; default 16")] = None,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """KL both ways, Jensen-Shannon, total variation and others: of a run and its known source, or of two runs."""
    from lmtrain.likelihood import divergence as diverging

    if samples == 1:
        raise InputError("-n 1: one sample has no standard error; give 2 or more, or 0 for none")
    result = diverging.compare(
        folder, other, samples=samples, seed=seed, length=length, checkpoint=checkpoint, weights=weights
    )
    if as_json:
        print_json(result)
    else:
        print(diverging.describe(result))
