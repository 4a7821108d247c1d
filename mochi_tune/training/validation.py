"""What a run is measured by: the loss at fixed noise levels on clips that it does not train on."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.parallel.processes import is_first
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.objective import noisy_and_target, velocity_loss

# The middles of four bins of noise levels.
SIGMAS = (0.125, 0.375, 0.625, 0.875)
# A smaller share of the clips than this is held out.
MOST_HELD_OUT = 5


def held_out(paths: Sequence[str], count: int, seed: int) -> list[int]:
    """Returns the numbers of the clips that are not trained on: `count`, or a fifth of them where that is fewer.

    Chosen by the hash of their paths, so that adding clips exchanges few.
    """

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{paths[index]}".encode()).digest()

    return sorted(sorted(range(len(paths)), key=key)[: min(count, len(paths) // MOST_HELD_OUT)])


@torch.no_grad()
def validation_losses(
    dit: nn.Module,
    dataset: LatentDataset,
    indices: Sequence[int],
    seed: int,
    objective: str,
    device: torch.device,
    attend: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Returns the loss at each of SIGMAS, by its text, on fixed clips and noise; the training loss's noise hides it.

    Args:
        dit: is in training mode again when this returns.
        dataset: of the clips.
        indices: clips to look at.
        seed: of the noise.
        objective: one of `flow.OBJECTIVES`.
        device: of the model.
        attend: called between clips; what it raises ends this.
    """
    dit.eval()
    losses = torch.zeros(len(indices), len(SIGMAS))
    clips = tqdm(indices, desc="validation", unit="clip", leave=False, disable=not is_first())
    try:
        for row, index in enumerate(clips):
            attend()
            batch = collate([dataset[index]])
            noise = torch.randn(batch["mean"].shape, generator=keyed_generator(seed, "validation", index))
            for column, value in enumerate(SIGMAS):
                sigma = torch.tensor([value])
                noisy, target = noisy_and_target(objective, batch["mean"], noise, sigma)
                prediction = dit(
                    noisy.to(device), sigma.to(device), batch["prompt_embeds"].to(device), batch["prompt_mask"]
                )
                losses[row, column] = velocity_loss(prediction, target.to(device)).item()
    finally:
        dit.train()
    return {f"{value:g}": loss for value, loss in zip(SIGMAS, losses.mean(0).tolist(), strict=True)}
