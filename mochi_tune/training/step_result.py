"""What a step gave: of one process's micro-batches, and of all processes together."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One step over all processes, before its update.

    Attributes:
        step: from 1.
        loss: weighted mean over the samples.
        grad_norm: of the averaged gradients, before they are clipped.
        learning_rate: of the update.
        clips: path of each sample's clip.
        sigmas: noise level of each sample.
        stop_signal: that a process received, 0 for none.
        save_requested: whether a process received SIGUSR1.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    clips: list[str]
    sigmas: list[float]
    stop_signal: int
    save_requested: bool

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of its row in metrics.jsonl."""
        return {"step": self.step, "loss": self.loss, "grad_norm": self.grad_norm, "lr": self.learning_rate}


@dataclass(frozen=True)
class MicroBatchResult:
    """What a process computed of one micro-batch of B samples.

    Attributes:
        loss: weighted mean over the samples, a tensor () without its graph.
        clips: path of each sample's clip.
        sigma: noise levels, (B,).
    """

    loss: Tensor
    clips: list[str]
    sigma: Tensor


def merge_parts(
    gathered: list[dict[int, tuple[float, list[str], list[float]]]],
) -> tuple[float, list[str], list[float]]:
    """Returns the mean loss, the clips and the sigmas of a step, in the order of its samples.

    Args:
        gathered: of each process, by the number of a micro-batch: its loss, its clips and its sigmas. Processes that
            share the tokens of a micro-batch have the same.
    """
    parts = [part for _, part in sorted({n: part for one in gathered for n, part in one.items()}.items())]
    loss = sum(value for value, _, _ in parts) / len(parts)
    return loss, [c for _, clips, _ in parts for c in clips], [round(s, 6) for _, _, sigmas in parts for s in sigmas]
