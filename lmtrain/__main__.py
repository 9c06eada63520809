"""The command line. Results that a program may read go to stdout with --json; everything else goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lmtrain import __version__
from lmtrain.errors import InputError, LmtrainError

app = typer.Typer(
    name="lmtrain",
    help="Train autoregressive models by maximum likelihood; evaluate, sample and keep them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="List, verify and export checkpoints.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as those in configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="overrides, values in YAML")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
AsJson = Annotated[bool, typer.Option("--json", help="the result as JSON, alone on stdout")]
WhichWeights = Annotated[str | None, typer.Option("--weights", help="raw or ema; default: the run's eval.weights")]
Which = Annotated[str, typer.Option("--checkpoint", "-c", help="last, best or a step")]


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


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=False))


@app.command()
def train(context: typer.Context, config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, evaluating as it goes; go on from the newest valid checkpoint of the run folder."""
    from lmtrain.launch import prefix, private

    if os.environ.pop(prefix.VARIABLE, ""):
        prefix.begin(os.environ.get("RANK", "?"))
    private.take(os.environ, local_rank=context.obj["local_rank"])

    from lmtrain import place, run, schema

    where = place.find(os.environ, local_rank=context.obj["local_rank"])
    raise typer.Exit(
        run.train_run(schema.load(config, overrides or [], environment=os.environ), where, environment=os.environ)
    )


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
        _print_json(report.to_json())
    else:
        _say(report.describe())


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
        _print_json(recipe)
    else:
        _say(f"{recipe['kind']} tokenizer with {recipe['vocab']} symbols, sha256 {recipe['sha256']}, in {out}")


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
        _print_json({name: result.to_json() for name, result in results.items()})
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
        _print_json(samples)
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
        _print_json(told)
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
        _print_json(told)
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


@checkpoint_app.command("list")
def checkpoint_list(folder: RunPath, as_json: AsJson = False) -> None:
    """The checkpoints of a run, with step, size, layout, and whether they verify."""
    from lmtrain import use

    rows = use.list_checkpoints(folder)
    if as_json:
        _print_json(rows)
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
        _print_json(rows)
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
        _say(str(path))


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
        _print_json(generated)
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
        _print_json([finding.to_json() for finding in findings])
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
