"""The text of a completion: every piece final, all pieces together exact."""

import random
from collections.abc import Sequence

import pytest
from support.front_end import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models

from elastic_moe.serving.front_end.detokenizer import WINDOW, CompletionText, Detokenizer, StopStrings
from elastic_moe.serving.protocol import Finish

TEXTS = [
    "The experts of a layer are spread over all ranks.",
    "Ein Wort, ein Satz \u2013 na\u00efve caf\u00e9; \u4f60\u597d\u4e16\u754c; \U0001f600\U0001f680!",
    "def f(x):\n    return  x + 1\n",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer(TEXTS, vocab_size=330)


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """Strips the space at the start of a text and falls back to bytes, as SentencePiece models do."""
    words = ["<end>", "\u2581", "\u2581a", "\u2581word", "s", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def pieces(tokenizer: Tokenizer, tokens: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    return [detokenizer.push(t) for t in tokens] + [detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", TEXTS[0], "\U0001f600"])
def test_pieces_join_to_the_text(byte_level: Tokenizer, text: str, prompt: str):
    got = pieces(byte_level, byte_level.encode(text).ids, byte_level.encode(prompt).ids)
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


def test_a_character_split_over_tokens_comes_whole(byte_level: Tokenizer):
    tokens = [byte_level.encode("a").ids[0]] + [byte_id(byte_level, b) for b in "\U0001f600".encode()]
    assert pieces(byte_level, tokens, []) == ["a", "", "", "", "\U0001f600", ""]


def test_an_incomplete_character_is_flushed(byte_level: Tokenizer):
    tokens = [byte_id(byte_level, b) for b in "\u4f60".encode()[:2]]
    assert pieces(byte_level, tokens, []) == ["", "", "\ufffd"]


def test_any_tokens_are_exact(byte_level: Tokenizer):
    rng = random.Random(0)
    bytes_only = [byte_id(byte_level, b) for b in range(256)]
    everything = list(range(byte_level.get_vocab_size() + 3))  # with special and unknown ids
    for round_ in range(300):
        vocab = [everything, bytes_only, bytes_only[128:], bytes_only[0x80:0xC0] + bytes_only[0xE2:0xF3]][round_ % 4]
        tokens = [rng.choice(vocab) for _ in range(rng.randrange(100))]
        prompt = [rng.choice(vocab) for _ in range(rng.randrange(30))]
        assert "".join(pieces(byte_level, tokens, prompt)) == byte_level.decode(tokens)


def test_the_window_stays_bounded(byte_level: Tokenizer):
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return byte_level.decode(tokens)

    for token in (byte_id(byte_level, 0xFF), byte_id(byte_level, 0xE2), token_id(byte_level, "<end>"), 65):
        detokenizer = Detokenizer(decode)
        text = "".join([detokenizer.push(token) for _ in range(500)] + [detokenizer.flush()])
        assert text == byte_level.decode([token] * 500)
    assert longest <= WINDOW


def test_the_leading_space_of_a_completion_is_kept(metaspace: Tokenizer):
    word, end = token_id(metaspace, "\u2581word"), token_id(metaspace, "<end>")
    assert "".join(pieces(metaspace, [word, end, word], [word])) == " word word"
    assert "".join(pieces(metaspace, [word, word], [])) == "word word"


def test_byte_fallback_is_exact_for_valid_text(metaspace: Tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        text = "".join(rng.choice("\u00e9\u4f60\U0001f600") for _ in range(40))
        tokens = [token_id(metaspace, f"<0x{b:02X}>") for b in text.encode()]
        start = [token_id(metaspace, "\u2581a")]
        assert "".join(pieces(metaspace, start + tokens, start)) == " a" + text


@pytest.mark.parametrize(
    ("stops", "texts", "shown"),
    [
        (["END"], ["say E", "N", "D and more"], ["say ", "", ""]),
        (["END"], ["E", "N", "Z"], ["", "", "ENZ"]),
        (["END"], ["EEN", "D"], ["E", ""]),
        (["abab"], ["ab", "aab", "ab"], ["", "aba", ""]),
        (["x", "yz"], ["ayzx"], ["a"]),
        (["\n\n"], ["a\n", "b\n", "\n"], ["a", "\nb", ""]),
        ([], ["END"], ["END"]),
    ],
)
def test_stop_strings(stops: list[str], texts: list[str], shown: list[str]):
    matcher = StopStrings(stops)
    assert [matcher.push(text) for text in texts] == shown


def test_what_was_held_back_is_flushed():
    matcher = StopStrings(["END"])
    assert matcher.push("the EN") == "the "
    assert matcher.flush() == "EN"


def test_a_flush_is_given_once():
    matcher = StopStrings(["END"])
    assert matcher.push("EN") == ""
    assert [matcher.flush(), matcher.flush()] == ["EN", ""]


@pytest.mark.parametrize("finish", [Finish.LENGTH, Finish.STOP])
@pytest.mark.parametrize("half", ["", "\ufffd"])
def test_what_is_held_back_comes_with_the_end(byte_level: Tokenizer, finish: str, half: str):
    """What might have been the begin of a stop string, and half a character behind it."""
    tokens = byte_level.encode("a EN").ids + [byte_id(byte_level, b) for b in "\u4f60".encode()[:2] if half]
    end = [token_id(byte_level, "<end>")] if finish is Finish.STOP else []
    text = CompletionText(Detokenizer(byte_level.decode), ["END"])
    assert text.push(tokens, Finish.NOT_YET) == "a "
    assert text.push(end, finish) == "EN" + half
    assert (text.num_tokens, text.finish) == (len(tokens) + len(end), finish)


def test_the_last_flush_may_complete_a_stop_string(byte_level: Tokenizer):
    """The replacement character of half a character is text as any other, and nothing of a stop string is shown."""
    half = [byte_id(byte_level, b) for b in "\u4f60".encode()[:2]]
    for stop, shown in (("\ufffd", "hi"), ("i\ufffd", "h"), ("\ufffd!", "hi\ufffd")):
        text = CompletionText(Detokenizer(byte_level.decode), [stop])
        pieces = text.push(byte_level.encode("hi").ids, Finish.NOT_YET) + text.push(half, Finish.LENGTH)
        assert (pieces, text.finish) == (shown, "length" if shown.endswith("\ufffd") else "stop")


def test_tokens_behind_a_stop_string_are_not_counted(byte_level: Tokenizer):
    text = CompletionText(Detokenizer(byte_level.decode), ["b"])
    assert text.push([token_id(byte_level, c) for c in "abac"], Finish.LENGTH) == "a"
    assert (text.num_tokens, text.finish) == (2, "stop")


def test_completion_text_does_not_depend_on_grouping(byte_level: Tokenizer):
    tokens = byte_level.encode("one two three, four five").ids
    results = set()
    for size in (1, 2, 3, len(tokens)):
        text = CompletionText(Detokenizer(byte_level.decode), ["three"])
        shown = ""
        for at in range(0, len(tokens), size):
            if not text.finish:
                shown += text.push(
                    tokens[at : at + size], Finish.LENGTH if at + size >= len(tokens) else Finish.NOT_YET
                )
        results.add((shown, text.num_tokens, text.finish))
    assert len(results) == 1
    shown, num_tokens, finish = results.pop()
    assert (shown, finish) == ("one two ", "stop")
    assert num_tokens < len(tokens)


def test_the_end_token_is_counted_but_not_shown(byte_level: Tokenizer):
    text = CompletionText(Detokenizer(byte_level.decode))
    hi = byte_level.encode("hi").ids
    ordinary_end = byte_level.encode(".").ids
    assert text.push(hi + ordinary_end, Finish.STOP) == "hi"
    assert (text.num_tokens, text.finish) == (len(hi) + 1, "stop")


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """Id of the token that is one byte."""
    printable = list(range(0x21, 0x7F)) + list(range(0xA1, 0xAD)) + list(range(0xAE, 0x100))
    others = [b for b in range(256) if b not in printable]
    char = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return token_id(tokenizer, char)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found
