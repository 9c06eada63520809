"""What models of whole records of D symbols have in common: what they refuse, and how their streams count places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.nn.labels import label_classes
from lmtrain.nn.running import RunningHidden
from lmtrain.nn.stream import CachedStream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


@dataclass(slots=True)
class Reading:
    """What a stream remembers of a record. place: symbols read so far. sums: what the network kept of them."""

    place: int = 0
    started: bool = False
    sums: tuple[Tensor, ...] | None = None

    def unread(self, in_Bn: Tensor) -> Tensor:
        """The symbols of a record among the inputs: without the start symbol, which comes first and says nothing."""
        given_Bn = in_Bn if self.started else in_Bn[:, 1:]
        self.started = True
        return given_Bn

    def step(self, hidden: RunningHidden, in_Bn: Tensor, shift_BH: Tensor | None) -> Tensor:
        """[B, O] of running hidden units at the place behind the inputs, which are read."""
        x_Bn = self.unread(in_Bn)
        self.place += x_Bn.shape[1]
        sums_BH, out_BO = hidden(
            x_Bn, shift_BH=shift_BH, sums_BH=None if self.sums is None else self.sums[0], place=self.place
        )
        self.sums = (sums_BH,)
        out: Tensor = out_BO
        return out


def record_stream(model: Model, batch: int, *, cond: Cond) -> Stream:
    """A stream of a model that answers `want="next"` from what it keeps in a `Reading`."""
    state = Reading()

    def read(in_Bn: Tensor) -> Distribution:
        return model.distribution(model(in_Bn, cond=cond, want="next", state=state))

    return CachedStream(read, batch, cond=cond, context=model.context)


def check_records(spec: Spec, *, kind: str, reads: str, conditional: bool) -> None:
    """ConfigError when the model cannot read the corpus. reads: "bits", "levels" (two or more) or "reals"."""
    if spec.bos != spec.alphabet:
        raise ConfigError(
            f"model.kind = {kind} reads whole records (tables, images), but the corpus is text; use gpt or rnn for it"
        )
    given = "reals" if spec.alphabet == 0 else f"{spec.alphabet} levels"
    if reads == "bits" and spec.alphabet != 2:
        raise ConfigError(
            f"model.kind = {kind} reads bits, but the corpus has {given}; set data.view.binarise, or use made or gpt"
            if spec.alphabet
            else f"model.kind = {kind} reads bits, but the corpus has {given}; use rnade"
        )
    if reads == "levels" and spec.alphabet < 2:
        raise ConfigError(f"model.kind = {kind} reads two or more levels, but the corpus has {given}; use rnade")
    if reads == "reals" and spec.alphabet:
        raise ConfigError(f"model.kind = {kind} reads reals, but the corpus has {given}; use nade or made")
    label_classes(spec, conditional=conditional)
