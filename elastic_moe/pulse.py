"""What a process tells its supervisor of itself: that it gets on, and how soon it will again."""

import contextlib
from collections.abc import Iterator


class Pulse:
    """Counted up by whatever gets on; `within_s` says what the main thread does. Read by the thread that beats."""

    def __init__(self, within_s: float | None = None) -> None:
        """`within_s`: seconds until there is progress; None: nobody can say."""
        self.count = 0
        self.within_s = within_s

    def beat(self) -> None:
        """Something was done."""
        self.count += 1

    @contextlib.contextmanager
    def expects(self, within_s: float | None) -> Iterator[None]:
        """Inside, what the main thread does takes so long at most; None: it may wait for ever."""
        usual, self.within_s = self.within_s, within_s
        self.beat()
        try:
            yield
        finally:
            self.within_s = usual
            self.beat()
