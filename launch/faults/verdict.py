"""How an answer of a disturbed run compares with that of an undisturbed one."""

import enum

from launch.streams import Answer


class Verdict(enum.Enum):
    """How an answer compares with that of an undisturbed run."""

    SAME = "same"
    UNFINISHED = "unfinished"
    DUPLICATED = "duplicated"
    LOST = "lost"
    MISMATCHED = "mismatched"


def compare(wanted: Answer, got: Answer) -> Verdict:
    """Judge an answer. Duplicated or lost: one stretch of text too much or too little, or another count of tokens."""
    if not got.finish:
        return Verdict.UNFINISHED
    if (got.text, got.num_tokens, got.finish) == (wanted.text, wanted.num_tokens, wanted.finish):
        return Verdict.SAME
    if got.num_tokens > wanted.num_tokens or _has_more(got.text, wanted.text):
        return Verdict.DUPLICATED
    if got.num_tokens < wanted.num_tokens or _has_more(wanted.text, got.text):
        return Verdict.LOST
    return Verdict.MISMATCHED


def _has_more(longer: str, shorter: str) -> bool:
    """Whether one stretch taken out of `longer` leaves `shorter`."""
    if len(longer) <= len(shorter):
        return False
    head = _num_alike(longer, shorter)
    return head + _num_alike(longer[::-1], shorter[::-1]) >= len(shorter)


def _num_alike(longer: str, shorter: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(longer, shorter, strict=False)) if a != b), len(shorter))
