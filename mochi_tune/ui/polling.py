"""Polls the page's folder, once for the whole page, because each event costs the browser time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

POLL_SECONDS = 2


class Poller:
    """Reads states of the folder every two seconds, and triggers an event for each state that has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._states: dict[Callable[[Path], Any], gr.State] = {}

    def changes(self, read_state: Callable[[Path], Any]) -> Any:
        """Returns the event that the result of `read_state` has changed.

        Args:
            read_state: returns a state of the folder, whose `repr` differs from that of any other state.
        """
        if read_state not in self._states:
            self._states[read_state] = gr.State("")
        return self._states[read_state].change

    def wire(self) -> None:
        """Starts polling, after all parts of the page have called `changes`."""
        readers, states = list(self._states), list(self._states.values())
        gr.Timer(POLL_SECONDS).tick(
            lambda: [repr(read_state(self.folder)) for read_state in readers], None, states, show_progress="hidden"
        )
