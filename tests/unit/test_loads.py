"""Counting tokens per expert, and the window over them."""

import json
import threading

import numpy as np
import pytest
import torch

from elastic_moe.placement.loads import LoadCounter, LoadWindow
from elastic_moe.runtime.initial_placement import read_loads


def test_counts_by_layer_and_expert_without_none():
    counter = LoadCounter(2, 3, torch.device("cpu"))
    counter.count(0, torch.tensor([[0, 2], [2, -1]]))
    counter.count(1, torch.empty((0, 2), dtype=torch.int64))
    counter.count(0, torch.tensor([[2, 1]]))
    counter.count(1, torch.tensor([[-1, -1]]))
    assert counter.read().tolist() == [[1, 1, 3], [0, 0, 0]]


def test_what_is_counted_while_it_is_stopped_does_not_count():
    counter = LoadCounter(1, 2, torch.device("cpu"))
    counter.count(0, torch.tensor([[0]]))
    seen = []
    with counter.stopped():
        counter.count(0, torch.tensor([[1]]))
        reader = threading.Thread(target=lambda: seen.append(counter.read().tolist()))
        reader.start()
        assert not seen
    reader.join(5)
    assert seen == [[[1, 0]]]


def test_what_was_counted_a_half_life_ago_counts_half():
    window = LoadWindow(1, 2, half_life_steps=10)
    window.add(np.array([[8, 4]]), steps=5)
    window.add(np.array([[8, 5]]), steps=15)
    assert window.loads.tolist() == [[4.0, 3.0]]
    window.add(np.array([[8, 5]]), steps=15)
    assert window.loads.tolist() == [[4.0, 3.0]]


def test_loads_from_a_file_may_have_dense_layers(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"logical_count": [[0, 0], [1, 2], [3, 4]]}))
    assert read_loads(path, 2, 2).tolist() == [[1, 2], [3, 4]]


def test_a_layer_without_loads_is_kept_where_no_dense_ones_are_to_be_left_out(tmp_path):
    path = tmp_path / "loads.json"
    path.write_text(json.dumps({"logical_count": [[0, 0], [1, 0]]}))
    assert read_loads(path, 2, 2).tolist() == [[0, 0], [1, 0]]
    path.write_text(json.dumps({"logical_count": [[0, 0], [0, 2], [3, 0]]}))
    assert read_loads(path, 2, 2).tolist() == [[0, 2], [3, 0]]


def test_steps_that_go_back_make_nothing_heavier():
    """A process counts its steps; whoever takes its place counts anew."""
    window = LoadWindow(1, 2, half_life_steps=10)
    window.add(np.array([[8, 4]]), steps=15)
    window.add(np.array([[8, 6]]), steps=5)
    assert window.loads.tolist() == [[8.0, 6.0]]


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "not json",
        '{"logical_count": [[1, 2]]}',
        '{"logical_count": [[1, -2], [1, 1]]}',
        '{"logical_count": [[1, NaN], [1, 1]]}',
        '{"logical_count": [[1, Infinity], [1, 1]]}',
        '{"logical_count": [1, 2, 3]}',
        '{"logical_count": [[1, 2], [1]]}',
        "[[1, 2], [3, 4]]",
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "loads.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^initial loads .*: expected JSON with .logical_count.: \[2\]\[2\]") as error:
        read_loads(path, 2, 2)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"initial loads .*absent.json: .*No such file"):
        read_loads(tmp_path / "absent.json", 2, 2)
