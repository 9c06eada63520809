"""What the main thread is said to be doing."""

import pytest
import torch.distributed as dist

from lmtrain import section


def test_every_section_and_wait_moves_on():
    section.enter("here")
    first = section.current()
    with section.waiting():
        inside = section.current()
        with section.waiting():  # a collective within a collective is one wait
            assert section.current() == inside
    after = section.current()
    assert (first.name, first.waits) == ("here", False)
    assert (inside.name, inside.waits, inside.moves) == ("here", True, first.moves + 1)
    assert (after.name, after.waits, after.moves) == ("here", False, first.moves + 2)


@pytest.mark.parametrize(
    ("error", "torn"),
    [
        (RuntimeError("Connection reset by peer"), True),
        (dist.DistBackendError("timed out"), True),
        (ValueError("planted"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(0), False),
    ],
)
def test_only_what_a_collective_raises_may_be_anothers_fault(error, torn):
    with pytest.raises(type(error)), section.waiting():
        raise error
    assert section.current().torn is torn
    assert not section.current().waits
    section.enter("next")
    assert not section.current().torn
