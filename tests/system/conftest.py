"""Labs for the tests of this directory: each test that asks for one gets hosts of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.hosts import Lab, MissingCapability, require_capabilities


@pytest.fixture
def lab() -> Iterator[Lab]:
    try:
        require_capabilities()
    except MissingCapability as missing:
        pytest.skip(str(missing))
    with Lab() as lab:
        yield lab
    assert lab.leftovers() == []
