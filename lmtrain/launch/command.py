"""The `deepspeed` command of one attempt, its environment and its files."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.errors import EngineError, InputError
from lmtrain.launch import hostfile, prefix, private, variables
from lmtrain.launch.hostfile import Host
from lmtrain.launch.shell import path_word, word
from lmtrain.launch.ssh import Reach

FOLDER = "launch"
"""Below the run folder: the hostfile and the `.deepspeed_env` of the last attempt."""
HOSTFILE = "hostfile"


@dataclass(frozen=True, slots=True)
class Command:
    """What is executed, and with which variables. `text` is what a person may paste."""

    words: list[str]
    environment: dict[str, str]

    @property
    def text(self) -> str:
        """The command as it would be typed."""
        return shlex.join(["deepspeed" if i == 0 else text for i, text in enumerate(self.words)])


def deepspeed(environment: Mapping[str, str]) -> str:
    """The launcher of the environment that lmtrain runs in, else the first on PATH. Raises EngineError without one."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed", path=environment.get("PATH", os.defpath))
    if found is None:
        raise EngineError("no `deepspeed` command; pip install deepspeed into the environment that lmtrain runs in")
    return found


def build(
    hosts: Sequence[Host],
    *,
    reach: Reach,
    sorted_variables: variables.Variables,
    folder: Path,
    arguments: Sequence[str],
    address: str,
    port: int,
    drawn: str,
    interface: str | None = None,
    program: str,
) -> Command:
    """The command that starts the ranks on `hosts`; writes its files into `folder`, the run folder's `launch`.

    arguments: those of `python -m lmtrain`. address, port: where the ranks meet. Raises InputError for an argument or a
    path that cannot be sent to another host, and where a secret stands on the command line.
    """
    shown = dict(sorted_variables.shown)
    shown |= {private.LAUNCH: drawn, prefix.VARIABLE: "1"}
    if sorted_variables.hidden:
        shown[private.VARIABLE] = drawn
    if interface is not None:
        shown |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    list_file, env_file = folder / HOSTFILE, folder / variables.FILE
    folder.mkdir(parents=True, exist_ok=True)
    _write(list_file, hostfile.text_of(hosts))
    _write(env_file, variables.file_text(shown))

    words = [program, "--hostfile", str(list_file), "--no_ssh_check"]
    words += ["--master_addr", address, "--master_port", str(port)]
    if include := hostfile.include_of(hosts):
        words += ["--include", include]
    environment = {**sorted_variables.own, variables.FILE_VARIABLE: str(env_file.absolute())}
    if reach.here:
        environment |= shown
        sent = list(arguments)
    else:
        words.append("--force_multi")  # a single host would be started on this machine otherwise
        environment["PDSH_SSH_ARGS_APPEND"] = " ".join(reach.options())
        path_word(str(Path.cwd()), what="the working folder")
        path_word(sys.executable, what="the Python interpreter")
        sent = [word(text, what=f"argument {_name_of(text)}") for text in arguments]
    words += ["--module", "lmtrain", *sent]
    for text in words:
        if any(secret in text for secret in sorted_variables.secrets):
            raise InputError(
                f"a token or key of the environment stands in argument {_name_of(text)}, where every user of the hosts "
                "could read it; leave it out, the ranks get it in a private file"
            )
    return Command(words, environment)


def _name_of(text: str) -> str:
    """How an argument is named in a message: without its value."""
    return repr(text.partition("=")[0][:40] + "=...") if "=" in text else "..."


def _write(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
