"""Processes that exchange tokens through GPU memory: set-up, tokens by formula, and what must come of them."""

import time

import torch
import torch.distributed as dist

from elastic_moe.exchange.layout import ExchangeLayout
from elastic_moe.exchange.symmetric import SymmetricExchange
from elastic_moe.group.epoch_store import StoreServer
from elastic_moe.group.view import Member, View

HIDDEN = 256
DEADLINE_S = 60.0


class Seat:
    """One process in one seat: its exchange, and a store to meet the others."""

    def __init__(
        self, launch, rank, *, generation=0, seats=None, slots=4, tokens=64, top_k=2, timeout_s=20.0, **options
    ):
        torch.cuda.set_device(launch.rank % torch.cuda.device_count())
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.launch = launch
        self.rank = rank
        self.slots = slots
        self.top_k = top_k
        self.hidden_size = options.pop("hidden", HIDDEN)
        self.dtype = options.pop("dtype", torch.bfloat16)
        self.num_seats = seats or launch.world_size
        host, port = launch.store.rsplit(":", 1)
        self.store = dist.TCPStore(host, int(port), is_master=False)
        if launch.rank == 0:
            self._groups_store = StoreServer("127.0.0.1")
            self.store.set("groups", self._groups_store.address)
        layout = ExchangeLayout(self.num_seats, slots, tokens, top_k, self.hidden_size, self.dtype.itemsize)
        self.incarnation = self.incarnation_of(rank, generation)
        self.exchange = SymmetricExchange(
            self.incarnation, rank, layout, self.dtype, self.device, timeout_s=timeout_s, **options
        )

    def incarnation_of(self, rank, generation):
        return f"{self.launch.store.replace(':', '-')}-{rank}-{generation}"

    def view(self, epoch, ranks, newcomers=()):
        store = self.store.get("groups").decode()
        members = [
            Member(rank, 0, self.incarnation_of(rank, int(rank in newcomers)), 0, "127.0.0.1", "", store)
            for rank in ranks
        ]
        return View(epoch, tuple(members))

    def enter(self, epoch, ranks, newcomers=()):
        view = self.view(epoch, ranks, newcomers)
        self.exchange.enter(view, self.slots, lambda: self.meet(f"enter-{epoch}", len(ranks)))
        return view

    def meet(self, name, count):
        """A barrier that no other test's group can break."""
        self.store.add(name, 1)
        deadline = time.monotonic() + DEADLINE_S
        while self.store.add(name, 0) < count:
            assert time.monotonic() < deadline, f"{name}: not all of {count} came"
            time.sleep(0.002)

    def tokens(self, rank, turn, num_tokens, ranks, *, skew="", none=0.0):
        """What `rank` sends in this turn: the same on whichever process it is computed."""
        generator = torch.Generator().manual_seed(1000 * turn + rank)
        hidden = torch.randn((num_tokens, self.hidden_size), generator=generator).to(self.dtype)
        valid = torch.tensor([r * self.slots + s for r in ranks for s in range(self.slots)])
        if skew == "rank":
            valid = valid[-self.slots :]
        picks = torch.rand((num_tokens, len(valid)), generator=generator).argsort(1)[:, : self.top_k]
        slots = valid[picks]
        if skew == "slot":
            slots = torch.full_like(slots, -1)
            slots[:, 0] = valid[0]
        slots[torch.rand(slots.shape, generator=generator) < none] = -1
        return hidden, slots

    def expected_rows(self, sent):
        """Of `sent`, {rank: (hidden, slots)}, what arrives here: rows and the ends of the slots."""
        rows, ends = [], []
        for slot in range(self.rank * self.slots, (self.rank + 1) * self.slots):
            for rank in sorted(sent):
                hidden, slots = sent[rank]
                rows += [hidden[token] for token in (slots == slot).nonzero()[:, 0]]
            ends.append(len(rows))
        return torch.stack(rows) if rows else torch.empty((0, self.hidden_size), dtype=self.dtype), ends

    def compute(self, rows, offsets):
        """Experts that say where they are: 2 * row + slot."""
        number = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
        slot = torch.searchsorted(offsets, number, right=True) + self.rank * self.slots
        return (2 * rows.float() + slot[:, None]).to(rows.dtype)

    def expected_results(self, hidden, slots):
        results = (2 * hidden.float()[:, None] + slots[..., None]).to(self.dtype)
        return torch.where(slots[..., None] < 0, torch.zeros((), dtype=self.dtype), results)

    def round_trip(self, hidden, slots):
        sent = self.exchange.dispatch(hidden, slots)
        return sent, self.exchange.combine(self.compute(sent.rows, sent.offsets), sent.ticket)

    def captured(self, num_tokens):
        """(hidden, slots, results, graph): one round trip in a CUDA graph, over tensors that keep their place."""
        hidden = torch.zeros((num_tokens, self.hidden_size), dtype=self.dtype, device=self.device)
        slots = torch.full((num_tokens, self.top_k), -1, device=self.device)
        self.round_trip(hidden, slots)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, results = self.round_trip(hidden, slots)
        return hidden, slots, results, graph
