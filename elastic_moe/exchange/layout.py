"""Where everything lies in the buffer of a symmetric exchange. Pure arithmetic: the kernels and the tests go by it."""

from dataclasses import dataclass

MOST_SEATS = 32
MOST_SLOTS = 2047
"""A choice packs a slot and a count into one int32: 11 and 20 bits."""
COUNT_BITS = 20
_LINE_BYTES = 128


@dataclass(frozen=True)
class ExchangeLayout:
    """One rank's buffer, the same on all ranks. A *pair* is one (token, k), numbered t * K + k.

    | region   | holds                                                    | written by |
    |----------|----------------------------------------------------------|------------|
    | fence    | int64: epochs below it are over for this rank            | anyone |
    | flags    | int64 [2, R]: last dispatch and combine of each source   | that source |
    | counts   | int32 [R, S + 1]: pairs per slot of each source, its T   | that source |
    | choices  | int32 [R, T * K]: slot and place in the slot, -1: not here | that source |
    | arrivals | [R, T] rows: each source's tokens, at their own number   | that source |
    | results  | [T * K, D]: what came back, by pair                      | the slot's rank |

    A token travels once to a rank however many of its experts are there. No region can overflow, wherever the tokens
    go: that is what the sizes are for.

    Attributes:
        num_seats: R.
        max_slots: S, the most slots a rank may ever have.
        max_tokens: T, the most tokens of one rank in one call.
        top_k: K.
        hidden_size: D.
        element_bytes: of one element of a token.
    """

    num_seats: int
    max_slots: int
    max_tokens: int
    top_k: int
    hidden_size: int
    element_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_seats <= MOST_SEATS:
            raise ValueError(f"a symmetric exchange takes 1 to {MOST_SEATS} seats, got {self.num_seats}")
        if not 1 <= self.max_slots <= MOST_SLOTS:
            raise ValueError(f"a symmetric exchange takes 1 to {MOST_SLOTS} slots per rank, got {self.max_slots}")
        if not 1 <= self.max_pairs < 1 << COUNT_BITS:
            raise ValueError(
                f"max_tokens * top_k must be 1 to {(1 << COUNT_BITS) - 1}, got {self.max_tokens} * {self.top_k}"
            )
        if self.row_bytes % 16:
            raise ValueError(f"a token must be a multiple of 16 bytes, got {self.row_bytes}")

    @property
    def max_pairs(self) -> int:
        """T * K."""
        return self.max_tokens * self.top_k

    @property
    def row_bytes(self) -> int:
        """Of one token."""
        return self.hidden_size * self.element_bytes

    @property
    def seats_padded(self) -> int:
        """The next power of 2 to R."""
        return power_of_2(self.num_seats)

    @property
    def fence(self) -> int:
        """Offset in bytes, as are the following."""
        return 0

    @property
    def flags(self) -> int:
        """Rows of `seats_padded`."""
        return _LINE_BYTES

    @property
    def counts(self) -> int:
        """Row of a source: its pairs for each of this rank's slots, then its number of tokens."""
        return _after(self.flags, 2 * self.seats_padded * 8)

    @property
    def choices(self) -> int:
        """Row of a source: its pairs, each `slot << 20 | place among this source's pairs of that slot`."""
        return _after(self.counts, self.num_seats * (self.max_slots + 1) * 4)

    @property
    def arrivals(self) -> int:
        """With an 8-bit payload a row holds D bytes, then a float32 scale for every 128."""
        return _after(self.choices, self.num_seats * self.max_pairs * 4)

    @property
    def results(self) -> int:
        """By pair of this rank."""
        return _after(self.arrivals, self.num_seats * self.max_tokens * self.row_bytes)

    @property
    def num_bytes(self) -> int:
        """Reserved on every rank: about (R + K) * T * row_bytes."""
        return _after(self.results, self.max_pairs * self.row_bytes)

    def max_rows(self, num_tokens: int, slots_per_rank: int) -> int:
        """The most rows that can arrive when no rank sends more than `num_tokens` tokens: all of them to here."""
        return self.num_seats * num_tokens * min(self.top_k, slots_per_rank)


def power_of_2(number: int) -> int:
    """The next power of 2 from `number` >= 1 on."""
    return 1 << (number - 1).bit_length()


def _after(offset: int, num_bytes: int) -> int:
    return -(-(offset + num_bytes) // _LINE_BYTES) * _LINE_BYTES
