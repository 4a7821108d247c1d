"""Parts: files of latents and caption features that `prepare` has encoded and not yet committed.

Parts are written atomically. A part is named by the key of its content, so any process writes the same part.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mochi_tune.errors import DataError
from mochi_tune.files import save_tensors

# Seconds for which a network disk may hide files of another machine. Linux's NFS: acdirmax, 60 s by default.
_VISIBLE_SECONDS = 90.0


@dataclass(frozen=True)
class Part:
    """A part on disk; `info` is its metadata."""

    file: Path
    num_bytes: int
    info: dict[str, Any]


class PartsFolder:
    """A folder of parts. It takes no lock: several processes may write different parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_latents(self, clip_key: str, mean: torch.Tensor, logvar: torch.Tensor, clip_report: dict[str, Any]) -> Part:
        """Saves a clip's posterior, fp32 (C, T, h, w) on the CPU, and its report, and syncs them to disk."""
        return self._put(f"latents-{clip_key}", {"mean": mean, "logvar": logvar}, clip_report)

    def put_text(self, text_key: str, prompt_embeds: torch.Tensor, caption_tokens: int) -> Part:
        """Saves a caption's features, fp32 (num_tokens, text_width), and its token count before truncation."""
        info = {"num_tokens": len(prompt_embeds), "caption_tokens": caption_tokens}
        return self._put(f"text-{text_key}", {"prompt_embeds": prompt_embeds}, info)

    def has_latents(self, clip_key: str) -> bool:
        """Whether a clip's latents are here."""
        return self.path(f"latents-{clip_key}").exists()

    def has_text(self, text_key: str) -> bool:
        """Whether a caption's features are here."""
        return self.path(f"text-{text_key}").exists()

    def find(self, name: str) -> Path:
        """Returns the file of a part that another process wrote; waits until a network disk shows it."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        # Check by name: the listing of the folder may be older.
        while not self.path(name).exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        return self.path(name)

    def path(self, name: str) -> Path:
        """Returns the file of a part, "latents-KEY" or "text-KEY"."""
        return self.folder / f"{name}.safetensors"

    def _put(self, name: str, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> Part:
        assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values())
        file = self.path(name)
        save_tensors(file, tensors, {"info": json.dumps(info)}, durable=True)
        return Part(file, file.stat().st_size, info)


def read_part(file: Path) -> Part:
    """Reads a part's metadata.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as part:
            return Part(file, file.stat().st_size, json.loads(part.metadata()["info"]))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}): delete it and run `mochi-tune prepare` again.") from error
