"""One line that says how far a program of several stages is."""

from collections.abc import Mapping

from tqdm import tqdm


class StageBar:
    """A bar over all stages, on a terminal; elsewhere, such as in a log, a line for each stage as it begins."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        """Starts the clock.

        Args:
            shares: by the name of each stage, in order, about which part of the time it takes.
        """
        self._shares, self._total = dict(shares), sum(shares.values())
        self._begun, self._stage = 0.0, ""
        form = "{percentage:3.0f}% |{bar:30}| {elapsed}  {desc}"
        self._bar = tqdm(total=100, bar_format=form, disable=None, leave=False)

    def begin(self, stage: str) -> None:
        """Says that the next stage begins, and that those before it are done."""
        if self._stage:
            self._begun += self._shares[self._stage]
        self._stage = stage
        if self._bar.disable:
            tqdm.write(f"{stage} ...")
        self.reach(0, 1)

    def reach(self, done: int, total: int, unit: str = "") -> None:
        """Says how much of the stage is done, of `total`."""
        self._bar.n = 100 * (self._begun + self._shares[self._stage] * done / total) / self._total
        self._bar.set_description_str(f"{self._stage}, {unit} {done} of {total}" if unit else self._stage)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()
