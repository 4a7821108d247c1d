"""T5 features of prompts."""

from pathlib import Path

import torch
from torch import Tensor

from mochi_tune.errors import CheckpointError

MAX_TOKENS = 256


class TextEncoder:
    """A T5 encoder and its tokenizer, loaded from the folders text_encoder/ and tokenizer/ of a weights folder."""

    def __init__(self, tokenizer, model) -> None:
        self.tokenizer = tokenizer
        self.model = model

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> "TextEncoder":
        """Loads straight to the device and dtype; fp16 is not offered, as T5's activations overflow it.

        Args:
            folder: a weights folder that has passed `WeightsFolder.check`.
            device: of the encoder.
            dtype: torch.float32 or torch.bfloat16.
        """
        assert dtype in (torch.float32, torch.bfloat16), dtype
        tokenizer = cls.load_tokenizer(folder)
        from transformers import T5EncoderModel
        from transformers.utils import logging

        # The official shared embedding is stored twice or once; transformers' notes on that say nothing to a user.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = T5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, device_map={"": device}, local_files_only=True, use_safetensors=True
        )
        return cls(tokenizer, model.eval().requires_grad_(False))

    @staticmethod
    def load_tokenizer(folder: Path):
        """Loads the tokenizer alone, for counting tokens before any weight is read; runs no code of the folder.

        Raises:
            CheckpointError: it is damaged, or needs code of its own.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        try:
            # Without the second setting, transformers asks on the terminal whether to run code that the files name.
            return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
        # The tokenizers' library raises Exception itself.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{folder / 'tokenizer'} cannot be read ({reason}): fetch it again with `mochi-tune weights pull`."
            ) from error

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
