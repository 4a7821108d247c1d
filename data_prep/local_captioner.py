"""Runs a vision-language model of transformers from a local folder."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mochi_tune.data_prep.chat import Answer, Turn
from mochi_tune.errors import CheckpointError, ConfigError, DataError
from mochi_tune.models.device import find_device


class LocalCaptioner:
    """A vision-language model with its chat template; answers one conversation at a time.

    Code in the folder is not run, and nothing is downloaded. Weights are read only from safetensors files.

    Args:
        folder: of the model, its processor and its chat template, as written by `save_pretrained`.
        device: cpu, cuda or auto.
        max_tokens: maximum tokens of an answer.
    """

    def __init__(self, folder: Path, device: str, max_tokens: int) -> None:
        self.folder, self.max_tokens, self._device = folder, max_tokens, find_device(device)
        self._processor: Any = None
        self._model: Any = None

    def check(self) -> list[str]:
        """Loads the model.

        Raises:
            ConfigError: the folder has no config.json, or its model has no chat template.
            CheckpointError: it has no vision-language model, or the model needs custom code.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        if not (self.folder / "config.json").is_file():
            raise ConfigError(f"model={self.folder} has no config.json: use the folder of a model of transformers.")
        logging.set_verbosity_error()
        rules = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = AutoProcessor.from_pretrained(self.folder, **rules)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype="auto", use_safetensors=True, **rules
            )
        # Each class raises other exceptions: OSError, ValueError, KeyError, or plain Exception of the libraries.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"model={self.folder} cannot be loaded as a model that describes pictures ({reason}): use another one, "
                "or serve it with vLLM and set endpoint= to its address."
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise ConfigError(f"model={self.folder} has no chat template: use a model that is tuned for chats.")
        self._model = model.to(self._device).eval()
        return []

    @torch.no_grad()
    def ask(self, turns: Sequence[Turn], seconds: float) -> Answer:
        """Answers a conversation; see `Captioner.ask`. The answer is cut off after `seconds`."""
        messages = [_as_message(turn) for turn in turns]
        try:
            inputs = self._processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            inputs = inputs.to(self._device, dtype=self._model.dtype)
            num_prompt = inputs["input_ids"].shape[1]
            output = self._model.generate(**inputs, max_new_tokens=self.max_tokens, max_time=seconds)[0, num_prompt:]
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"model={self.folder} needs more memory than the GPU has: use fewer or smaller pictures by num_frames= "
                "and image_size=, or a smaller model."
            ) from None
        except (ValueError, IndexError) as error:
            # For example, the chat template accepts no pictures, or fewer.
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"model={self.folder} refuses the request ({reason})") from error
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        is_cut_off = len(output) > 0 and output[-1].item() not in ends
        text = self._processor.decode(output, skip_special_tokens=True)
        return Answer(text, num_prompt, len(output), is_cut_off)

    def close(self) -> None:
        """Frees the model."""
        self._model = self._processor = None


def _as_message(turn: Turn) -> dict[str, Any]:
    from PIL import Image

    images = [{"type": "image", "image": Image.open(io.BytesIO(image))} for image in turn.images]
    return {"role": turn.role, "content": [*images, {"type": "text", "text": turn.text}]}
