"""What a step is made of: which clips, and every number that is drawn for them, as functions of (seed, step, sample).

The samples of a step are numbered through, whoever computes them: sample i is row i % batch_size of micro-batch
i // batch_size, and rank r of R takes the micro-batches r, R + r, 2R + r and so on.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mochi_tune.data.dataset import LatentDataset, batch_indices, collate
from mochi_tune.errors import DataError
from mochi_tune.training.draws import key_seed, keyed_generator
from mochi_tune.training.objective import (
    draw_posterior,
    loss_weight,
    noisy_and_target,
    sigmas_of,
    stratified,
    velocity_loss,
)

# More damaged clips than this share of them, and more than one, are no accident.
MOST_DAMAGED = 0.1


@dataclass(frozen=True)
class Batch:
    """A micro-batch, ready for the model; B rows.

    Attributes:
        noisy: the model's input, fp32 (B, C, T, h, w).
        target: velocity, fp32 (B, C, T, h, w).
        sigma: (B,).
        prompt_embeds: (B, L, D).
        prompt_mask: (B, L), true where a token is valid.
        clips: paths of the clips.
        dropout_seed: of the adapter's dropout.
    """

    noisy: Tensor
    target: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    prompt_mask: Tensor
    clips: list[str]
    dropout_seed: int


@dataclass(frozen=True)
class Draws:
    """How a run draws; two runs with the same draws see the same samples.

    Attributes:
        seed: of the run.
        batch_size: clips of a micro-batch.
        num_micro_batches: of a step, over all ranks.
        objective: one of `flow.OBJECTIVES`.
        caption_dropout: share of samples without their caption.
        distribution: of sigma, one of `flow.SIGMA_DISTRIBUTIONS`, with its mean, std and shift.
        is_stratified: whether the sigmas of a step are spread evenly over the distribution.
        weighting: one of `flow.LOSS_WEIGHTINGS`.
    """

    seed: int = 0
    batch_size: int = 1
    num_micro_batches: int = 1
    objective: str = "sampler"
    caption_dropout: float = 0.1
    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    is_stratified: bool = False
    weighting: str = "none"

    def generator(self, step: int, sample: int) -> torch.Generator:
        """Returns the generator of everything that is drawn for one sample of a step."""
        return keyed_generator(self.seed, "train", step, sample)

    def sigmas(self, step: int) -> Tensor:
        """Returns the noise levels of all samples of a step, (samples,); a sample's first draw decides its own."""
        count = self.batch_size * self.num_micro_batches
        uniforms = torch.stack([torch.rand((), generator=self.generator(step, i)) for i in range(count)])
        if self.is_stratified:
            order = torch.randperm(count, generator=keyed_generator(self.seed, "strata", step))
            uniforms = stratified(uniforms, order)
        return sigmas_of(uniforms, self.distribution, self.mean, self.std, self.shift)

    def indices(self, step: int, number: int, clips: list[int]) -> list[int]:
        """Returns the clips of micro-batch `number` of a step, chosen from those that may be trained on."""
        batch = (step - 1) * self.num_micro_batches + number
        places = batch_indices(batch, num_clips=len(clips), batch_size=self.batch_size, seed=self.seed)
        return [clips[place] for place in places]

    def mixed(self, items: Mapping, step: int, number: int) -> Batch:
        """Makes the model's input of collated clips: posterior, noise, sigma and caption dropout are drawn by sample.

        Args:
            items: from `collate`.
            step: from 1.
            number: of the micro-batch in the step.
        """
        first = number * self.batch_size
        sigma = self.sigmas(step)[first : first + self.batch_size]
        embeds, mask = items["prompt_embeds"].clone(), items["prompt_mask"].clone()
        posterior_noise, noise = [], []
        for row, mean in enumerate(items["mean"]):
            generator = self.generator(step, first + row)
            torch.rand((), generator=generator)  # Sigma's.
            if torch.rand((), generator=generator) < self.caption_dropout:
                embeds[row] = 0
                mask[row] = False
            posterior_noise.append(torch.randn(mean.shape, generator=generator))
            noise.append(torch.randn(mean.shape, generator=generator))
        vae_latents = draw_posterior(items["mean"], items["logvar"], torch.stack(posterior_noise))
        noisy, target = noisy_and_target(self.objective, vae_latents, torch.stack(noise), sigma)
        dropout_seed = key_seed(self.seed, "dropout", step, number)
        return Batch(noisy, target, sigma, embeds, mask, list(items["sample_ids"]), dropout_seed)

    def loss(self, dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Returns the mean loss of a micro-batch, a tensor () with its gradient."""
        return self.losses(dit, batch, device).mean()

    def losses(self, dit: nn.Module, batch: Batch, device: torch.device) -> Tensor:
        """Returns the weighted loss of each sample of a micro-batch, (B,) with their gradients."""
        torch.manual_seed(batch.dropout_seed)
        prediction = dit(
            batch.noisy.to(device), batch.sigma.to(device), batch.prompt_embeds.to(device), batch.prompt_mask
        )
        each = velocity_loss(prediction, batch.target.to(device))
        return each * loss_weight(batch.sigma, self.weighting).to(device)


class Clips:
    """The clips that may be trained on; a damaged one stops the run, or another one takes its place."""

    def __init__(
        self, dataset: LatentDataset, indices: list[int], is_strict: bool, tell: Callable[[str], None]
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.is_strict = is_strict
        self.tell = tell
        self.damaged: set[int] = set()

    def batch(self, draws: Draws, step: int, number: int) -> Batch:
        """Reads and mixes micro-batch `number` of a step.

        Raises:
            DataError: a clip is damaged and the run is strict, or too many are.
        """
        first = number * draws.batch_size
        items = [
            self._item(draws, step, first + row, index)
            for row, index in enumerate(draws.indices(step, number, self.indices))
        ]
        return draws.mixed(collate(items), step, number)

    def _item(self, draws: Draws, step: int, sample: int, index: int) -> dict:
        # The stand-in is drawn by the sample's own key: the order of all others stays what it was.
        generator = keyed_generator(draws.seed, "stand-in", step, sample)
        while True:
            if index not in self.damaged:
                try:
                    return self.dataset[index]
                except DataError as error:
                    if self.is_strict:
                        raise
                    self._quarantine(index, error)
            index = self.indices[int(torch.randint(len(self.indices), (), generator=generator))]

    def _quarantine(self, index: int, error: DataError) -> None:
        self.damaged.add(index)
        if len(self.damaged) > max(1, MOST_DAMAGED * len(self.indices)):
            raise DataError(
                f"{len(self.damaged)} of {len(self.indices)} clips are damaged, the last one: {error}"
            ) from None
        self.tell(f"quarantined, another clip takes its place: {str(error).partition('; data.damaged')[0]}")


class Feed:
    """Reads a rank's micro-batches one ahead of the training, in the background."""

    def __init__(self, read: Callable[[int, int], Batch], places: Iterable[tuple[int, int]]) -> None:
        """Prepares to read.

        Args:
            read: gives micro-batch `number` of a step.
            places: step and number of every micro-batch that will be asked for, in order.
        """
        self.read = read
        self.places = places
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(maxsize=1)
        self._is_over = False
        # A daemon: a read that hangs must not keep a process alive that has been asked to stop.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        with contextlib.suppress(queue.Empty):
            self._queue.get_nowait()

    def get(self, gives_up: Callable[[], bool]) -> Batch | None:
        """Returns the next micro-batch, None when it was given up while it was waited for.

        Raises:
            DataError: a clip is damaged.
        """
        while True:
            try:
                item = self._queue.get(timeout=0.2)
            except queue.Empty:
                if gives_up():
                    return None
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _run(self) -> None:
        for step, number in self.places:
            try:
                item = self.read(step, number)
            except Exception as error:  # noqa: BLE001 - it is raised where the batch is asked for
                item = error
            self._queue.put(item)
            if self._is_over or isinstance(item, Exception):
                return
