"""What tests share: of the front end a checkpoint without weights, of the batcher a tiny model and what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.agreement import both, join, lighthouses  # noqa: F401
from support.batching import NEW_TOKENS, PROMPTS
from support.families import FAMILIES, build
from support.front_end import make_checkpoint, make_config
from support.seat import bench  # noqa: F401

from elastic_moe.config import ServeConfig
from elastic_moe.integrations.transformers import elasticize
from elastic_moe.membership.launch import Launch
from elastic_moe.runtime import ElasticRuntime


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


@pytest.fixture(scope="module")
def model() -> Iterator[torch.nn.Module]:
    runtime = ElasticRuntime.join(Launch(), device=torch.device("cpu"))
    yield elasticize(build(FAMILIES["qwen3_moe"]()), runtime).eval()
    runtime.close()


@pytest.fixture(scope="module")
def greedy() -> dict[str, list[int]]:
    """What transformers' own generate makes of each prompt alone."""
    alone = build(FAMILIES["qwen3_moe"]())
    return {
        name: alone.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS[name], do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        for name, prompt in PROMPTS.items()
    }
