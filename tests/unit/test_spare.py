"""A process that has imported everything stands by, and takes the seat of one that dies."""

from collections.abc import Callable

from support.seat import DYING, VIEW, Bench, exited, said

from elastic_moe.config import SPARES, ElasticConfig, ServeConfig
from elastic_moe.membership.launch import Launch
from elastic_moe.serving.supervisor import SPARE_AFTER_S, ServeSupervisor
from elastic_moe.supervision.channel import Ready, ViewChanged
from elastic_moe.supervision.rank_supervisor import SPARE
from elastic_moe.supervision.watch import MAX_BACKOFF_S, QUICK_DEATH_S, RESPAWN_S

DEVICES = ("cpu", "cuda")


def serving(bench: Callable[..., Bench], spare: str) -> Bench:
    config = ServeConfig(elastic=ElasticConfig(spare_process=spare))
    at = bench(lambda: ServeSupervisor(config, Launch(1, 3), None))
    at.turn(said(ViewChanged(VIEW)), said(Ready("cuda")))
    return at


def test_a_spare_process_takes_the_seat_at_once_and_another_one_stands_by_later(bench):
    at = serving(bench, "auto")
    assert at.turn(after_s=SPARE_AFTER_S - 0.1) is None
    assert SPARE not in at.fake.children
    at.turn(after_s=0.1)
    first, spare = at.process, at.fake.children[SPARE]
    assert spare.sent == []
    assert spare.command == first.command
    at.turn(after_s=QUICK_DEATH_S)
    at.turn(DYING, exited(-9))
    at.turn()
    assert at.process is spare
    (start,) = spare.sent
    assert start.seat.rejoin == VIEW
    assert SPARE not in at.fake.children
    at.turn(said(ViewChanged(VIEW)), said(Ready("cuda")))
    at.turn(after_s=SPARE_AFTER_S)
    assert at.fake.children[SPARE] is not spare
    assert len(at.fake.started) == 3


def test_a_spare_process_that_dies_harms_nobody_and_is_started_again(bench, capsys):
    at = serving(bench, "auto")
    at.turn(after_s=SPARE_AFTER_S)
    for _ in range(3):
        spare = at.fake.children.pop(SPARE)
        assert at.turn(exited(1, SPARE)) is None
        at.turn(after_s=MAX_BACKOFF_S)
        assert at.fake.children[SPARE] is not spare
    assert "the spare process: died with code 1" in capsys.readouterr().err
    assert at.num_starts == 1


def test_who_has_a_spare_process():
    pairs = [(spare, device) for spare in SPARES for device in DEVICES]
    kept = [(spare, device) for spare, device in pairs if ElasticConfig(spare_process=spare).keeps_spare(device)]
    assert kept == [("auto", "cuda"), ("on", "cpu"), ("on", "cuda")]


def test_without_a_spare_process_the_seat_waits_for_the_others_to_recover(bench):
    at = serving(bench, "off")
    at.turn(after_s=QUICK_DEATH_S)
    at.turn(DYING, exited(-9))
    at.turn(after_s=RESPAWN_S - 0.1)
    assert at.num_starts == 1
    at.turn(after_s=0.1)
    assert at.num_starts == 2
