"""The command line. Results that a program may read go to stdout with --json; everything else goes to stderr."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lmtrain import __version__
from lmtrain.commands import compressing, detecting, keeping, scoring, training, using, validating
from lmtrain.errors import LmtrainError

app = typer.Typer(
    name="lmtrain",
    help="Train autoregressive models by maximum likelihood; evaluate, sample and keep them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for family in (training, using, compressing, scoring, validating, detecting, keeping):
    app.add_typer(family.app)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    local_rank: Annotated[
        int, typer.Option("--local_rank", "--local-rank", help="set by the launcher", hidden=True)
    ] = -1,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="and exit")] = False,
) -> None:
    """What comes before the verb; launchers put --local_rank there."""
    context.obj = {"local_rank": local_rank}


def main() -> None:
    """Entry point: one line and an exit code for whatever the user can mend."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("JOB_COMPLETION_INDEX")
    try:
        app()
    except LmtrainError as error:
        prefix = f"lmtrain [rank {rank}]" if rank not in {None, "0"} else "lmtrain"
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
