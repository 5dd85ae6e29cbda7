"""The messages between front ends and engines: msgspec structs, MessagePack on ZMQ. Never pickle.

An engine binds one ROUTER socket; every front end connects a DEALER.
One message is one frame. Positions make delivery idempotent: `Tokens.start` says where its tokens belong, so a
token that arrives twice is recognised and dropped.
"""

import enum

import msgspec

from elastic_moe.control.report import RebalanceReport, Report
from elastic_moe.group.view import View


class Sampling(msgspec.Struct, frozen=True):
    """How to pick the next token. `temperature` 0 is greedy and ignores the rest.

    The token at output position `i` depends only on the logits, `seed` and `i`: a request that moves to another
    rank goes on with the tokens it would have had.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Front end -> engine: generate. `tokens` is the prompt plus the `num_generated` tokens it already has."""

    request_id: str
    tokens: list[int]
    num_generated: int
    max_new_tokens: int
    """Tokens still to generate, counted from here; at least 1."""
    sampling: Sampling = Sampling()
    alone: bool = False
    """Processes died while they ran it: let no other request run before it has its next token."""


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Front end -> engine: forget the request and free its cache. Unknown ids are ignored."""

    request_id: str


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """Front end -> engine, about once a second: keep sending me `Status`. Answered with one at once."""

    frontend: str


class Rebalance(msgspec.Struct, tag="rebalance", frozen=True):
    """Front end -> every engine: balance the experts now; the report of the round that does names `op`."""

    op: str


class AskLoads(msgspec.Struct, tag="ask_loads", frozen=True):
    """Front end -> engine: tell me your window of loads. Answered with `Loads`."""

    ask: str


class Loads(msgspec.Struct, tag="loads", frozen=True):
    """Engine -> front end: tokens per logical expert in this rank's window, [L][E], or nothing before its model is
    loaded."""

    ask: str
    loads: list[list[int]]


class Phase(enum.StrEnum):
    """What a rank is doing, as it says itself; or, of a rank or the whole cluster, as a front end sees it."""

    STARTING = "starting"
    """Of the cluster: not all ranks have served yet."""
    LOADING = "loading"
    SERVING = "serving"
    RECOVERING = "recovering"
    UNAVAILABLE = "unavailable"
    """It waits for what it needs to serve; the reason is told beside it."""
    STOPPING = "stopping"
    """Of the cluster: this front end ends."""
    SILENT = "silent"
    """Of a rank: it has not reported lately, or never."""


class Finish(enum.StrEnum):
    """How the generation of a request has ended."""

    NOT_YET = ""
    STOP = "stop"
    """By an end-of-sequence token, which is the last one, or by a stop string."""
    LENGTH = "length"
    ERROR = "error"
    """The reason is told beside it."""
    DROPPED = "dropped"
    """The engine has not heard of its front end for long and has forgotten the request; it can be submitted again."""


class Tokens(msgspec.Struct, tag="tokens", frozen=True):
    """Engine -> front end: new tokens of a request; `start` is the output position of the first of them.

    `error` is the reason of a `finish` by error.
    """

    request_id: str
    incarnation: str
    start: int
    tokens: list[int]
    finish: Finish = Finish.NOT_YET
    error: str = ""


class Step(msgspec.Struct, tag="step", frozen=True):
    """Engine -> front end: all that a step brought for its requests, in one message."""

    tokens: list[Tokens]


class Status(msgspec.Struct, tag="status", frozen=True):
    """Engine -> front end: the state of one rank, at least once a second and at every change of phase."""

    rank: int
    incarnation: str
    phase: Phase
    """Why it is UNAVAILABLE is in `reason`."""
    view: View
    placement_version: int = 0
    placement_hash: str = ""
    slots: list[list[int]] = []
    """Logical expert in each slot of this rank, per MoE layer ([L][S], -1 = empty)."""
    num_experts: int = 0
    running: int = 0
    waiting: int = 0
    steps: int = 0
    tokens_generated: int = 0
    memory_bytes: int = 0
    """Resident memory of the process (CPU) or allocated device memory (GPU)."""
    load_seconds: float = 0.0
    reason: str = ""
    cuda_graphs: int = 0
    """Captured since the start, those that were captured anew included."""


class Event(msgspec.Struct, tag="event", frozen=True):
    """Engine -> front end: a recovery this rank went through, or a round of the load balancer."""

    rank: int
    report: Report | RebalanceReport


ToEngine = Submit | Cancel | Hello | Rebalance | AskLoads
ToFrontEnd = Step | Status | Event | Loads

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front_end = msgspec.msgpack.Decoder(ToFrontEnd).decode
