"""Videos rendered while a run trains: the base and the adapter side by side, from the same noise at every step."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from mochi_tune.adapters.lora import switch_adapters
from mochi_tune.files import write_whole
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.vae import Decoder
from mochi_tune.models.vae_streaming import decode_chunks
from mochi_tune.parallel.processes import from_first, is_first
from mochi_tune.sampling.sampler import SamplerSettings, sample_latents
from mochi_tune.sampling.video import write_video
from mochi_tune.training.checkpoint import load_tensors
from mochi_tune.training.interrupts import Interrupted


@dataclass(frozen=True)
class EvalVideos:
    """Renders a few prompts by the sampler's own code; all processes take part, the main process writes.

    Attributes:
        folder: of the videos.
        features: of each prompt and, last, of the negative prompt, (n, D).
        noise: (1, C, T, h, w).
        settings: steps, schedule and guidance.
        load_decoder: loads the VAE's decoder when there is something to decode.
        on_step: called by all processes after each step; what it raises ends the rendering.
        is_asked_to_stop: called by the main process, which decodes alone; no part of a video that it breaks off is
            left.
    """

    folder: Path
    features: list[Tensor]
    noise: Tensor
    settings: SamplerSettings
    load_decoder: Callable[[], Decoder]
    on_step: Callable[[], None]
    is_asked_to_stop: Callable[[], bool]

    def render(self, dit: nn.Module, step: int, starts_as_base: bool) -> None:
        """Renders the videos of a step that are not there yet.

        Args:
            dit: with its adapter.
            step: of the adapter.
            starts_as_base: whether the adapter of step 0 changes nothing.
        """
        *prompts, negative_prompt = self.features
        paths = [self.folder / f"step_{step:06d}_prompt_{i}.mp4" for i in range(len(prompts))]
        missing = from_first([not path.exists() for path in paths])
        pairs = {}
        for i in [i for i, is_missing in enumerate(missing) if is_missing]:
            base = self._base(dit, i, negative_prompt)
            if step == 0 and starts_as_base:
                pairs[paths[i]] = base, base
            else:
                pairs[paths[i]] = base, self._sample(dit, prompts[i], negative_prompt, paths[i].stem)
        if not pairs or not is_first():
            return
        decoder = self.load_decoder()
        with contextlib.suppress(Interrupted):  # All processes check for a stop together after this.
            for path, pair in pairs.items():
                write_video(path, self._side_by_side(decoder, *pair))

    def _base(self, dit: nn.Module, i: int, negative_prompt: Tensor) -> Tensor:
        """Returns the latents of a prompt without the adapter; they are sampled once a run."""
        inputs = [self.noise, self.features[i], negative_prompt]
        digest = hashlib.sha256(repr(self.settings).encode() + b"".join(t.numpy().tobytes() for t in inputs))
        path = self.folder / f"base_prompt_{i}_{digest.hexdigest()[:12]}.safetensors"
        saved = from_first(load_tensors(path)["latents"] if is_first() and path.exists() else None)
        if saved is not None:
            return saved
        switch_adapters(dit, False)
        try:
            latents = self._sample(dit, self.features[i], negative_prompt, f"base_prompt_{i}")
        finally:
            switch_adapters(dit, True)
        if is_first():
            write_whole(path, save({"latents": latents}))
        return latents

    def _sample(self, dit: nn.Module, prompt: Tensor, negative_prompt: Tensor, name: str) -> Tensor:
        was_training = dit.training
        dit.eval()
        latents = self.noise
        try:
            steps = sample_latents(dit, self.noise, prompt, negative_prompt, self.settings)
            for state in tqdm(steps, name, self.settings.steps, unit="step", leave=False):
                latents = state
                self.on_step()
        finally:
            dit.train(was_training)
        return latents.cpu()

    def _side_by_side(self, decoder: Decoder, base: Tensor, adapted: Tensor) -> Iterator[Tensor]:
        halves = [decode_chunks(decoder, to_vae_latents(latents)) for latents in (base, adapted)]
        for left, right in zip(*halves, strict=True):
            if self.is_asked_to_stop():
                raise Interrupted
            yield torch.cat([left[0], right[0]], dim=2)
