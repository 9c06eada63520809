"""Making corpora and tokenizers, training, and training on several hosts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtrain.commands.options import AsJson, ConfigPath, Overrides, print_json, say
from lmtrain.errors import InputError

app = typer.Typer()
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")


@app.command()
def train(context: typer.Context, config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, evaluating as it goes; go on from the newest valid checkpoint of the run folder."""
    from lmtrain.launch import prefix, private

    if os.environ.pop(prefix.VARIABLE, ""):
        prefix.begin(os.environ.get("RANK", "?"))
    private.take(os.environ, local_rank=context.obj["local_rank"])

    from lmtrain import place, run, schema, stopping

    where = place.find(os.environ, local_rank=context.obj["local_rank"])
    code = run.train_run(schema.load(config, overrides or [], environment=os.environ), where, environment=os.environ)
    if where.world > 1:
        stopping.leave(code)
    raise typer.Exit(code)


@app.command()
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    hostfile: Annotated[Path, typer.Option("--hostfile", "-H", help="`host slots=N`, a line a host")] = Path(
        "hostfile"
    ),
    include: Annotated[str, typer.Option("--include", "-i", help="NAME[:SLOT,SLOT][@NAME...]: these alone")] = "",
    exclude: Annotated[str, typer.Option("--exclude", "-e", help="NAME[:SLOT,SLOT][@NAME...]: all but these")] = "",
    restarts: Annotated[int, typer.Option(min=0, max=1000, help="starts after a loss of ranks or hosts")] = 0,
    interface: Annotated[str | None, typer.Option(help="network interface on which the ranks meet and talk")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="where they meet; default: a free one")] = None,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="of the hosts' ssh")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="a file like ~/.ssh/config")] = None,
    check: Annotated[bool, typer.Option("--check", help="look the hosts over and start nothing")] = False,
) -> None:
    """Train on several hosts: look them over, then run the `deepspeed` command, again after a loss."""
    from lmtrain.launch.launcher import Wish
    from lmtrain.launch.launcher import launch as start

    wish = Wish(
        config=config,
        overrides=tuple(overrides or ()),
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        interface=interface,
        port=port,
        ssh_port=ssh_port,
        ssh_config=ssh_config,
        restarts=restarts,
        check_only=check,
    )
    raise typer.Exit(start(wish, environment=os.environ))


@app.command(hidden=True)
def probe() -> None:
    """What `launch` runs on each host: a request on stdin, the answer on stdout."""
    from lmtrain.launch import probe as probing

    print(probing.serve(sys.stdin.read(), environment=os.environ))


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option("--processes", "-p", min=0, help="0 = one a core")] = 0,
    force: Annotated[bool, typer.Option(help="replace a corpus that was prepared otherwise")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="only the blocks i modulo n: on many machines")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="put the corpus together from its parts")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the corpus `data.corpus` of a config from its `prepare` section: tokens in shards, with a fingerprint."""
    from lmtrain import corpora, schema

    if part is not None and merge:
        raise InputError("--part and --merge are both given; make all parts first, then merge them")
    settings = schema.load(config, overrides or [])
    report = corpora.prepare_corpus(settings, processes=processes, force=force, part=part, merge=merge)
    if as_json:
        print_json(report.to_json())
    else:
        say(report.describe())


@tokenizer_app.command("train")
def tokenizer_train(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the tokenizer and its recipe")] = Path(
        "tokenizers/new"
    ),
    as_json: AsJson = False,
) -> None:
    """Train the tokenizer that a config's `prepare` section describes, on the train split alone."""
    from lmtrain import corpora, schema

    recipe = corpora.train_tokenizer(schema.load(config, overrides or []), out)
    if as_json:
        print_json(recipe)
    else:
        say(f"{recipe['kind']} tokenizer with {recipe['vocab']} symbols, sha256 {recipe['sha256']}, in {out}")
