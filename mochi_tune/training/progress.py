"""Shows the progress of a training on stderr: a bar on a terminal, otherwise plain lines."""

import sys
import time

from accelerate import PartialState
from tqdm import tqdm

from mochi_tune.parallel.forecast import in_words
from mochi_tune.training.step_result import StepResult

# Approximate number of lines of a run without a terminal.
NUM_LINES = 100


def hides_bars() -> bool:
    """Whether this process shows no bars: it is not the main process, or stderr is not a terminal."""
    return not (PartialState().is_main_process and sys.stderr.isatty())


class Progress:
    """Shows each finished step of a run.

    Args:
        num_steps: number of steps of the run.
        step: the last finished step.
        is_main: whether this is the main process, which alone shows the progress.
    """

    def __init__(self, num_steps: int, step: int, is_main: bool) -> None:
        self.num_steps, self.first = num_steps, step
        self._has_lines = is_main and not sys.stderr.isatty()
        self._every = max(1, num_steps // NUM_LINES)
        self._started = time.monotonic()
        self._bar = tqdm(total=num_steps, initial=step, desc="train", unit="step", disable=hides_bars())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, result: StepResult, seconds: float) -> None:
        """Shows a finished step, which took `seconds`."""
        rate = f"lr {result.learning_rate:.1e}, {seconds:.2f} s/step"
        numbers = f"loss {result.loss:.4f}, norm {result.grad_norm:.3f}, {rate}"
        self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update()
        # The first step is always shown.
        is_shown = result.step % self._every == 0 or result.step in (self.first + 1, self.num_steps)
        if self._has_lines and is_shown:
            per_step = (time.monotonic() - self._started) / (result.step - self.first)
            left = self.num_steps - result.step
            more = f", {in_words(per_step * left)} left" if left else ""
            tqdm.write(f"step {result.step}/{self.num_steps}: {numbers}{more}", file=sys.stderr)
