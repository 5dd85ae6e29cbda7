"""Token ids to text, piece by piece, and where a completion's text ends.

The Rust `DecodeStream` of `tokenizers` does most of this, but drops an incomplete last character instead of
flushing it and gives up on some invalid byte sequences ("Invalid prefix encountered"); it also needs a fast tokenizer.
"""

from collections.abc import Callable, Sequence

from elastic_moe.serving.protocol import Finish

REPLACEMENT = "\ufffd"
MAX_INCOMPLETE = 3
"""Bytes of an incomplete UTF-8 sequence, at most: no more replacement characters than this can still change."""
KEPT = 12
"""Tokens kept when the window is trimmed, and taken from the prompt: more than `MAX_INCOMPLETE` characters can have."""
KEPT_SETTLED = 4
"""Tokens kept while no text is held back. As many more are let come before the next cut, for what a token costs is the
decoding of all that are kept."""
WINDOW = 4 * KEPT
"""Tokens in the window at most, which bounds the cost of a token."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Decodes one completion, a token at a time, by decoding a short window of its last tokens.

    The pieces of `push` and `flush`, joined, equal `decode(all tokens)`, except that text keeps the leading space that
    some tokenizers strip at the start of a text when a prompt comes before it.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """`decode` turns token ids into text, leaving out special tokens; `prompt` is what the completion follows."""
        self._decode = decode
        self._window = list(prompt[-KEPT:])
        context = decode(self._window)
        if context.endswith(REPLACEMENT):  # the prompt ends within a character: the completion starts afresh
            self._window, context = [], ""
        self._sent = len(context)

    def push(self, token: int) -> str:
        """Add a token; returns the text that no later token can change (often the token's own, at times empty)."""
        self._window.append(token)
        text = self._decode(self._window)
        full = len(self._window) >= WINDOW
        held = len(text) - len(text.rstrip(REPLACEMENT))  # all: byte fallback replaces the whole run for its last byte
        if full:
            held = min(held, MAX_INCOMPLETE)
        settled = max(self._sent, len(text) - held)
        piece = text[self._sent : settled]
        self._sent = settled
        if full or (not held and len(self._window) >= 2 * KEPT_SETTLED):
            self._trim(text)
        return piece

    def flush(self) -> str:
        """The text held back so far: call it after the last token."""
        piece = self._decode(self._window)[self._sent :]
        self._sent += len(piece)
        return piece

    def _trim(self, text: str) -> None:
        """Drop the older part of the window, cutting it where the rest still decodes to the end of `text`."""
        unsent = len(text) - self._sent
        if len(self._window) >= WINDOW:  # tokens that are never text, such as special ones, can keep it from shrinking
            self._window = [t for t in self._window if self._decode((t, t))]
        least = KEPT if unsent else KEPT_SETTLED
        for keep in range(least, least + 4):  # a character has at most 4 bytes: one of 4 boundaries is not inside one
            tail = self._decode(self._window[-keep:])
            if text.endswith(tail) and len(tail) > unsent:  # not >=: what is unsent must begin after the cut
                self._window = self._window[-keep:]
                self._sent = len(tail) - unsent
                return


class StopStrings:
    """Cuts a text before the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """`stops` are non-empty strings; none at all lets every text pass."""
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; returns what may be shown. After a stop string (`found`) nothing more is."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self.found = bool(cuts)
        end = min(cuts) if cuts else len(text) - self._num_held(text)
        self._held = "" if cuts else text[end:]
        return text[:end]

    def flush(self) -> str:
        """The text held back: call it when no more can follow."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class CompletionText:
    """The text of one completion: detokenized, cut at stop strings, without the end-of-sequence token.

    Tokens are taken one by one, so text and token count do not depend on how they were grouped on their way here.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        """`detokenizer` is a fresh one; `stops` end the completion and are not shown."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self.num_tokens = 0
        self.finish = Finish.NOT_YET
        """STOP or LENGTH once the completion has ended."""

    def push(self, tokens: Sequence[int], finish: Finish) -> str:
        """Add new tokens and the engine's `finish` (NOT_YET while it goes on); returns the new text to show.

        With `finish` STOP the last token is the end-of-sequence token: counted, not shown. Behind the end of the
        completion nothing is taken any more.
        """
        if self.finish:
            return ""
        shown = len(tokens) - (finish is Finish.STOP)
        text = ""
        for position, token in enumerate(tokens):
            self.num_tokens += 1
            if position < shown:
                text += self._stops.push(self._detokenizer.push(token))
            if self._stops.found:
                self.finish = Finish.STOP
                return text
        if finish:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            self.finish = Finish.STOP if self._stops.found else finish
        return text
