"""One server of four ranks for all tests that leave it whole, and what transformers alone makes of the same prompts."""

from collections.abc import Iterator

import pytest
from support.reference import Reference
from support.server import Server

from launch.server import torchrun


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Four ranks with the demo model; stopped by SIGINT, after which nothing may be left."""
    failed_before = request.session.testsfailed
    with Server(torchrun(4), "model=demo", "log_level=warning") as server:
        yield server
        if request.session.testsfailed > failed_before:
            print(server.log())
        server.stop()
