"""What passes through DeepSpeed, pdsh, ssh and the other host's shell, and arrives as it was.

DeepSpeed puts arguments that have a space between double quotes (escaping only the double quote in them) and leaves
all others bare; pdsh joins the words and replaces %h, %u, %n; the shell of the other host reads the result.
"""

from __future__ import annotations

import re

from lmtrain.errors import InputError

_PLAIN = re.compile(r"[A-Za-z0-9_@+:,./-][A-Za-z0-9_@+=:,./-]*")
_UNSENDABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff%]")
_LIVE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff%\"$`\\!]")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def word(text: str, *, what: str) -> str:
    """An argument, so written that the other host's shell gives it back; InputError where there is no such way."""
    if _UNSENDABLE.search(text):
        raise InputError(
            f"{what} holds a control character or a percent sign, which cannot be sent to other hosts; "
            "put the value into the config file"
        )
    if _PLAIN.fullmatch(text):
        return text
    if " " in text:  # comes between double quotes: the double quote itself is escaped there
        return re.sub(r"([\\$`])", r"\\\1", text)
    return "'" + text.replace("'", "'\\''") + "'"


def path_word(text: str, *, what: str) -> str:
    """A path that the launcher sends bare; InputError when a shell would not take it as it is."""
    if not _PLAIN.fullmatch(text) or text.startswith("-"):
        raise InputError(
            f"{what} {text!r} is sent to other hosts without quotes; use letters, digits and _ @ + = : , . / - alone"
        )
    return text


def is_identifier(name: str) -> bool:
    """Whether a shell can export a variable of this name."""
    return _IDENTIFIER.fullmatch(name) is not None


def is_inert(value: str) -> bool:
    """Whether a variable's value is exported as it is: nothing that a shell or pdsh acts upon, no space at the ends."""
    return _LIVE.search(value) is None and value == value.strip()
