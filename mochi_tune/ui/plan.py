"""The plan beside the settings: memory, time and disk of a run, as `mochi-tune plan` foretells them."""

import shutil
import subprocess
from functools import cache
from html import escape

from mochi_tune.config.schema import RunConfig
from mochi_tune.errors import MochiTuneError
from mochi_tune.ui import html

GIB = 2**30
# Foretold for where the card that is here is not known.
FIRST = "4090"


@cache
def known_cards() -> list[str]:
    """Returns the GPUs whose speeds are known."""
    from mochi_tune.parallel.forecast import CARDS

    return list(CARDS)


@cache
def name_here() -> str:
    """Returns what the driver's own program calls the first GPU, "" without one: CUDA would hold memory of a run."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def likely_card() -> str:
    """Returns the card that is here, and one to begin with where it is not known."""
    from mochi_tune.parallel.forecast import CARDS, known_card

    found = known_card(name_here())
    return next((name for name, card in CARDS.items() if card is found), FIRST)


def foretell(config: RunConfig, card: str) -> str:
    """Returns the plan of a run on a card as HTML, or the one line that says why there is none."""
    from mochi_tune.parallel.forecast import in_words, known_card, short_seconds
    from mochi_tune.recipes.plan import main as plan

    try:
        made = plan(config, card or FIRST)
    except MochiTuneError as error:
        return html.note(str(error), "error")
    rows = "".join(
        f"<tr><td>{escape(stage.name)}</td><td class='number'>{stage.total / GIB:.1f}</td>"
        f"<td>{'fits' if stage.total <= made.gib * GIB else '<strong>does not fit</strong>'}</td>"
        f"<td>{'' if stage.seconds is None else f'{short_seconds(stage.seconds)} {stage.per}'}</td></tr>"
        for stage in made.stages
    )
    hours = (
        "" if made.run_seconds is None else f"; all {config.train.steps} steps in about {in_words(made.run_seconds)}"
    )
    name, unknown = name_here(), ""
    if name and known_card(name) is None:
        unknown = f"The GPU that is here, {name}, is not known: this is foretold for a {card or FIRST}."
    cache_text = f"the cache up to {made.cache_bytes / GIB:.2g} GiB, " if made.cache_bytes else ""
    return (
        f"{html.note(unknown, 'warning')}<p>{escape(made.clips)}{escape(hours)}</p>"
        "<div class='scroll'><table class='plain'><tr><th></th><th class='number'>GiB</th><th></th><th>time</th></tr>"
        f"{rows}</table></div>"
        f"<p class='quiet'>Of {made.gib:.1f} GiB. On disk: {cache_text}checkpoints "
        f"{made.checkpoint_bytes / GIB:.2g} GiB.</p>" + "".join(html.note(line) for line in made.advice)
    )
