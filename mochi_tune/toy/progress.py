"""Progress of a program that has several stages, in one line."""

from collections.abc import Mapping

from tqdm import tqdm


class StageBar:
    """Shows one bar for all stages on a terminal, and one line per stage elsewhere, such as in a log."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        """Starts the clock.

        Args:
            shares: name of each stage, in order -> its approximate share of the time, in any unit.
        """
        self._shares, self._total = dict(shares), sum(shares.values())
        self._begun, self._stage = 0.0, ""
        form = "{percentage:3.0f}% |{bar:30}| {elapsed}  {desc}"
        self._bar = tqdm(total=100, bar_format=form, disable=None, leave=False)

    def begin(self, stage: str) -> None:
        """Begins a stage; the one before it is complete."""
        if self._stage:
            self._begun += self._shares[self._stage]
        self._stage = stage
        if self._bar.disable:
            tqdm.write(f"{stage} ...")
        self.reach(0, 1)

    def reach(self, done: int, total: int, unit: str = "") -> None:
        """Shows that `done` of `total` units of the stage are complete."""
        self._bar.n = 100 * (self._begun + self._shares[self._stage] * done / total) / self._total
        self._bar.set_description_str(f"{self._stage}, {unit} {done} of {total}" if unit else self._stage)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
