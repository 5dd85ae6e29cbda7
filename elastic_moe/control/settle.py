"""Before the first step: all members hold the same bytes, or say whose file is wrong and take them from where they are
right."""

import logging
from collections.abc import Mapping

import numpy as np
import torch

from elastic_moe.control.vote import Vote
from elastic_moe.errors import CheckpointError
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.process_group import Group
from elastic_moe.group.view import View
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.sources import Account, fill
from elastic_moe.weights.store import UNKNOWN, ExpertStore
from elastic_moe.weights.truth import Truth, agree

NAMED = 4
"""Of the things that are wrong on a node; the others are counted."""
log = logging.getLogger(__name__)


class _Things:
    """What is compared, in one order on all ranks: the experts, then the other tensors by their names."""

    def __init__(self, store: ExpertStore, disk: Disk | None, dense: Mapping[str, torch.Tensor]) -> None:
        self._store = store
        self._disk = disk
        self._names = sorted(dense)
        self.num_experts = store.digests.size
        own = [digest([dense[name]]) for name in self._names]
        self.held = np.concatenate([store.digests.ravel(), np.array(own, dtype=np.int64)])

    def dense_name(self, thing: int) -> str | None:
        """Of one that is no expert."""
        return self._names[thing - self.num_experts] if thing >= self.num_experts else None

    def name(self, thing: int) -> str:
        """For people."""
        layer, expert = divmod(thing, self._store.num_experts)
        return self.dense_name(thing) or f"layer {layer} expert {expert}"

    def on_disk(self, thing: int) -> int:
        """Its digest as this rank's disk has it now: of an expert read again, in case the first read was torn."""
        if self._disk is None or thing >= self.num_experts:
            return int(self.held[thing])
        layer, expert = divmod(thing, self._store.num_experts)
        tensors = [torch.empty_like(tensor) for tensor in self._store.tensors(layer, 0)]
        try:
            self._disk.read(layer, expert, tensors)
        except (CheckpointError, OSError) as error:
            log.warning("layer %d expert %d: %s", layer, expert, error)
            return UNKNOWN
        return digest(tensors)


def settle(
    view: View,
    groups: EpochGroups,
    goal: np.ndarray,
    store: ExpertStore,
    reserves: Reserves,
    dense: Mapping[str, torch.Tensor],
    kept: DigestFile | None,
) -> None:
    """Compare what all members have loaded, and mend it. Collective.

    Args:
        view: the members.
        groups: theirs.
        goal: int32 [L, S], what this rank has to hold.
        store: what it holds.
        reserves: where its experts came from.
        dense: the other tensors; overwritten where they are wrong.
        kept: the digests of an earlier start.

    Raises:
        Undecided: copies differ, and no majority says which is right.
        TransferFailed: an expert is right nowhere.
        PeerLost: a peer died, left, or missed the deadline.
    """
    group, things = groups.control, _Things(store, reserves.disk, dense)
    earlier = kept.load() if kept else None
    if earlier is None or earlier.shape != things.held.shape:
        earlier = np.full_like(things.held, UNKNOWN)
    nodes = [member.node for member in view.members]
    truth = agree(group, things.held, things.on_disk, nodes, earlier, things.name)
    _tell_wrong(truth, view, things)
    for thing in truth.wrong:
        if name := things.dense_name(thing):
            _spread(group, dense[name], is_right=bool(things.held[thing] == truth.digests[thing]))
    store.trust(truth.digests[: things.num_experts].reshape(store.digests.shape))
    sources = reserves.all(store, groups)
    account = Account()
    fill(store.wants(goal), store, sources, account, any_lacks=Vote(group, account))
    if kept and nodes.index(nodes[group.rank]) == group.rank and not np.array_equal(earlier, truth.digests):
        kept.save(truth.digests.tolist())


def _tell_wrong(truth: Truth, view: View, things: _Things) -> None:
    """One line for each node, however much is wrong there."""
    bad: dict[tuple[int, str], list[str]] = {}
    for thing, ranks in truth.wrong.items():
        for place in {(view.members[rank].node, view.members[rank].host) for rank in ranks}:
            bad.setdefault(place, []).append(things.name(thing))
    for (node, host), names in sorted(bad.items()):
        shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        log.error("wrong in the checkpoint of node %d (%s): %s; the right bytes are taken", node, host, shown)


def _spread(group: Group, tensor: torch.Tensor, *, is_right: bool) -> None:
    """Overwrite `tensor` with that of the first rank that has it right. Collective."""
    (first,) = group.all_reduce_max([group.size - group.rank if is_right else 0])
    mine = first == group.size - group.rank
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    came = group.broadcast(flat.cpu().numpy().tobytes() if mine else None)
    if not is_right:
        flat = torch.frombuffer(bytearray(came), dtype=torch.uint8)
        tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))
