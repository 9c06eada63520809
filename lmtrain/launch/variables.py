"""Which variables of this shell the ranks get, and how: in `.deepspeed_env`, in a file of 0600, or not at all.

Over pdsh DeepSpeed forwards PYTHON* and a few families for accelerators by itself; the rest it reads from
`.deepspeed_env`, KEY=VALUE lines alone, and prints. So tokens and keys are never in that file, nor in the environment
of the launcher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmtrain.errors import InputError
from lmtrain.follower import is_secret, secrets_in
from lmtrain.launch.hostfile import Fault
from lmtrain.launch.shell import is_identifier, is_inert

FILE = ".deepspeed_env"
FILE_VARIABLE = "DS_ENV_FILE"
_TRAVEL = re.compile(r"(HF|HUGGING_FACE|WANDB)_.+|OMP_.+|DS_ACCELERATOR")
"""What the ranks of other hosts are given."""
_TRAVEL_HIDDEN = re.compile(r"(AWS|AZURE|GOOGLE)_.+")
"""What opens remote corpora: given to the ranks as well, but none of it is printed."""
_BEFORE_PYTHON = re.compile(r"OMP_.+|DS_ACCELERATOR")
"""What has to be in a rank's environment when it starts; all else can be set by the rank itself."""
_SENT_BY_DEEPSPEED = re.compile(
    r"(MLFLOW|PYTHON|MV2|UCX|NCCL|BKCL|XPU|XMLIR|LD_LIBRARY|PATH|NEUWARE_HOME|CNCL|ASCEND|HCCL|BCCL|BIREN|SUPA).*",
    re.DOTALL,
)
"""The families that DeepSpeed exports on other hosts, over all its accelerators."""
_DROPPED = re.compile(
    r"PDSH_.*|WCOLL|DSHPATH|FANOUT|DS_ENV_FILE|LMTRAIN_.*|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|LOCAL_SIZE"
    r"|MASTER_(ADDR|PORT)|SLURM_(PROCID|LOCALID|STEP_ID)|OMPI_COMM_WORLD_.*|JOB_COMPLETION_INDEX",
    re.DOTALL,
)
"""Options of pdsh that could name programs and files, and what another launcher left behind."""
_URL_PASSWORD = re.compile(r"\w+://[^/\s:@]*:[^/\s@]+@")


@dataclass(slots=True)
class Variables:
    """shown: for `.deepspeed_env`. hidden: for the file of 0600. own: the launcher's environment, without secrets.

    secrets: values that appear nowhere else.
    """

    shown: dict[str, str] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)
    secrets: frozenset[str] = frozenset()


def sort(environment: Mapping[str, str], *, file: Mapping[str, str] | None = None) -> Variables:
    """Sort the variables of this shell. file: those of the user's own `.deepspeed_env`, which come last and all travel.

    Raises InputError, which names the variable and never its value, where one that other hosts get could be run there.
    """
    file = file or {}
    found = Variables(secrets=secrets_in({**environment, **file}))
    for name, value in environment.items():
        if _DROPPED.fullmatch(name):
            continue
        secret = _holds_secret(name, value, found.secrets)
        if _SENT_BY_DEEPSPEED.fullmatch(name) and not secret:
            _require_inert(name, value, where="the environment")
        if not secret:
            found.own[name] = value
        if _TRAVEL.fullmatch(name) or _TRAVEL_HIDDEN.fullmatch(name):
            _place(found, name, value, hidden=secret or _TRAVEL_HIDDEN.fullmatch(name) is not None)
    for name, value in file.items():
        secret = _holds_secret(name, value, found.secrets)
        if not secret:
            _require_inert(name, value, where=FILE)
        _place(found, name, value, hidden=secret)
    return found


def _holds_secret(name: str, value: str, secrets: frozenset[str]) -> bool:
    return is_secret(name) or _URL_PASSWORD.search(value) is not None or any(secret in value for secret in secrets)


def _place(found: Variables, name: str, value: str, *, hidden: bool) -> None:
    """Into one of the two; a value that a shell would act upon goes the way on which there is no shell."""
    if not hidden and (_BEFORE_PYTHON.fullmatch(name) or not is_identifier(name)):
        _require_inert(name, value, where="the environment")
    (found.hidden if hidden or not is_inert(value) else found.shown)[name] = value
    (found.shown if name in found.hidden else found.hidden).pop(name, None)


def _require_inert(name: str, value: str, *, where: str) -> None:
    if not is_identifier(name):
        raise InputError(f"{where} has a variable {name!r}, a name that no shell can export; unset it")
    if not is_inert(value):
        raise InputError(
            f'the value of {name} in {where} holds a character that a shell acts upon (one of " $ ` \\ % ! or a '
            "control character, or a space at its end), and other hosts get it; change or unset it"
        )


def lint(text: str) -> Iterator[Fault]:
    """What would stop the launcher at a `.deepspeed_env`: it takes KEY=VALUE lines only."""
    for number, line in enumerate(_lines(text), 1):
        key, sign, _ = line.partition("=")
        comment = line.lstrip().startswith("#")
        if not sign or not key.strip() or comment:
            kind = "blank" if not line.strip() else "a comment" if comment else "no KEY=VALUE"
            yield Fault(number, kind, "remove the line: the launcher takes KEY=VALUE lines only")


def secret_lines(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of what looks like a secret in a `.deepspeed_env`."""
    for number, line in enumerate(_lines(text), 1):
        key = line.partition("=")[0].strip()
        if "=" in line and key and is_secret(key):
            yield number, key


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []


def places(environment: Mapping[str, str], folder: Path) -> list[Path]:
    """Where the launcher looks for a `.deepspeed_env` when it is started in `folder`; later ones win."""
    name = environment.get(FILE_VARIABLE) or FILE
    return list(dict.fromkeys([Path(environment.get("HOME") or Path.home()) / name, folder / name]))


def read_files(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The variables of the user's own `.deepspeed_env` files. Raises InputError for what would stop the launcher."""
    found: dict[str, str] = {}
    for path in places(environment, folder):
        if not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; mend it or remove it") from None
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8; write KEY=VALUE lines") from None
        for fault in lint(text):
            raise InputError(f"{path} line {fault.line} is {fault.problem}; {fault.advice}")
        for line in _lines(text):
            key, _, value = line.partition("=")
            found[key.strip()] = value.strip()
    return found


def file_text(shown: Mapping[str, str]) -> str:
    """The text of a `.deepspeed_env`: KEY=VALUE lines, nothing else."""
    return "".join(f"{name}={value}\n" for name, value in sorted(shown.items()))
