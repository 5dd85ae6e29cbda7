"""Weights from a running process: a newcomer takes them from the members, who have them in memory, before the disk.

Each process answers in a thread of its own, from a ROUTER socket; one request, one tensor (or one expert), with its
dtypes, shapes and digest. What was received is verified; whoever does not answer in time is asked no more.

Requests and headers are sealed with the launch's secret, so that strangers neither get nor give any. The bytes travel
in the clear, as all between ranks do (gloo, NCCL): under CURVE a core moves 0.35 GB/s of them instead of 1.3.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member
from elastic_moe.weights.digest import digest
from elastic_moe.weights.sources import Came, Landing, Missed, Origin, Source, Told, Until, Want
from elastic_moe.weights.store import ExpertStore
from elastic_moe.wire import PLAIN, Wire

POLL_MS = 500


class WeightRequest(msgspec.Struct, frozen=True):
    """Newcomer -> member: send the dense tensor `name`; or expert `expert` of MoE layer `layer`, if it is there; the
    defaults are a greeting, answered with an empty `WeightReply`."""

    name: str = ""
    layer: int = -1
    expert: int = -1


class WeightReply(msgspec.Struct, frozen=True):
    """Member -> newcomer: what follows, one frame of raw bytes per tensor; nothing when it is not there."""

    dtypes: list[str] = []
    shapes: list[list[int]] = []
    digest: int = 0


_decode_request = msgspec.json.Decoder(WeightRequest).decode
_decode_reply = msgspec.json.Decoder(WeightReply).decode
_encode = msgspec.json.Encoder().encode


class WeightServer:
    """Gives what this process holds to whoever asks."""

    def __init__(self, host: str, wire: Wire = PLAIN) -> None:
        """Bind a free port on `host`; requests wait until `start`."""
        self._wire = wire
        self._router = PLAIN.server(zmq.Context.instance().socket(zmq.ROUTER))
        self.address = f"tcp://{host}:{self._router.bind_to_random_port(f'tcp://{host}')}"
        self._closed = threading.Event()

    def start(self, dense: Mapping[str, torch.Tensor], store: ExpertStore, on_error: OnError = end_process) -> None:
        """Answer from now on, out of `dense` (by its name in the state dict) and the experts in `store`. `on_error` is
        told if the thread dies."""
        start_thread("weights", self._serve, dense, store, on_error=on_error)

    def close(self) -> None:
        """Answer no more."""
        self._closed.set()

    def _serve(self, dense: Mapping[str, torch.Tensor], store: ExpertStore) -> None:
        while not self._closed.is_set():
            if not self._router.poll(POLL_MS):
                continue
            sender, *frames = self._router.recv_multipart()
            try:
                sealed = frames[-1].decode()
                request = _decode_request(self._wire.unseal(sealed, self.address))
            except ValueError:
                continue  # not one of ours
            if request.name:
                tensors = [dense[request.name].detach().cpu()] if request.name in dense else []
            else:
                tensors = _copy_of(store, request.layer, request.expert)
            reply = WeightReply(
                [str(t.dtype) for t in tensors], [list(t.shape) for t in tensors], digest(tensors) if tensors else 0
            )
            header = self._wire.seal(_encode(reply).decode(), sealed).encode()
            self._router.send_multipart([sender, header, *(_bytes_of(t) for t in tensors)])
        self._router.close(linger=0)


def _copy_of(store: ExpertStore, layer: int, expert: int) -> list[torch.Tensor]:
    """The tensors of an expert, copied; none if no slot holds it all the while: recoveries overwrite slots meanwhile,
    and mark them empty before they do."""
    if not 0 <= layer < len(store.held):
        return []
    for slot in np.flatnonzero(store.held[layer] == expert).tolist():
        tensors = [tensor.detach().to("cpu", copy=True) for tensor in store.tensors(layer, slot)]
        if store.held[layer, slot] == expert:
            return tensors
    return []


class _Answer(NamedTuple):
    """One member's answer to one request, its bytes written where they were wanted."""

    digest: int
    origin: Origin
    num_bytes: int


class Peers(Source):
    """The members as a newcomer sees them. For one thread."""

    nearest = Origin.NODE

    def __init__(self, members: Iterable[Member], node: int, deadlines: Deadlines, wire: Wire = PLAIN) -> None:
        """Greet all `members`, and go on with those that answer; `node` is the newcomer's."""
        self._answer_s = deadlines.weights_s
        self._wire = wire
        self.dense_bytes = 0
        """Bytes of dense tensors received and accepted."""
        poller, origins = zmq.Poller(), {}
        for member in members:
            socket = zmq.Context.instance().socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(member.weights)
            self._ask(socket, WeightRequest())
            poller.register(socket, zmq.POLLIN)
            origins[socket] = Origin.NODE if member.node == node else Origin.REMOTE
        self._origins: dict[zmq.Socket, Origin] = {}
        while len(self._origins) < len(origins):
            ready = poller.poll(int(1000 * (deadlines.greeting_s if self._origins else deadlines.weights_s)))
            if not ready:
                break
            for socket, _ in ready:
                socket.recv_multipart()
                poller.unregister(socket)
                self._origins[socket] = origins[socket]
        for socket in origins.keys() - self._origins.keys():
            socket.close()

    def dense(self, name: str, out: torch.Tensor) -> bool:
        """Fill `out` with the dense tensor `name`. False: no member has it right."""
        for answer in self._answers(WeightRequest(name=name), [out], Until()):
            if digest([out]) == answer.digest:
                self.dense_bytes += answer.num_bytes
                return True
        return False

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. Members are asked in turn for each, until one sends bytes that are accepted."""
        for want in wants:
            request = WeightRequest(layer=want.layer, expert=want.expert)
            for answer in self._answers(request, landing.open(want), until):
                yield [Came(want, answer.origin, answer.digest)]
                if landing.has(want):
                    break
            else:
                yield [Missed(want, f"none of {len(self._origins)} members that answer has it right")]

    def close(self) -> None:
        """Disconnect."""
        for socket in self._origins:
            socket.close()

    def _ask(self, socket: zmq.Socket, request: WeightRequest) -> str:
        sealed = self._wire.seal(_encode(request).decode(), socket.getsockopt_string(zmq.LAST_ENDPOINT))
        socket.send_string(sealed)
        return sealed

    def _answers(self, request: WeightRequest, out: Sequence[torch.Tensor], until: Until) -> Iterator[_Answer]:
        """Ask one member after the other to fill `out`; each that does is an answer."""
        wanted = ([str(t.dtype) for t in out], [list(t.shape) for t in out])
        for socket, origin in list(self._origins.items()):
            sealed = self._ask(socket, request)
            if not socket.poll(int(1000 * min(self._answer_s, until.left_s))):
                socket.close()
                del self._origins[socket]
                continue
            self._origins[socket] = self._origins.pop(socket)  # spread the load: another is asked first the next time
            header, *frames = socket.recv_multipart()
            try:
                reply = _decode_reply(self._wire.unseal(header.decode(), sealed))
            except ValueError:
                continue  # whoever listens there now, it is no member
            sizes = [t.numel() * t.element_size() for t in out]
            if (reply.dtypes, reply.shapes) != wanted or [len(frame) for frame in frames] != sizes:
                continue
            for tensor, frame in zip(out, frames, strict=True):
                tensor.detach().copy_(torch.frombuffer(bytearray(frame), dtype=tensor.dtype).view(tensor.shape))
            yield _Answer(reply.digest, origin, sum(sizes))


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
