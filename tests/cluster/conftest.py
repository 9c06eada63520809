"""Hosts for the tests of this folder, where they can be made."""

import os

import pytest

from tests.cluster import nodes


@pytest.fixture(scope="session")
def hosts_possible():
    """Skips where no hosts can be made; fails there when LMTRAIN_NEED_HOSTS says that they must be."""
    reason = nodes.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("LMTRAIN_NEED_HOSTS") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def cluster(hosts_possible, tmp_path_factory):
    """Two hosts that live as long as a module's tests."""
    with nodes.Cluster(tmp_path_factory.mktemp("hosts") / "two", 2) as made:
        yield made


@pytest.fixture
def hosts(hosts_possible, tmp_path):
    """`hosts(3)`: new hosts for one test, which may break them."""
    made = []

    def make(count, **more):
        made.append(nodes.Cluster(tmp_path / f"hosts{len(made)}", count, **more).__enter__())
        return made[-1]

    yield make
    for one in made:
        one.close()
