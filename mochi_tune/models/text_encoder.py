"""T5 features of prompts."""

import contextlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 256
# The values of `memory.t5_dtype`.
T5_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def prompt_dtype(t5_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of T5 in `sample` and for eval prompts: that of the DiT, or int8 where `memory.t5_dtype` is.

    In fp32, the default of `memory.t5_dtype`, T5 alone would not fit a small GPU.
    """
    return T5_DTYPES[t5_dtype] if t5_dtype == "int8" else dtype


def load_tokenizer(folder: Path) -> Any:
    """Loads T5's tokenizer from its folder, without running code from the folder."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses the warnings of transformers, which are of no use to a user of this program."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class MeasuredCaption:
    """A caption or prompt, and how much of it the text encoder reads.

    Attributes:
        text: the complete text.
        num_tokens: number of tokens, with the end token; None if the tokenizer is not available.
        num_read: number of characters of `text` that are read.
    """

    text: str
    num_tokens: int | None
    num_read: int

    @property
    def lost_tokens(self) -> int:
        """Number of tokens that are cut off."""
        return max((self.num_tokens or 0) - MAX_TOKENS, 0)


def measure_caption(text: str, tokenizer: Any | None) -> MeasuredCaption:
    """Counts the tokens of a caption and finds where it is cut."""
    if tokenizer is None or not text:
        return MeasuredCaption(text, None if tokenizer is None else 0, len(text))
    tokens = tokenizer(text, verbose=False, return_offsets_mapping=True)
    num_tokens = len(tokens.input_ids)
    # The last token that is read is the end token.
    num_read = len(text) if num_tokens <= MAX_TOKENS else tokens.offset_mapping[MAX_TOKENS - 2][1]
    return MeasuredCaption(text, num_tokens, num_read)


def may_be_cut(text: str) -> bool:
    """Whether a text could have more than MAX_TOKENS tokens, by an upper bound that needs no tokenizer.

    T5 normalizes a text by NFKC and prepends a space. Each token covers at least one of these characters, and the end
    token is added.
    """
    return len(unicodedata.normalize("NFKC", text)) + 2 > MAX_TOKENS


class TextEncoder:
    """A T5 encoder and its tokenizer; `WeightsFolder.load_text_encoder` loads them."""

    def __init__(self, tokenizer, model) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.model.config.d_model

    def count_tokens(self, prompt: str) -> int:
        """Returns the number of tokens of the prompt, with its end token, before it is cut."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Returns the features of each prompt's valid tokens, fp32 (n, width) with n at most 256; (0, width) for "".

        Prompts are encoded one by one without padding, so the features of a prompt do not depend on the others.
        """
        assert not isinstance(prompts, str), "prompts must be a list, not one string"
        features = []
        for prompt in prompts:
            if not prompt:
                features.append(torch.zeros(0, self.width, device=self.model.device))
                continue
            tokens = self.tokenizer(prompt, max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            hidden = self.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            features.append(hidden[0].float())
        return features
