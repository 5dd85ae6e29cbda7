"""What a serving supervisor tells its children first of all."""

import msgspec

from elastic_moe.config import ServeConfig
from elastic_moe.membership.launch import SeatStart
from elastic_moe.wire import Wire


class EngineStart(msgspec.Struct, tag="engine", frozen=True):
    """Supervisor -> engine, first of all: who you are and what to serve."""

    seat: SeatStart
    config: ServeConfig


class FrontEndStart(msgspec.Struct, tag="front_end", frozen=True):
    """Supervisor -> front end, first of all."""

    config: ServeConfig
    node: int
    wire: Wire = Wire()
