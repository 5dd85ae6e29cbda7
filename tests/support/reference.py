"""The demo model in transformers alone, one process, one request at a time, float32: what the servers must equal."""

from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.config import REPO
from support.server import DEMO_MODEL

NEAR_TIE = 1e-4
"""Two logits nearer than this may change places in another batch: float32 sums depend on the shape of the batch."""


@dataclass(frozen=True)
class Continuation:
    """What greedy decoding makes of a prompt."""

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]
    """Generated ones, the end-of-sequence token included."""
    margin: float
    """The smallest distance between the best and the second best logit."""


class Reference:
    """transformers' own generate."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
        self._model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
        self._words = (REPO / "LICENSE").read_text().split()
        self.greedy = cache(self._greedy)

    def _greedy(self, prompt: str, max_tokens: int) -> Continuation:
        prompt_tokens = self.tokenizer(prompt)["input_ids"]
        made = self._model.generate(
            torch.tensor([prompt_tokens]),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(made.scores).topk(2).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        return Continuation(prompt, prompt_tokens, made.sequences[0, len(prompt_tokens) :].tolist(), margin)

    def text(self, tokens: list[int]) -> str:
        """As a client gets it: without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def continuations(self, count: int) -> list[Continuation]:
        """`count` prompts of 2 to 120 words of real text with 24 to 48 tokens to generate, no near tie among them."""
        found: list[Continuation] = []
        number = 0
        while len(found) < count:
            start, length = 41 * number % 1400, 2 + 37 * number % 119
            prompt = " ".join(self._words[start : start + length])
            continuation = self.greedy(prompt, 24 + 7 * number % 25)
            if continuation.margin > NEAR_TIE:
                found.append(continuation)
            number += 1
            assert number < 4 * count, "nearly every continuation has a near tie"
        return found
