"""Which node a group of experts is at home on: small cases by hand. Groups of two experts, two nodes of two ranks."""

import numpy as np
import pytest

from elastic_moe.placement.balance.expert_groups import homes_of_experts
from elastic_moe.placement.placement import EMPTY

NODE = np.array([0, 0, 1, 1])
_ = EMPTY


def homes(of_groups, *, current=None, room=(2, 2, 2, 2), num_groups=4):
    """The node of each group of each layer, which is that of both of its experts. Loads are those of whole groups."""
    weight = np.repeat(np.array(of_groups), 2, axis=1) // 2
    held = None if current is None else np.array(current, dtype=np.int32)
    found = homes_of_experts(weight, num_groups, np.array(room), NODE, held)
    if found is None:
        return None
    assert (found[:, ::2] == found[:, 1::2]).all()
    return found[:, ::2].tolist()


def holding(*groups_of_node):
    """[R, S]: the two experts of each group, on the node that it is given for."""
    return [[2 * group + i for i in range(2)] for groups in groups_of_node for group in groups]


def test_the_heaviest_group_goes_to_the_lightest_node_with_room():
    assert homes([[16, 2, 8, 10], [2, 2, 2, 2], [2, 4, 6, 20]]) == [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("of_groups", "stays"),
    [
        ([100, 100, 100, 100], True),
        ([110, 90, 100, 100], True),  # 210 against 200: within STAY_TOLERANCE, just
        ([112, 88, 100, 100], False),
    ],
)
def test_groups_stay_where_they_are_while_that_is_good_enough(of_groups, stays):
    found = homes([of_groups], current=[holding((2, 0), (3, 1))])
    assert found == ([[0, 1, 0, 1]] if stays else homes([of_groups]) != [[0, 1, 0, 1]] and homes([of_groups]))


def test_layers_stay_or_move_each_for_itself():
    here = holding((0, 1), (2, 3))
    found = homes([[20, 20, 2, 2], [10, 10, 10, 10]], current=[here, here])
    assert found == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_a_group_is_where_most_of_it_is():
    """Of group 0 node 1 has two copies of each expert, node 0 one; half of group 1 is in no slot."""
    spread = [[0, 1, _], [2, _, _], [0, 1, 4], [0, 1, 5]]
    alone = [[2, 3, 6], [7, _, _], [0, 1, 4], [5, _, _]]
    assert homes([[10] * 4] * 2, current=[spread, alone], room=(3, 3, 3, 3)) == [[1, 0, 1, 0], [1, 0, 1, 0]]


def test_nodes_with_unequally_many_groups_are_packed_anew():
    crowded = [[0, 1, 2, 3], [4, 5, _, _], [6, 7, _, _], [_, _, _, _]]
    assert homes([[10] * 4], current=[crowded], room=(4, 4, 4, 4)) == homes([[10] * 4]) == [[0, 1, 0, 1]]


def test_groups_that_nodes_cannot_hold_have_no_home():
    assert homes([[10] * 4], room=(2, 2, 2, 1)) is None
    assert homes([[10] * 4], room=(4, 0, 0, 4)) is not None, "just enough"
    assert homes([[10] * 4], num_groups=1) is None, "one group is no multiple of two nodes"
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=f"num_groups={wrong} must divide the 8 experts"):
            homes([[10] * 4], num_groups=wrong)
