"""What must be the same on all hosts of a job, compared before anything is started."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from lmtrain.errors import EngineError
from lmtrain.launch.ssh import Answer

FREE = 1 << 30
"""Bytes that a run folder's disk must have at least, on every host."""
CLOCK_SECONDS = 5.0


def compare(ours: Mapping[str, Any], answer: Answer) -> list[str]:
    """What is wrong with a host that answered, against this machine; each line says what to do."""
    theirs = answer.facts
    assert theirs is not None
    found = []
    names = sorted(set(ours["code"]) | set(theirs["code"]))
    differ = [name for name in names if ours["code"].get(name) != theirs["code"].get(name)]
    if differ:
        more = f" and {len(differ) - 1} more files" if len(differ) > 1 else ""
        found.append(f"has other code: lmtrain/{differ[0]}{more}; bring it to the same commit")
    for name in ("python", "torch", "deepspeed"):
        if ours[name] != theirs[name]:
            found.append(f"has {name} {theirs[name] or 'not at all'}, here it is {ours[name]}; install the same")
    if ours["config"] != theirs["config"]:
        found.append(f"has {_other(theirs['config'])} config; copy it there, or use a shared folder")
    for path, sha256 in ours["corpora"].items():
        if theirs["corpora"].get(path) != sha256:
            found.append(f"has {_other(theirs['corpora'].get(path))} corpus {path}; prepare or copy the same one")
    if not theirs["shared"]:
        found.append("does not see the run folder of this machine; set run.dir to a folder that all hosts share")
    if not theirs["writable"]:
        found.append("cannot write into the run folder; set run.dir to one that it can")
    if theirs["free"] < FREE:
        found.append(f"has {theirs['free'] / (1 << 30):.2f} GiB free at the run folder, wanted 1; free some")
    early, late = answer.asked - CLOCK_SECONDS, answer.answered + CLOCK_SECONDS
    if not early <= theirs["clock"] <= late:
        wrong = theirs["clock"] - (answer.asked + answer.answered) / 2
        found.append(f"has a clock that is {wrong:+.0f} s off; let it be set over the network")
    return found


def _other(found: str | None) -> str:
    return "no" if found is None else "another"


def rendezvous(answers: Sequence[Answer], *, interface: str | None) -> str:
    """The address of the first host at which the ranks meet: the interface's, or the one that ssh came to.

    Raises EngineError when a host has no such interface, or when the others could not reach the address.
    """
    for answer in answers:
        assert answer.facts is not None
        if interface is not None and interface not in answer.facts["addresses"]:
            has = ", ".join(sorted(answer.facts["addresses"]))
            raise EngineError(f"{answer.host.name} has no interface {interface!r} with an address; it has {has}")
    facts = answers[0].facts
    assert facts is not None
    if interface is not None:
        return str(facts["addresses"][interface][0])
    if len(answers) == 1 and not facts["arrived"]:
        return "127.0.0.1"
    # Where ssh came to; and, if the first host is this machine, where the others saw ssh come from.
    candidates = facts["arrived"][2:3] + [a for other in answers[1:] if other.facts for a in other.facts["arrived"][:1]]
    mine = {address for some in facts["addresses"].values() for address in some}
    for address in candidates:
        if address in mine and (len(answers) == 1 or not ipaddress.ip_address(address).is_loopback):
            return str(address)
    known = ", ".join(sorted(name for name, some in facts["addresses"].items() if not some[0].startswith("127.")))
    raise EngineError(
        f"no address of {answers[0].host.name} is known that the other hosts could reach; "
        f"say --interface, one of {known or '(it has none)'}"
    )
