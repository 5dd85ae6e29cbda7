"""What a user's code is told of changes of the group."""

from collections.abc import Callable

from elastic_moe.control.report import Report
from elastic_moe.group.view import View
from elastic_moe.placement.placement import Placement


class Hooks:
    """Lists of callables; see `ElasticRuntime` for when each is called."""

    def __init__(self) -> None:
        self.rank_lost: list[Callable[[int], None]] = []
        self.rank_joined: list[Callable[[int], None]] = []
        self.placement_changed: list[Callable[[Placement], None]] = []
        self.view: list[Callable[[View], None]] = []

    def call(self, rank: int, view: View, placement: Placement, report: Report) -> None:
        """After a recovery, on EP rank `rank`, which hears nothing of its own loss or return."""
        for hook in self.view:
            hook(view)
        for ranks, hooks in ((report.lost, self.rank_lost), (report.joined, self.rank_joined)):
            for other in ranks:
                for hook in hooks if other != rank else ():
                    hook(other)
        self.call_placement_changed(placement)

    def call_placement_changed(self, placement: Placement) -> None:
        """After every commit but the first."""
        for hook in self.placement_changed:
            hook(placement)
