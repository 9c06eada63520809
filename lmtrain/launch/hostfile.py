"""A hostfile, `host slots=N` a line, as DeepSpeed's launcher reads it; but only names and addresses, never an option.

The launcher takes any word for a host and hands it to ssh and pdsh: `-oProxyCommand=...` would be run, `^file`, `a,b`
and `n[1-9]` are pdsh's own language, and a colon cuts a name in two (`rcmd:host` to pdsh, `host:slot` to --include).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.errors import InputError

MOST_SLOTS = 64
_NAME = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)
_LINE = re.compile(r"([^ \t]+)[ \t]+slots=([0-9]+)([^ \t]*)")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1"})


@dataclass(frozen=True, slots=True)
class Host:
    """A host by the name that ssh gets, and the numbers of its slots (cards), ascending."""

    name: str
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line of a file (counted from 1), and what to do."""

    line: int
    problem: str
    advice: str


def is_name(text: str) -> bool:
    """Whether a word is a host's name or an IPv4 address, and nothing that ssh, pdsh or a shell could act upon."""
    return _NAME.fullmatch(text) is not None


def lint(text: str) -> tuple[dict[str, tuple[int, Host]], list[Fault]]:
    """The hosts of a hostfile's text by name, with the line of each, and everything that is wrong with it."""
    found: dict[str, tuple[int, Host]] = {}
    faults: list[Fault] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if _CONTROL.search(line):
            faults.append(Fault(number, f"{line!r} holds a control character", "write the line anew"))
        elif match is None or match[3]:
            faults.append(Fault(number, f"{line!r}", "write `host slots=N`, without spaces around ="))
        elif match[1] in found:
            faults.append(Fault(number, f"{match[1]} stands in line {found[match[1]][0]} too", "one line a host"))
        elif fault := _fault(match[1], match[2]):
            faults.append(Fault(number, *fault))
        else:
            found[match[1]] = (number, Host(match[1], tuple(range(int(match[2])))))
    return found, faults


def _fault(name: str, slots: str) -> tuple[str, str] | None:
    """(problem, advice) of a host's name and its slots."""
    if name.startswith("-"):
        return f"{name!r} is an option of ssh, not a host", "remove the line: ssh would run it"
    if ":" in name:
        return (
            f"{name!r} has a colon",
            "the launcher cuts it in two: give the host a name, in /etc/hosts or ~/.ssh/config",
        )
    if "@" in name:
        return f"{name!r} has a user in it", "write the host alone, and its user into ~/.ssh/config"
    if not is_name(name):
        return f"{name!r} is no host's name", "write one name or IPv4 address: letters, digits, dots, hyphens"
    if len(slots) > 4 or not 1 <= int(slots) <= MOST_SLOTS:
        what = "no slots" if not slots.strip("0") else f"slots={slots[:20]}"
        return f"{name} has {what}", f"write slots=1 to {MOST_SLOTS}, or remove the line"
    return None


def read(path: Path) -> list[Host]:
    """The hosts of a hostfile, in its order. Raises InputError, one line, with every fault of the file."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"--hostfile {path} cannot be read: {error.strerror}; give the right path") from None
    except UnicodeDecodeError:
        raise InputError(f"--hostfile {path} is not UTF-8; write `host slots=N`, a line a host") from None
    found, faults = lint(text)
    if faults:
        lines = [f"{path} line {fault.line}: {fault.problem}; {fault.advice}" for fault in faults[:5]]
        raise InputError(" | ".join(lines) + (f" | and {len(faults) - 5} more" if len(faults) > 5 else ""))
    if not found:
        raise InputError(f"{path} names no host; write `host slots=N`, a line a host")
    return [host for _, host in found.values()]


def choose(hosts: Sequence[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """The hosts and slots that DeepSpeed's --include or --exclude leave: NAME[:SLOT[,SLOT...]][@NAME...].

    Raises InputError for both at once, a host or slot that is not in the hostfile, or when nothing is left.
    """
    if include and exclude:
        raise InputError("--include and --exclude are both given; use one")
    if not include and not exclude:
        return list(hosts)
    flag = "--include" if include else "--exclude"
    known = {host.name: host for host in hosts}
    named: dict[str, set[int]] = {}
    for part in (include or exclude).split("@"):
        name, colon, numbers = part.partition(":")
        if name not in known:
            raise InputError(f"{flag} names {name!r}, which is not in the hostfile; it has {', '.join(known)}")
        slots = set(known[name].slots)
        if colon:
            if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", numbers):
                raise InputError(f"{flag} {part!r}: wanted NAME:SLOT,SLOT with numbers from 0 on")
            wanted = {int(number) for number in numbers.split(",")}
            if wanted - slots:
                raise InputError(f"{flag} {part!r}: {name} has the slots 0..{max(slots)}")
            slots = wanted
        named.setdefault(name, set()).update(slots)
    left = []
    for host in hosts:
        mine = named.get(host.name, set())
        slots = mine if include else set(host.slots) - mine
        if slots:
            left.append(Host(host.name, tuple(sorted(slots))))
    if not left:
        raise InputError(f"{flag} {include or exclude} leaves no slot")
    return left


def text_of(hosts: Sequence[Host]) -> str:
    """A hostfile with these hosts; slots in it are counted from 0 up to the last that is used."""
    return "".join(f"{host.name} slots={max(host.slots) + 1}\n" for host in hosts)


def include_of(hosts: Sequence[Host]) -> str:
    """The --include that takes these slots of `text_of`; empty when it is all of them."""
    if all(host.slots == tuple(range(len(host.slots))) for host in hosts):
        return ""
    return "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in hosts)
