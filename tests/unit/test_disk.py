"""Reading experts by several threads, slice by slice, straight to their places."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elastic_moe.errors import CheckpointError
from elastic_moe.weights import lanes as lanes_module
from elastic_moe.weights.copies import find_copies
from elastic_moe.weights.disk import AHEAD, AT_ONCE, Disk
from elastic_moe.weights.lanes import Lane, Part
from elastic_moe.weights.shards import Shards
from elastic_moe.weights.sources import Came, Missed, Origin, Until, Want

WANTS = [Want(0, expert, expert) for expert in range(160)]
READERS = 3
WAIT_S = 20.0

Tensors = Mapping[str, list[torch.Tensor]]


class Opened:
    """A landing that remembers what was opened."""

    def __init__(self) -> None:
        self.wants: list[Want] = []

    def open(self, want: Want) -> Sequence[torch.Tensor]:
        self.wants.append(want)
        return [torch.zeros(1)]


def fetch(disk: Disk, landing: Any, wants: Sequence[Want] = WANTS) -> Any:
    for told in disk.fetch(wants, landing, Until()):
        yield from told


def test_all_are_told_of_and_few_are_open_at_a_time():
    told, landing = [], Opened()

    def read(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        if expert in (3, 7):
            raise CheckpointError("cut")
        return 1

    for one in fetch(Disk(read, READERS), landing):
        assert len(landing.wants) - len(told) <= AHEAD * READERS * AT_ONCE
        told.append(one)
    assert sorted(told) == sorted(
        Missed(want, "cut") if want.expert in (3, 7) else Came(want, Origin.DISK) for want in WANTS
    )


def test_as_many_read_at_once_as_there_are_readers():
    all_there = threading.Barrier(READERS)

    def read(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        all_there.wait(WAIT_S)
        return 1

    assert len(list(fetch(Disk(read, READERS), Opened(), WANTS[: 2 * READERS]))) == 2 * READERS


def test_when_it_is_left_nobody_reads_any_more():
    before, reading, largest, lock = set(threading.enumerate()), 0, 0, threading.Lock()

    def read(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        nonlocal reading, largest
        with lock:
            reading += 1
            largest = max(largest, reading)
        time.sleep(0.02)
        with lock:
            reading -= 1
        return 1

    landing = Opened()
    running = fetch(Disk(read, READERS), landing)
    next(running)
    running.close()
    assert largest > 1
    assert reading == 0
    assert len(landing.wants) < len(WANTS)
    deadline = time.monotonic() + WAIT_S
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "readers are left"
        time.sleep(0.01)


def test_a_bug_in_a_reader_is_the_askers():
    def read(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        if expert == 5:
            raise ZeroDivisionError("a bug")
        return 1

    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(fetch(Disk(read, READERS), Opened()))


def one_expert(tensors: Tensors) -> dict[str, torch.Tensor]:
    """As transformers does: gate and up beside each other, experts stacked."""
    gate, up, down = (torch.stack(tensors[name]) for name in ("gate", "up", "down"))
    return {"gate_up": torch.cat([gate, up], 1), "down": down}


SHAPES: Mapping[str, Sequence[tuple[int, ...]]] = {"gate": [(3, 4)], "up": [(3, 4)], "down": [(4, 3)]}


def test_what_is_only_put_beside_each_other_goes_to_its_place():
    copies = find_copies(SHAPES, one_expert)
    assert copies is not None
    sources = {name: [torch.randn(shape) for shape in shapes] for name, shapes in SHAPES.items()}
    made = list(one_expert(sources).values())
    out = [torch.zeros_like(tensor[0]) for tensor in made]
    for copy in copies:
        out[copy.target][copy.region] = sources[copy.pattern][copy.position]
    assert all(torch.equal(mine, right[0]) for mine, right in zip(out, made, strict=True))


def drops_some(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {"down": torch.stack(tensors["down"])}


def transposes(tensors: Tensors) -> dict[str, torch.Tensor]:
    return one_expert({**tensors, "down": [tensor.t() for tensor in tensors["down"]]})


def adds(tensors: Tensors) -> dict[str, torch.Tensor]:
    return one_expert({**tensors, "down": [tensor + 1 for tensor in tensors["down"]]})


def interleaves(tensors: Tensors) -> dict[str, torch.Tensor]:
    made = one_expert(tensors)
    return {**made, "gate_up": made["gate_up"].view(1, 2, 3, 4).transpose(1, 2).reshape(1, 6, 4)}


def pads(tensors: Tensors) -> dict[str, torch.Tensor]:
    made = one_expert(tensors)
    return {**made, "down": torch.nn.functional.pad(made["down"], (0, 1))}


def wants_floats(tensors: Tensors) -> dict[str, torch.Tensor]:
    raise RuntimeError("not implemented for 'Int'")


@pytest.mark.parametrize("run", [drops_some, transposes, adds, interleaves, pads, wants_floats])
def test_what_does_anything_else_is_not_taken_for_it(run: Any):
    assert find_copies(SHAPES, run) is None


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    monkeypatch.setattr(lanes_module, "SLICE_BYTES", 64)
    tensors = {"one": torch.randn(9, 5), "stacked": torch.randn(3, 7, 4).bfloat16(), "line": torch.randn(33)}
    save_file(tensors, tmp_path / "model.safetensors")
    return Shards(tmp_path)


@pytest.mark.parametrize(("name", "index"), [("one", None), ("stacked", None), ("stacked", 2), ("line", None)])
@pytest.mark.parametrize("way", ["in place", "strided", "cast"])
def test_a_lane_fills_whatever_the_target_is(shards: Shards, name: str, index: int | None, way: str):
    right = shards.read(name, index)
    dtype = torch.float64 if way == "cast" else right.dtype
    out = torch.zeros(right.shape, dtype=dtype)
    if way == "strided":
        out = torch.zeros(*right.shape[:-1], 2 * right.shape[-1], dtype=dtype)[..., ::2]
    Lane().read(shards, [Part(name, index, out)])
    assert torch.equal(out, right.to(dtype))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_lane_reads_what_lies_together_at_once(shards: Shards, monkeypatch: pytest.MonkeyPatch, dtype: Any):
    monkeypatch.setattr(lanes_module, "SLICE_BYTES", 256)
    calls, fill = [], Shards.fill

    def counted(self: Shards, name: str, begin: int, out: memoryview) -> None:
        calls.append((name, begin, len(out)))
        fill(self, name, begin, out)

    rights = {("stacked", 2): shards.read("stacked", 2), ("one", None): shards.read("one")}
    rights[("stacked", 1)] = shards.read("stacked", 1)
    outs = {key: torch.zeros_like(right, dtype=dtype or right.dtype) for key, right in rights.items()}
    monkeypatch.setattr(Shards, "fill", counted)
    Lane().read(shards, [Part(*key, out) for key, out in outs.items()])
    for key, right in rights.items():
        assert torch.equal(outs[key], right.to(outs[key].dtype))
    assert len(calls) == (3 if dtype is None else 2)  # on the host each goes to its place
