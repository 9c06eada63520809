"""What each unit of a set costs a model, and which of two models is the better one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmtrain.commands.options import AsJson, RunPath, Which, WhichWeights, print_json, say
from lmtrain.errors import ConfigError, InputError

app = typer.Typer()

SplitName = Annotated[str, typer.Option("--split", "-s", help="of prepared corpora: valid or test")]
Piece = Annotated[int | None, typer.Option("--piece", min=1, help="text: cut it into pieces of so many bytes")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="at most so many units of a set, chosen by hash")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="eval.mode=sliding and the like")]


@app.command()
def score(
    folder: RunPath,
    sets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SET]...", help="a corpus, a text file, images, an .npy file; default: the run's own"),
    ] = None,
    split: SplitName = "valid",
    per_symbol: Annotated[bool, typer.Option("--per-symbol", help="write what each symbol cost, too")] = False,
    temperature: Annotated[float, typer.Option(help="1 = the model's own distribution")] = 1.0,
    alone: Annotated[bool, typer.Option("--alone", help="each document from its own beginning")] = False,
    piece: Piece = None,
    limit: Limit = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the scores: a .jsonl or .parquet file")] = None,
    histogram: Annotated[Path | None, typer.Option("--histogram", help="the sets against each other: a PNG")] = None,
    override: Settings = None,
    weights: WhichWeights = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Log-likelihood of each document, image or row of some sets."""
    from lmtrain.journal import strict
    from lmtrain.likelihood import plots, scorefile
    from lmtrain.likelihood.scoring import score_set
    from lmtrain.likelihood.sets import OWN, open_set
    from lmtrain.use import open_run

    if out is not None:
        scorefile.check_name(out)
    elif per_symbol:
        raise InputError("--per-symbol writes a number a symbol; say where to by --out FILE.jsonl or FILE.parquet")
    if histogram is not None:
        plots.check_name(histogram)
    opened = open_run(folder, checkpoint=checkpoint, overrides=only_eval(override), weights=weights)
    held = [open_set(opened, each, split=split, piece=piece, limit=limit) for each in sets or [f"{OWN}:{split}"]]
    if len({each.name for each in held}) < len(held):
        raise InputError("a set is given twice; name each once")
    scored = [
        score_set(opened, each, alone=alone or piece is not None, per_symbol=per_symbol, temperature=temperature)
        for each in held
    ]
    heads = [scorefile.head_of(each, run=str(folder), step=opened.saved.step) for each in scored]
    if out is not None:
        scorefile.write(out, scored, heads)
    if histogram is not None:
        label = scored[0].measure
        plots.histogram(histogram, {each.set.name: each.value_U for each in scored}, title=str(folder), x_label=label)
    if as_json:
        shown = [{key: value for key, value in head.items() if key != "groups"} for head in heads]
        print_json(strict([head | _spread(each) for head, each in zip(shown, scored, strict=True)]))
        return
    for each in scored:
        print(f"{each.set.name}\n{each.result.describe()}")
        spread = _spread(each)
        quantiles = "  ".join(f"{key} {value:.4f}" for key, value in spread["quantiles"].items())
        print(f"  {'of each unit':<24} {each.measure}: {quantiles}")
    for path in (out, histogram):
        if path is not None:
            say(f"written: {path}")


def _spread(scored: Any) -> dict[str, Any]:
    import numpy as np

    names = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
    found = np.quantile(scored.value_U, list(names.values())).tolist()
    return {"scored_units": len(scored.value_U), "quantiles": dict(zip(names, found, strict=True))}


def only_eval(override: list[str] | None) -> list[str]:
    """The overrides; ConfigError for one that is not of `eval`, or that would leave symbols out."""
    for text in override or []:
        if not text.startswith("eval.") or text.startswith("eval.max_symbols"):
            raise ConfigError(f"--set {text}: only keys of eval, and not max_symbols (there is --limit)")
    return override or []


@app.command("compare-scores")
def compare_scores(
    a: Annotated[Path, typer.Argument(metavar="A", help="a run folder, or a file of scores")],
    b: Annotated[Path, typer.Argument(metavar="B", help="what A is compared with")],
    more_a: Annotated[list[Path] | None, typer.Option("--a", help="another seed of A; may be repeated")] = None,
    more_b: Annotated[list[Path] | None, typer.Option("--b", help="another seed of B; may be repeated")] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="run folders: the set; default: the runs' own corpus")
    ] = None,
    split: SplitName = "valid",
    piece: Piece = None,
    limit: Limit = None,
    override: Settings = None,
    checkpoint: Which = "last",
    as_json: AsJson = False,
) -> None:
    """Is A better than B on the same units, by how many bits, and how sure is that?"""
    from lmtrain.journal import strict
    from lmtrain.likelihood.comparing import compare_sides, describe, head_of_run
    from lmtrain.likelihood.sets import OWN

    overrides = only_eval(override)

    def score_run(folder: Path) -> dict[str, Any]:
        given = data or f"{OWN}:{split}"
        return head_of_run(
            folder, given=given, split=split, checkpoint=checkpoint, overrides=overrides, piece=piece, limit=limit
        )

    told = compare_sides([a, *(more_a or [])], [b, *(more_b or [])], score=score_run)
    if as_json:
        print_json(strict(told))
    else:
        print("\n".join(describe(each) for each in told))
