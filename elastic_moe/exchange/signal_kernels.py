"""How the ranks of a symmetric exchange wait for each other: flags in each other's memory, with a deadline.

Every kernel of one rank runs in its stream's order. What orders the ranks: a kernel ends, in the program that finishes
last, by telling all live peers (a release that covers what every program wrote, for each has counted itself in with a
release before) and waiting until all of them have told the same (an acquire). Waiting is one program's business, so
ranks that share a GPU cannot starve each other, and no launch must be resident as a whole.

A flag is an int64 that one peer writes and this rank reads, one for each peer and for dispatch and combine apart. Its
value is epoch << 32 | call: the number of the dispatch in its epoch, which its combine shares. Values only rise, so
nothing is ever set back, and a waiter asks for "at least", not "equal":
- a peer may be a call ahead, and tell dispatch n + 1 while this rank still looks for combine n: that is another flag.
  It is never further ahead, for it waits for this rank in each call;
- whatever an older epoch left, however many calls it had, is less than the first value of the next. So the flag of a
  seat needs no clearing when a newcomer takes it, and the late word of one who was left behind frees nobody.
Hence no phase bits, which would have to be set back after a loss, and no ring of buffers: `symmetric_kernels` says why
one of each is enough.

A peer that does not tell in time sets its bit in ERROR, and from then on, until the next epoch, no kernel sends, tells
or waits. Whatever a branch with a barrier inside depends on is read where nobody can change it, or is agreed on by all
warps first.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl

EPOCH = 0
SEQUENCE = 1
PATIENCE_NS = 2
ALIVE = 3
ERROR = 4
FINISHED = 5
ABORT = 6
STATE_SIZE = 7
"""Fields of the state, int64, local to the rank. `SymmetricExchange.enter` writes all, kernels SEQUENCE,
ERROR and FINISHED:
- EPOCH: of the view; never changes within an epoch.
- SEQUENCE: dispatches of this epoch. It is counted on the device, for a graph is replayed without a word from the host.
- PATIENCE_NS: how long one wait may take.
- ALIVE: a bit for each seat, of the members of the view, this rank too: it tells itself like all others.
- ERROR: 0, or a bit for each seat that was late, and what follows below; it stays until the next epoch.
- FINISHED: programs of the running launch that are done; the last one sets it back to 0 for the next launch.
- ABORT: the address of an int64 in host memory: like the fence, epochs below it are over."""

OVERFLOW = 1 << 40
LEFT = 1 << 41
"""More in ERROR, above the bits of the seats: more rows came than there is room for; this rank was told that the epoch
is over."""

_EPOCH = tl.constexpr(EPOCH)
_SEQUENCE = tl.constexpr(SEQUENCE)
_PATIENCE_NS = tl.constexpr(PATIENCE_NS)
_ALIVE = tl.constexpr(ALIVE)
_ERROR = tl.constexpr(ERROR)
_FINISHED = tl.constexpr(FINISHED)
_ABORT = tl.constexpr(ABORT)
_LEFT = tl.constexpr(LEFT)


@triton.jit
def _nanoseconds():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def acquire(address):
    """The int64 at each address, and whatever its writer wrote before it."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def working(state_ptr):
    """The live seats, none after an error: then nothing is sent, told or waited for."""
    return tl.where(tl.load(state_ptr + _ERROR) == 0, tl.load(state_ptr + _ALIVE), 0)


@triton.jit
def has(seats, bits):
    """Whether the bit of each seat is set."""
    return ((bits >> seats) & 1) != 0


@triton.jit
def peer(table_ptr, seats, offset, live, dtype: tl.constexpr):
    """Pointers to byte `offset` of the buffers of `seats`."""
    return (tl.load(table_ptr + seats, mask=live, other=0) + offset).to(tl.pointer_type(dtype))


@triton.jit
def peer_row(table_ptr, seat, offset, dtype: tl.constexpr):
    """Pointer to a row in the buffer of one seat, for 16-byte stores."""
    return tl.multiple_of((tl.load(table_ptr + seat) + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def is_last(state_ptr):
    """Whether all other programs of this launch have finished; whatever they wrote is seen, here and by peers told.

    The barrier puts the writes of all warps before the count, which one thread makes. The count releases them, those to
    peers too, and acquires what was counted before: who counts last has seen everything, and may tell.
    """
    tl.debug_barrier()
    before = tl.atomic_add(state_ptr + _FINISHED, 1, sem="acq_rel", scope="sys")
    last = before == tl.num_programs(0) - 1
    if last:
        tl.store(state_ptr + _FINISHED, 0)
    return last


@triton.jit
def tell(table_ptr, at_flags, rank, live, value, SEATS_PAD: tl.constexpr):
    """Raise this rank's flag at every live peer: flag number `rank` of the row `at_flags` in that peer's buffer.

    An exchange and not a store, for Triton gives atomics alone a release; over the system, for the peer is another GPU.
    """
    seats = tl.arange(0, SEATS_PAD)
    told = has(seats, live)
    flags = peer(table_ptr, seats, at_flags + rank * 8, told, tl.int64)
    tl.atomic_xchg(flags, tl.zeros((SEATS_PAD,), tl.int64) + value, mask=told, sem="release", scope="sys")


@triton.jit
def _missing(addresses, live, value, SEATS_PAD: tl.constexpr):
    """The live seats whose flag is not yet at `value`; one of an older epoch is far below."""
    seats = tl.arange(0, SEATS_PAD)
    late = has(seats, live) & (acquire(addresses) < value)
    return tl.sum(tl.where(late, tl.full((SEATS_PAD,), 1, tl.int64) << seats, 0), 0)


@triton.jit
def wait(state_ptr, buffer_ptr, at_flags, live, value, SEATS_PAD: tl.constexpr):
    """Wait for the flags of the live peers, at most PATIENCE_NS, or until somebody says that the epoch is over: a peer
    at the fence, or this process at its ABORT word, which is in host memory and looked at less often.

    Returns ERROR, the same in all warps: each polls for itself, so one may see the last flag and another the deadline.
    What follows has barriers inside, where warps that disagree would never meet: the maximum over 1024 lanes, more than
    one warp has, makes the worst of them count.
    """
    epoch = tl.load(state_ptr + _EPOCH)
    patience = tl.load(state_ptr + _PATIENCE_NS)
    word = tl.load(state_ptr + _ABORT)
    fence = buffer_ptr.to(tl.int64)
    addresses = fence + at_flags + tl.arange(0, SEATS_PAD) * 8
    start = _nanoseconds()
    turns = 0
    over = (acquire(fence) > epoch) & (live != 0)
    missing = _missing(addresses, live, value, SEATS_PAD)
    going = (missing != 0) & (over == 0)
    while going:
        turns += 1
        over = acquire(fence) > epoch
        if turns % 64 == 0:
            over = over | (acquire(word) > epoch)
        missing = _missing(addresses, live, value, SEATS_PAD)
        going = (missing != 0) & (over == 0) & (_nanoseconds() - start < patience)
    lost = tl.max(tl.zeros((1024,), tl.int64) + tl.where(over, _LEFT, missing), 0)  # over all warps
    error = tl.load(state_ptr + _ERROR) | lost
    if lost != 0:
        tl.store(state_ptr + _ERROR, error)
    tl.debug_barrier()
    return error
