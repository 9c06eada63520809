"""Checkpoints, configs, the machine, and the demonstration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lmtrain.commands.options import AsJson, ConfigPath, Overrides, RunPath, Which, print_json, say
from lmtrain.errors import InputError

app = typer.Typer()
checkpoint_app = typer.Typer(help="List, verify and export checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


@checkpoint_app.command("list")
def checkpoint_list(folder: RunPath, as_json: AsJson = False) -> None:
    """The checkpoints of a run, with step, size, layout, and whether they verify."""
    from lmtrain import use

    rows = use.list_checkpoints(folder)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))


@checkpoint_app.command("verify")
def checkpoint_verify(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a checkpoint folder, or a run folder for all")],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a checkpoint against its hashes."""
    from lmtrain import use

    rows = use.verify_checkpoints(path)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['path']}: {row['problem'] or 'whole'}")
    if any(row["problem"] for row in rows):
        raise typer.Exit(4)


@checkpoint_app.command("export")
def checkpoint_export(
    folder: RunPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the safetensors files")],
    checkpoint: Which = "last",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    weights: Annotated[str, typer.Option(help="raw, or ema: the averaged ones")] = "raw",
) -> None:
    """Write the weights as safetensors: one file, or numbered parts with an index above 5 GB."""
    from lmtrain import use

    for path in use.export_checkpoint(folder, checkpoint=checkpoint, out=out, dtype=dtype, weights=weights):
        say(str(path))


@app.command()
def config(
    path: ConfigPath,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option(help="the DeepSpeed JSON that the engine is given")] = False,
    world: Annotated[int, typer.Option(min=1, help="ranks that --deepspeed reckons with")] = 1,
) -> None:
    """Print the resolved config (itself a valid config), or the generated DeepSpeed JSON."""
    from lmtrain import run, schema
    from lmtrain.config import dump

    resolved = schema.load(path, overrides or [], environment=os.environ)
    if deepspeed:
        generated = run.generated_json(resolved, world=world)
        if generated is None:
            raise InputError("engine.kind = plain does not use DeepSpeed; there is no JSON to print")
        print_json(generated)
    else:
        print(dump(resolved), end="")


@app.command()
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="a DeepSpeed hostfile to look at")] = None,
    as_json: AsJson = False,
) -> None:
    """Look over this machine: packages, devices, compiler, stale locks, disk, keys."""
    from lmtrain.report import doctor as surgery

    findings = surgery.examine(environment=os.environ, folder=Path.cwd(), hostfile=hostfile)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        surgery.show(findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="where the corpus and the runs go")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.2, max=60, help="about how long in all")] = 7.0,
) -> None:
    """Train a GPT and an RNN on text: kill and resume one, compare both, sample; then a PixelCNN on images."""
    from lmtrain.report import demo as show

    show.run_demo(folder, minutes=minutes)
