"""What commands have in common: their options, and where their words go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as those in configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="overrides, values in YAML")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
AsJson = Annotated[bool, typer.Option("--json", help="the result as JSON, alone on stdout")]
WhichWeights = Annotated[str | None, typer.Option("--weights", help="raw or ema; default: the run's eval.weights")]
Which = Annotated[str, typer.Option("--checkpoint", "-c", help="last, best or a step")]


def say(text: str) -> None:
    """A line for the reader, on stderr."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """A result for programs, on stdout."""
    print(json.dumps(value, indent=2, sort_keys=False))
