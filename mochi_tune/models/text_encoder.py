"""T5 features of prompts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 256


def load_tokenizer(folder: Path) -> Any:
    """Loads T5's tokenizer from its folder, without any code of the folder."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class TextEncoder:
    """A T5 encoder and its tokenizer, as `WeightsFolder.load_text_encoder` loads them."""

    def __init__(self, tokenizer, model) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.model.config.d_model

    def count_tokens(self, prompt: str) -> int:
        """Returns how many tokens the prompt has, its end token included, however long."""
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Returns each prompt's features of its valid tokens, fp32 (n, width), n at most 256; (0, width) for "".

        Prompts are encoded one by one without padding, so that a prompt's features do not depend on its company.
        """
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
