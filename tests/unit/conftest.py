"""What tests of the front end share: a checkpoint folder without weights, and the configuration that serves it."""

from pathlib import Path

import pytest
from support.front_end import make_checkpoint, make_config

from elastic_moe.config import ServeConfig


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As far as a front end looks into it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def config(checkpoint: Path) -> ServeConfig:
    return make_config(checkpoint)
