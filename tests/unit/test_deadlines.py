"""The order of all deadlines: defaults keep it, and each rule says what breaks it."""

import dataclasses
import math

import pytest

from elastic_moe.config import ElasticConfig
from elastic_moe.deadlines import CONF_KEYS, RULES, Deadlines
from elastic_moe.group.epoch_store import KEEP_S

SCALED = {  # ranks -> (build, recovery, lighthouse wait) in seconds
    1: (5.05, 60.0, 60.0),
    8: (5.4, 60.0, 60.0),
    64: (8.2, 60.25, 60.0),
    1024: (56.2, 120.25, 60.0),
}


def mistake(**fields: float) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - each test looks at the message
        Deadlines(**fields)
    return str(refused.value)


def config_mistake(**keys: float) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - each test looks at the message
        ElasticConfig(**keys).validate()  # pyright: ignore[reportArgumentType]
    return str(refused.value)


@pytest.mark.parametrize("num_ranks", SCALED)
def test_defaults_hold_and_scale_with_the_ranks(num_ranks: int):
    deadlines = ElasticConfig().deadlines(num_ranks)
    got = deadlines.build_s, deadlines.recovery_s, deadlines.lighthouse_wait_s
    assert got == pytest.approx(SCALED[num_ranks])
    assert (deadlines.exchange_s, deadlines.hang_s, deadlines.progress_s, deadlines.start_s) == (15, 20, 1.5, 120)
    assert deadlines.build_s < KEEP_S


def test_without_a_configuration_nobody_looks_at_the_progress():
    assert Deadlines.of(1) == Deadlines()
    assert Deadlines.of(1).hang_s is None
    assert Deadlines.of(4, exchange_s=30, start_s=7, progress_s=9).exchange_s == 30


def test_what_must_be_longer_than_a_users_value_grows_with_it():
    deadlines = ElasticConfig(hang_timeout_s=120, exchange_timeout_s=100).deadlines(8)
    assert deadlines.lighthouse_wait_s == pytest.approx(145)
    assert deadlines.recovery_s == pytest.approx(1.25 * (25 + 5.4 + 100))


@pytest.mark.parametrize(("hang_s", "exchange_s"), [(60, 45), (20, 15), (4, 3), (2, 1.5), (1.6, 1.1)])
def test_an_exchange_takes_three_quarters_of_a_hang_and_leaves_two_beats(hang_s: float, exchange_s: float):
    assert ElasticConfig(hang_timeout_s=hang_s).deadlines(2).exchange_s == pytest.approx(exchange_s)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"exchange_timeout_s": 19.6},
            "elastic.exchange_timeout_s=19.6: must be 19.5 s or less with elastic.hang_timeout_s=20: a rank that waits",
        ),
        (
            {"exchange_timeout_s": 30.0},
            "elastic.exchange_timeout_s=30: must be 19.5 s or less with elastic.hang_timeout_s=20: a rank that waits",
        ),
        (
            {"hang_timeout_s": 1.4},
            "elastic.progress_timeout_s=1.5: must be 1.4 s or less with elastic.hang_timeout_s=1.4: an engine that is",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_told_with_the_reason(keys: dict[str, float], message: str):
    assert config_mistake(**keys).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hang_s": 1.4, "exchange_s": 0.5},
            "elastic.progress_timeout_s=1.5: must be 1.4 s or less with elastic.hang_timeout_s=1.4: an engine that is",
        ),
        ({"hang_s": 15.4}, "elastic.exchange_timeout_s=15: must be 14.9 s or less with elastic.hang_timeout_s=15.4: "),
        ({"progress_s": 0.9}, "elastic.progress_timeout_s=0.9: must be 1 s or more: an engine that is a beat late"),
        (
            {"progress_s": 1.1, "ping_s": 0.3},
            "elastic.progress_timeout_s=1.1: must be 1.2 s or more: a neighbour that is a ping late",
        ),
        (
            {"progress_s": 1.6, "heartbeat_timeout_s": 1.7},
            "elastic.progress_timeout_s=1.6: must be 1.7 s or more: a lighthouse would still count a neighbour",
        ),
        (
            {"heartbeat_timeout_s": 0.24},
            "heartbeat_s=0.1: must be 0.08 s or less with heartbeat_timeout_s=0.24: a lighthouse would leave out",
        ),
        ({"settle_s": 0.18}, "heartbeat_s=0.1: must be 0.09 s or less with settle_s=0.18: a lighthouse would be asked"),
        (
            {"death_vote_s": 0.9},
            "heartbeat_timeout_s=1: must be 0.9 s or less with death_vote_s=0.9: the last heartbeat",
        ),
        ({"view_call_s": 1.4}, "connect_s=1: must be 0.9 s or less with view_call_s=1.4: no lighthouse could answer"),
        ({"lighthouse_wait_s": 24}, "view_call_s=25: must be 24 s or less with lighthouse_wait_s=24: a newcomer"),
        (
            {"hang_s": 61},
            "elastic.hang_timeout_s=61: must be 60 s or less with lighthouse_wait_s=60: a member that is slow",
        ),
        (
            {"recovery_s": 44},
            "elastic.exchange_timeout_s=15: must be 13.95 s or less with recovery_s=44: a recovery would be given up",
        ),
        ({"greeting_s": 6}, "greeting_s=6: must be 5 s or less with weights_s=5: peers that answer at once"),
    ],
)
def test_each_rule_tells_what_breaks_it(fields: dict[str, float], message: str):
    assert mistake(**fields).startswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"hang_s": 1.5, "exchange_s": 0.5},
        {"hang_s": 15.5},
        {"progress_s": 1.0},
        {"progress_s": 1.7, "heartbeat_timeout_s": 1.7},
        {"heartbeat_timeout_s": 0.3},
        {"settle_s": 0.2},
        {"death_vote_s": 1.0},
        {"view_call_s": 1.5},
        {"lighthouse_wait_s": 25},
        {"hang_s": 60},
        {"recovery_s": 45.05},
        {"greeting_s": 5},
    ],
)
def test_each_rule_holds_at_its_limit(fields: dict[str, float]):
    assert dataclasses.asdict(Deadlines(**fields)).items() >= fields.items()


def test_they_are_never_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Deadlines().exchange_s = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_that_a_user_sets_is_named_by_its_key():
    fields = {field.name for field in dataclasses.fields(Deadlines)}
    keys = {f"elastic.{field.name}" for field in dataclasses.fields(ElasticConfig)}
    assert set(CONF_KEYS) <= fields
    assert set(CONF_KEYS.values()) <= keys
    assert {name for rule in RULES for name in (*rule.smaller, rule.larger)} <= fields
    assert all(math.isfinite(value) for value in dataclasses.asdict(Deadlines()).values() if value is not None)
