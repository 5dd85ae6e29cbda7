"""Ranks that were not started alike are told in what they differ; and so is one that comes back changed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.server import DEMO_MODEL

from elastic_moe.config import EplbConfig, ExchangeConfig, ModelConfig, ServeConfig
from elastic_moe.group.view import Member, View
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.rendezvous import Seat, refuse_a_stranger, refuse_differences
from elastic_moe.serving.engine.alike import alike


def member(rank: int, node: int) -> Member:
    return Member(rank, node, f"i{rank}", 1, "host", "", "")


def test_ranks_that_are_alike_are_let_in():
    refuse_differences([(member(rank, 0), {"a": "1", "b": "2"}) for rank in range(3)])
    refuse_differences([(member(0, 0), {})])


def test_the_first_key_that_differs_is_told_with_who_has_what():
    said = [(member(rank, rank // 2), {"b": "x", "elastic.redundant_slots": str(rank // 2)}) for rank in range(4)]
    line = (
        r"elastic\.redundant_slots differs between the ranks: 0 on node 0 \(ranks 0, 1\); 1 on node 1 \(ranks 2, 3\)\. "
        "It must be the same on all nodes"
    )
    with pytest.raises(ValueError, match=line):
        refuse_differences(said)
    said[3][1].pop("b")
    with pytest.raises(ValueError, match=r"b differs .* x on node 0 \(ranks 0, 1, 2\); none on node 1 \(ranks 3\)"):
        refuse_differences(said)


def test_one_that_comes_back_must_be_as_the_group_is():
    def seat(**keys: str) -> Seat:
        return Seat(SeatStart(Launch()), alike=keys)

    view = View(4, (seat(a="1").member,))
    refuse_a_stranger(seat(a="1"), view)
    with pytest.raises(ValueError, match="rank 0 comes back with another checkpoint, model or setting"):
        refuse_a_stranger(seat(a="2"), view)


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    return ServeConfig(model=ModelConfig(path=str(tmp_path / "model")))


def test_what_may_differ_from_node_to_node(config: ServeConfig, tmp_path: Path):
    shutil.copytree(DEMO_MODEL, tmp_path / "elsewhere")
    other = replace(config, model=ModelConfig(path=str(tmp_path / "elsewhere"), name="x"))
    other.server.port, other.serving.kv_cache_tokens, other.log_level = 1, 4096, "error"
    assert alike(other, torch.float32) == alike(config, torch.float32)


def test_what_may_not(config: ServeConfig):
    before = alike(config, torch.float32)

    def changed(config: ServeConfig, dtype: torch.dtype = torch.float32) -> list[str]:
        after = alike(config, dtype)
        return [key for key in before if after[key] != before[key]]

    assert changed(config, torch.bfloat16) == ["model.dtype"]
    assert changed(replace(config, exchange=ExchangeConfig(fp8=True))) == ["exchange.fp8"]
    assert changed(replace(config, eplb=EplbConfig(mode="async", interval_s=3))) == ["eplb.mode", "eplb.interval_s"]
    config.elastic.redundant_slots = 1
    assert changed(config) == ["elastic.redundant_slots"]
    config.elastic.redundant_slots = 0
    path = Path(config.model.path) / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    assert changed(config) == ["model.path: config.json"]
