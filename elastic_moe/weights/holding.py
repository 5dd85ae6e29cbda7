"""The words between a holder of weights and whoever reads from it: what is there, and what is asked for. Without torch.

A holder is any process that has weights in memory and gives them away. The manifest of an instance is in two parts:
`InstanceWeights` names its holders, and each holder's `Holding` what it has, with the digests of its group.
"""

import msgspec


class Greet(msgspec.Struct, tag="greet", frozen=True):
    """What is there? Answered with a `Holding`."""


class GiveDense(msgspec.Struct, tag="dense", frozen=True):
    """A tensor by its name in the state dict. Answered with a `Given`."""

    name: str


class GiveExpert(msgspec.Struct, tag="expert", frozen=True):
    """An expert of an MoE layer. Answered with a `Given`."""

    layer: int
    expert: int


class Share(msgspec.Struct, tag="share", frozen=True):
    """Where is it in the memory of your GPU? For processes of the same host. Answered with a `Shared`."""


Request = Greet | GiveDense | GiveExpert | Share


class DenseTensor(msgspec.Struct, frozen=True):
    """How a dense tensor looks. Its digest is that of the group, UNKNOWN (-1) while there is none."""

    dtype: str
    """As torch names it: `torch.bfloat16`."""
    shape: list[int]
    digest: int


class Holding(msgspec.Struct, tag="holding", frozen=True):
    """What one holder has, when it was asked. Experts may move meanwhile: whoever reads compares digests."""

    form: str = ""
    """Names how weights lie in memory: layouts and dtypes. Only holders of one form can give to each other."""
    num_layers: int = 0
    num_experts: int = 0
    experts: list[tuple[int, int, int]] = []
    """(layer, expert, digest) of each; of the group, UNKNOWN (-1) while there is none."""
    dense: dict[str, DenseTensor] = {}
    session: str = ""
    """By which Mooncake's TransferEngine reads its memory, if it may."""
    places: list[tuple[int, int]] = []
    """(address, bytes) of each of `experts` there: its tensors beside each other, each at a multiple of 64 bytes."""


class Given(msgspec.Struct, tag="given", frozen=True):
    """What follows, one frame of raw bytes per tensor; nothing when it is not there."""

    dtypes: list[str] = []
    shapes: list[list[int]] = []
    digest: int = 0


class GpuTensor(msgspec.Struct, frozen=True):
    """One that processes of the host can map."""

    allocation: str
    """What the driver calls the memory that it lies in, as hexadecimal digits."""
    offset: int
    """In it, in bytes."""
    dtype: str
    shape: list[int]


class Shared(msgspec.Struct, tag="shared", frozen=True):
    """What is in the memory of a GPU; nothing of a process without one."""

    held: list[list[int]] = []
    """[L, S]: the expert in each slot, -1 for none."""
    layers: list[list[GpuTensor]] = []
    """Of each layer its tensors [S, ...], in the order of its layout."""
    dense: dict[str, GpuTensor] = {}


Answer = Holding | Given | Shared


class HolderAddress(msgspec.Struct, frozen=True):
    """Where to ask a holder of an instance."""

    address: str
    """ZMQ endpoint, as the holder names it. `0.0.0.0` is the host that was asked for the manifest."""
    kind: str
    """`engine` or `backup`."""
    node: int
    rank: int = -1
    """Of an engine."""


class InstanceWeights(msgspec.Struct, frozen=True):
    """`GET /elastic/weights`: who holds the weights of a running instance."""

    model: str
    epoch: int
    view: str
    """Digest of the members."""
    placement_version: int
    placement_hash: str
    holders: list[HolderAddress]
    key: str
    """What requests for weights are sealed with; empty in a launch without a secret. It opens nothing else."""


encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_answer = msgspec.json.Decoder(Answer).decode
decode_instance = msgspec.json.Decoder(InstanceWeights).decode
