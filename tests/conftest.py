from pathlib import Path

import pytest
import torch

from tests import house


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is exhaustive is slow, too: `-m "not slow"` leaves both out."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are small and many run side by side: threads would only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with `tiny.yaml`, a prepared `corpus` and a finished run `runs/tiny`. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("house")
    house.texts(folder / "text")
    ran = house.lmtrain("train", house.config(folder))
    assert ran.code == 0, ran.err
    return folder
