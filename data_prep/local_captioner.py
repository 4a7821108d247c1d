"""Asks a model of transformers that is in a folder of this machine."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mochi_tune.data_prep.chat import Answer, Turn
from mochi_tune.errors import CheckpointError, ConfigError, DataError
from mochi_tune.models.device import find_device


class LocalCaptioner:
    """A model that sees pictures, with its own chat template; it answers one conversation after the other.

    Code that lies beside the weights is not run, and nothing is fetched. Weights are read from safetensors alone.

    Args:
        folder: of the model, its processor and its chat template, as `save_pretrained` writes them.
        device: cpu, cuda or auto.
        max_tokens: of an answer.
    """

    def __init__(self, folder: Path, device: str, max_tokens: int) -> None:
        self.folder, self.max_tokens, self._device = folder, max_tokens, find_device(device)
        self._processor: Any = None
        self._model: Any = None

    def check(self) -> list[str]:
        """Loads the model.

        Raises:
            ConfigError: the folder is not there, or its model has no chat template.
            CheckpointError: it holds no model that sees pictures, or needs code of its own.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        if not (self.folder / "config.json").is_file():
            raise ConfigError(f"model={self.folder} holds no config.json: name the folder of a model of transformers.")
        logging.set_verbosity_error()
        rules = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = AutoProcessor.from_pretrained(self.folder, **rules)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype="auto", use_safetensors=True, **rules
            )
        # Each class raises its own: OSError, ValueError, KeyError, the libraries' plain Exception.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"model={self.folder} cannot be loaded as a model that describes pictures ({reason}): use another one, "
                "or serve it by vLLM and give its address as endpoint=."
            ) from error
        if not getattr(self._processor, "chat_template", None):
            raise ConfigError(f"model={self.folder} has no chat template: use a model that is tuned for chats.")
        self._model = model.to(self._device).eval()
        return []

    @torch.no_grad()
    def ask(self, turns: Sequence[Turn], seconds: float) -> Answer:
        """Answers a conversation; see `Captioner.ask`. What is not written within the time is left out."""
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
            # Such as a template that takes no pictures, or fewer of them.
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
