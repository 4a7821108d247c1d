"""The results of a step: of one micro-batch, and of all processes together."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The result of a step over all processes, before its update.

    Attributes:
        step: number of the step, from 1.
        loss: weighted mean over the samples.
        grad_norm: norm of the averaged gradients before clipping.
        learning_rate: learning rate of the update.
        clips: path of the clip of each sample.
        sigmas: noise level of each sample.
        stop_signal: the signal that asks for a stop, 0 for none.
        save_requested: whether a process received SIGUSR1, or noticed that the run folder was moved.
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
    """The result of one micro-batch of B samples.

    Attributes:
        loss: weighted mean over the samples, a detached tensor ().
        clips: path of the clip of each sample.
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
        gathered: for each process, the loss, the clips and the sigmas of its micro-batches, by number. Processes that
            share the tokens of a micro-batch have the same results.
    """
    merged: dict[int, tuple[float, list[str], list[float]]] = {}
    for number, part in (item for one in gathered for item in one.items()):
        assert merged.setdefault(number, part)[1] == part[1], "processes that share tokens have the same clips"
    parts = [merged[number] for number in sorted(merged)]
    loss = sum(value for value, _, _ in parts) / len(parts)
    return loss, [c for _, clips, _ in parts for c in clips], [round(s, 6) for _, _, sigmas in parts for s in sigmas]
