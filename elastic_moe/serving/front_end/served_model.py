"""The model a front end speaks for: its name, its tokenizer, its limits. No weights."""

import asyncio
import time
from collections.abc import Sequence
from typing import cast

import jinja2
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from elastic_moe.background import start_worker
from elastic_moe.config import ServeConfig


class ServedModel:
    """Text to tokens and back.

    Long prompts take long to tokenize, so that happens in one thread beside the event loop; one only, because a
    tokenizer is not made for several.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_model_len: int) -> None:
        """`max_model_len` is the longest prompt + completion in tokens, `vocab_size` bounds the token ids."""
        self.name = name
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.created = int(time.time())
        self._tokenizer = tokenizer
        self._fast: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._thread = start_worker("tokenizer")

    @classmethod
    def load(cls, config: ServeConfig) -> "ServedModel":
        """Read tokenizer and limits from the checkpoint folder.

        Raises:
            ValueError: the folder has no usable tokenizer or config.json; says why.
        """
        path = config.model.path
        try:
            text_config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of any type: the tokenizers library raises plain ones
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"model.path={path!r}: its config or tokenizer cannot be read: {reason}") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
            raise ValueError(f"model.path={path!r}: it has no tokenizer files, such as tokenizer.json")
        own_limit = getattr(text_config, "max_position_embeddings", None)
        limits = [config.serving.max_model_len or own_limit, config.serving.cache_capacity]
        return cls(config.model.name, tokenizer, text_config.vocab_size, min(n for n in limits if n is not None))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without special tokens, spaces as they are. Called for every token, and
        transformers' own way to the tokenizer takes longer than the tokenizer."""
        if self._fast is not None:
            return self._fast.decode(tokens, skip_special_tokens=True)
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast("str", text)  # a list comes from a batch only

    async def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the tokenizer puts around one."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, text)

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Tokens of a conversation by the model's chat template, up to where the assistant's answer begins.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError(f"model {self.name!r} has no chat template; use /v1/completions")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._apply_template, messages)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error

    def close(self) -> None:
        """End the thread; the model cannot encode any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False)["input_ids"]

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        tokens = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return cast("list[int]", tokens)
