"""The progress bar, the summary and the log of `describe`."""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mochi_tune.data_prep.captioning import Cost
from mochi_tune.errors import DataError, counted, printable
from mochi_tune.files import append_line, lock_file


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, cost: Cost) -> float:
        """Returns the price of a cost's tokens."""
        return (cost.prompt_tokens * self.prompt + cost.completion_tokens * self.completion) / 1e6


@dataclass
class Result:
    """The result of describing a clip: its caption or the error, and its cost."""

    clip: Path
    caption: str = ""
    error: str = ""
    notes: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    is_lost: bool = False

    def row(self, name: str) -> dict[str, Any]:
        """Returns the line of the log."""
        status = "failed" if self.error else "described"
        costs = asdict(self.cost) | {"seconds": round(self.cost.seconds, 3)}
        return {"clip": name, "status": status, **costs, "notes": self.notes, "error": self.error, "text": self.caption}


class Tally:
    """Counts results, and shows a progress bar by a monotonic clock.

    Args:
        total: number of clips to describe.
        prices: of tokens; None if unknown.
    """

    def __init__(self, total: int, prices: Prices | None) -> None:
        self.num_described = self.num_failed = 0
        self._total, self._prices, self._cost = total, prices, Cost()
        self._started = self._shown = time.monotonic()
        # Without tqdm's own estimates, which use the system clock.
        form = "{desc}: {n_fmt}/{total_fmt} |{bar}|{postfix}"
        self._bar = tqdm(total=total, desc="clips", disable=not total, bar_format=form)

    def add(self, result: Result) -> None:
        """Adds the result of a clip."""
        self.num_failed += bool(result.error)
        self.num_described += not result.error
        for name, value in vars(result.cost).items():
            setattr(self._cost, name, getattr(self._cost, name) + value)
        now, num_done = time.monotonic(), self.num_described + self.num_failed
        self._bar.update()
        if now - self._shown >= 1 or num_done == self._total:
            left = (now - self._started) / num_done * (self._total - num_done)
            price = f", {self._price()}" if self._prices else ""
            self._bar.set_postfix_str(f"{self._rate()}, {_format_seconds(left)} left{price}")
            self._shown = now

    def say(self, line: str) -> None:
        """Writes a line above the bar."""
        tqdm.write(printable(line))

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def summary(self, num_with: int, num_refused: int) -> str:
        """Returns a summary line.

        Args:
            num_with: number of clips that had a caption before.
            num_refused: number of clips for which no caption was requested.
        """
        cost, num_left = self._cost, self._total - self.num_described - self.num_failed
        parts = [f"{counted(self.num_described, 'clip')} described, {num_with} had a caption"]
        if without := self.num_failed + num_refused:
            parts[0] += f", {without} without one"
        if num_left:
            parts[0] += f", {num_left} not yet tried"
        parts.append(f"{counted(cost.requests, 'request')}, including {cost.retries} retries")
        if cost.prompt_tokens + cost.completion_tokens:
            parts.append(f"{cost.prompt_tokens:,} + {cost.completion_tokens:,} tokens")
            if self._prices:
                parts.append(f"price {self._price()}")
        elif self._prices and cost.requests:
            parts.append("no price, as the endpoint does not report tokens")
        parts.append(f"{_format_seconds(time.monotonic() - self._started)}, {self._rate()}")
        return "; ".join(parts)

    def _rate(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        return f"{(self.num_described + self.num_failed) / max(minutes, 1e-9):.1f} clips/min"

    def _price(self) -> str:
        assert self._prices is not None
        return f"{self._prices.of(self._cost):.4f}"


def _format_seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Locks the log; yields a function that appends a line to it.

    Raises:
        DataError: another process holds the lock.
    """
    with open(path, "a+b", buffering=0) as file:
        try:
            if not lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                # Not an error: two processes only request captions twice, and never replace one.
                tqdm.write(f"{path}: its disk has no locks: make sure that no other `mochi-tune describe` runs there")
        except BlockingIOError:
            raise DataError(f"{path}: another `mochi-tune describe` is writing it: wait for it to finish.") from None
        yield lambda row: append_line(file, json.dumps(row, ensure_ascii=True).encode())
