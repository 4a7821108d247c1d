"""What has changed in the page's folder: one look for the whole page, as each event costs the browser time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

POLL_SECONDS = 2


class News:
    """Looks at the folder every two seconds; parts of the page are told of what they show and of nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[Callable[[Path], Any], gr.State] = {}

    def of(self, look: Callable[[Path], Any]) -> Any:
        """Returns the event that `look` finds another thing than before.

        Args:
            look: returns what is in the folder, as something whose `repr` tells it apart.
        """
        if look not in self._seen:
            self._seen[look] = gr.State("")
        return self._seen[look].change

    def wire(self) -> None:
        """Begins to look, once all parts of the page have said at what."""
        looks, states = list(self._seen), list(self._seen.values())
        gr.Timer(POLL_SECONDS).tick(
            lambda: [repr(look(self.folder)) for look in looks], None, states, show_progress="hidden"
        )
