"""launch/bench.py from the command line: JSON lines, the table, and what each mistake is told."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from launch.benchmarks.config import NAMES, BenchRunConfig
from launch.config import REPO, load
from launch.gpus import rates_of, ways
from launch.random_model import SHAPES, bytes_per_step

KEYS = {"algorithm", "trace", "layers", "experts", "slots", "ranks", "ms", "max_mean", "max_mean_other", "moved_share"}
KEYS |= {"max_mean_worst_layer", "max_mean_moved", "ms_moved"}


def bench(*arguments):
    command = [sys.executable, str(REPO / "launch" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def rows_of(ended):
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_balance_prints_a_json_line_for_each_result():
    ended = bench("bench.sizes=2x8x12x4,1x6x6x3", "bench.repeats=1")
    rows = rows_of(ended)
    assert all(set(row) >= KEYS for row in rows)
    assert {(row["algorithm"], row["layers"], row["ranks"]) for row in rows} == {
        (algorithm, *size) for algorithm in ("search", "deepseek") for size in ((2, 4), (1, 3))
    }
    assert all(row["ms"] > 0 and row["max_mean"] >= 1 and 0 <= row["moved_share"] <= 1 for row in rows)
    assert "bench=balance" in ended.stderr


def test_balance_reads_traces(tmp_path):
    counts = np.arange(24, dtype=float).reshape(3, 8)
    counts[0] = 0  # a dense layer
    (tmp_path / "one.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    rows = rows_of(bench(f"bench.traces={tmp_path}", "bench.sizes=2x8x12x4", "bench.repeats=1"))
    assert {row["trace"] for row in rows} == {"one"}
    assert all(row["max_mean_other"] is None and row["moved_share"] is None for row in rows), "no other trace"
    (tmp_path / "one.json").write_text('{"counts": 1}')
    ended = bench(f"bench.traces={tmp_path}", "bench.sizes=2x8x12x4")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"elastic_moe: {tmp_path}/one.json: not {{")


def test_help_and_no_torch():
    ended = bench("--help")
    assert ended.returncode == 0
    assert "  bench=" + "|".join(NAMES) in ended.stdout
    code = "import sys; sys.argv = ['bench.py', '--help']; from launch import bench; bench.main(); "
    code += "import launch.benchmarks.balance; assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=REPO, env={"PYTHONPATH": str(REPO)}, check=True, capture_output=True, timeout=60)


MISTAKES = {
    "bench=nothing": f"bench=nothing: no such bench; choose one of {', '.join(NAMES)}",
    "bench.repeats=0": "bench.repeats=0: must be 1 or more",
    "bench.repeat=1": "unknown key 'bench.repeat'; did you mean bench.repeats...",
    "bench.seed=-1": "bench.seed=-1: must be 0 or more",
    "bench.name=serve": "bench.name='serve': must be one of ...",
    "bench.traces=/no/such": "bench.traces='/no/such': must be empty, or a folder that holds JSON files",
    "bench.plot=/no/such/a.png": "bench.plot='/no/such/a.png': its folder does not exist",
    "bench.ranks_per_node=0": "bench.ranks_per_node=0: must be 1 or more",
    "bench.sizes=": "bench.sizes='': must be a comma list of ...",
    "bench.sizes=1x2x3": "bench.sizes='1x2x3': must be a comma list of ...",
    "bench.sizes=1x8x4x4": "bench.sizes='1x8x4x4': must be a comma list of ...",
    "bench.sizes=1x8x9x4": "bench.sizes='1x8x9x4': must be a comma list of ...",
    "bench=rebalance bench.model=large": "bench.model='large': must be one of demo, random",
    "bench=rebalance bench.ranks=1": "bench.ranks=1: must be 2 or more",
    "bench=rebalance bench.streams=0": "bench.streams=0: must be 1 or more",
    "bench=rebalance bench.tokens=1": "bench.tokens=1: must be 2 or more",
    "bench=rebalance bench.redundant_slots=-1": "bench.redundant_slots=-1: must be 0 or more",
    "bench=rebalance bench.interval_s=0": "bench.interval_s=0.0: must be more than 0, and finite",
    "bench=rebalance bench.threshold=0.5": "bench.threshold=0.5: must be 1 or more, and finite",
    "bench=rebalance bench.half_life_steps=0": "bench.half_life_steps=0: must be 1 or more",
    "bench=gpu_serve bench.shape=huge": "bench.shape='huge': must be one of small, medium, qwen3_30b",
    "bench=gpu_serve bench.rank_list=1,x": "bench.rank_list='1,x': must be a comma list of whole numbers, 1 or more",
    "bench=exchange bench.hidden_list=0": "bench.hidden_list='0': must be a comma list of whole numbers, 1 or more",
    "bench=exchange bench.experts=12": "bench.experts=12: must be a multiple of each of bench.rank_list=2,4,8",
    "bench=exchange bench.top_k=129": "bench.top_k=129: must be at most bench.experts=128",
}
OF_OTHERS = {
    "balance": ("device=cuda", "fp8=true"),
    "exchange": ("sizes=1x2x2x1", "ranks=2", "plot=a.png"),
    "front_end": ("streams=3", "device=cuda"),
    "gpu_recovery": ("tokens=3", "fp8=true"),
    "gpu_serve": ("repeats=3", "streams=3"),
    "layer": ("repeats=3", "shape=small"),
    "rebalance": ("rank_list=1", "eplb_mode=sync"),
    "rejoin": ("threshold=2", "streams=3"),
    "rfork": ("threshold=2", "plot=a.png"),
    "scale": ("ranks=2", "plot=a.png"),
    "sources": ("ranks=2", "plot=a.png"),
}
"""Keys that a benchmark does not obey."""


def refusal(*overrides):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is looked at
        load(BenchRunConfig, "bench", list(overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_told_in_one_line(overrides):
    message, said = MISTAKES[overrides], refusal(*overrides.split())
    assert said == message or (message.endswith("...") and said.startswith(message.removesuffix("...")))


@pytest.mark.parametrize("name", NAMES)
def test_a_key_of_another_benchmark_is_refused(name):
    for override in OF_OTHERS[name]:
        key = override.partition("=")[0]
        assert refusal(f"bench={name}", f"bench.{override}").startswith(f"bench.{key}: not a key of what is chosen; ")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_name_and_keys_of_the_schema(name):
    assert load(BenchRunConfig, "bench", [f"bench={name}"]).bench.name == name


def test_a_mistake_ends_with_2():
    ended = bench("bench=nothing")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"elastic_moe: bench=nothing: no such bench; choose one of {', '.join(NAMES)}\n"


def test_gpu_benchmarks_use_nccl_only_where_ranks_have_a_gpu_each():
    assert ways(1, 1) == [("collective", False), ("symmetric", True)]
    assert ways(4, 1) == [("symmetric", False), ("symmetric", True)]
    assert ways(2, 2) == [("collective", False), ("symmetric", False), ("symmetric", True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["exchange", "gpu_serve", "gpu_recovery", "layer"])
def test_gpu_benchmarks_say_that_they_need_one(name: str):
    ended = bench(f"bench={name}")
    assert ended.returncode == 2
    assert ended.stderr == f"elastic_moe: bench={name} needs a GPU\n"


def test_what_a_step_reads_is_what_the_model_has():
    assert bytes_per_step(SHAPES["qwen3_30b"], 1) == pytest.approx(5.4e9, rel=0.05)  # 2.7B, without a vocabulary


def test_the_rates_of_a_card_are_found_by_its_name():
    rates = rates_of("NVIDIA H200")
    assert rates is not None
    assert rates.memory_bytes_per_s > 4e12
    assert rates_of("NVIDIA H100 80GB HBM3") != rates
    assert rates_of("NVIDIA A100-SXM4-80GB") is None
