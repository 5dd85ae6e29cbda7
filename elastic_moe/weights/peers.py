"""Weights from a running process: a newcomer takes them from the members, who have them in memory, before the disk.

Each process answers in a thread of its own, from a ROUTER socket; one request, one tensor (or one expert), with its
dtypes, shapes and digest. What was received is verified; whoever does not answer in time is asked no more.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
import torch
import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.group.view import Member
from elastic_moe.weights.digest import digest
from elastic_moe.weights.store import ExpertStore

TIMEOUT_MS = 5000
"""How long a peer may take for one answer."""
GREET_MS = 200
"""How long others may take to answer a newcomer's greeting once the first has: who does not is taken for dead."""

POLL_MS = 500


class Want(msgspec.Struct, frozen=True):
    """Newcomer -> member: send the dense tensor `name`; or expert `expert` of MoE layer `layer`, if it is there; the
    defaults are a greeting, answered with an empty `Gift`."""

    name: str = ""
    layer: int = -1
    expert: int = -1


class Gift(msgspec.Struct, frozen=True):
    """Member -> newcomer: what follows, one frame of raw bytes per tensor; nothing when it is not there."""

    dtypes: list[str] = []
    shapes: list[list[int]] = []
    digest: int = 0


_decode_want = msgspec.msgpack.Decoder(Want).decode
_decode_gift = msgspec.msgpack.Decoder(Gift).decode
_encode = msgspec.msgpack.Encoder().encode


class WeightServer:
    """Gives what this process holds to whoever asks."""

    def __init__(self, host: str) -> None:
        """Bind a free port on `host`; requests wait until `start`."""
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
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
                want = _decode_want(frames[-1])
            except msgspec.MsgspecError:
                continue  # not one of ours
            if want.name:
                tensors = [dense[want.name].detach().cpu()] if want.name in dense else []
            else:
                tensors = _copy_of(store, want.layer, want.expert)
            gift = Gift(
                [str(t.dtype) for t in tensors], [list(t.shape) for t in tensors], digest(tensors) if tensors else 0
            )
            self._router.send_multipart([sender, _encode(gift), *(_bytes_of(t) for t in tensors)])
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


class Peers:
    """A newcomer's view of the members as a source of weights. For one thread."""

    def __init__(self, members: Iterable[Member]) -> None:
        """Greet all of them, and go on with those that answer."""
        self.bytes = 0
        """Bytes received and accepted."""
        poller, greeted = zmq.Poller(), []
        for member in members:
            socket = zmq.Context.instance().socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(member.weights)
            socket.send(_encode(Want()))
            poller.register(socket, zmq.POLLIN)
            greeted.append(socket)
        self._sockets: list[zmq.Socket] = []
        while len(self._sockets) < len(greeted) and (ready := poller.poll(GREET_MS if self._sockets else TIMEOUT_MS)):
            for socket, _ in ready:
                socket.recv_multipart()
                poller.unregister(socket)
                self._sockets.append(socket)
        for socket in greeted:
            if socket not in self._sockets:
                socket.close()

    def dense(self, name: str, out: torch.Tensor) -> bool:
        """Fill `out` with the dense tensor `name`. False: no member has it."""
        return self._fetch(Want(name=name), [out])

    def expert(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> bool:
        """Fill the tensors `out` with an expert. False: no member has it."""
        return self._fetch(Want(layer=layer, expert=expert), out)

    def close(self) -> None:
        """Disconnect."""
        for socket in self._sockets:
            socket.close()

    def _fetch(self, want: Want, out: Sequence[torch.Tensor]) -> bool:
        wanted = ([str(t.dtype) for t in out], [list(t.shape) for t in out])
        for socket in list(self._sockets):
            socket.send(_encode(want))
            if not socket.poll(TIMEOUT_MS):
                socket.close()
                self._sockets.remove(socket)
                continue
            self._sockets.append(self._sockets.pop(0))  # spread the load: another is asked first the next time
            header, *frames = socket.recv_multipart()
            gift = _decode_gift(header)
            if (gift.dtypes, gift.shapes) != wanted:
                continue
            for tensor, frame in zip(out, frames, strict=True):
                tensor.detach().copy_(torch.frombuffer(bytearray(frame), dtype=tensor.dtype).view(tensor.shape))
            if digest(out) == gift.digest:
                self.bytes += sum(map(len, frames))
                return True
        return False


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
