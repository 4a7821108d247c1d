"""The plan next to the settings: memory, time and disk of a run, as `mochi-tune plan` estimates them."""

import shutil
import subprocess
from functools import cache
from html import escape

from mochi_tune.config.schema import RunConfig
from mochi_tune.errors import MochiTuneError
from mochi_tune.ui import html

GIB = 2**30
# GPU to estimate for if the installed one is not known.
DEFAULT_CARD = "4090"


@cache
def known_cards() -> list[str]:
    """Returns the names of the GPUs with known speeds."""
    from mochi_tune.parallel.forecast import CARDS

    return list(CARDS)


@cache
def name_here() -> str:
    """Returns the name of the first GPU by nvidia-smi, "" without a GPU. Asking CUDA would take GPU memory."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def likely_card() -> str:
    """Returns the name of the installed GPU, or DEFAULT_CARD if it is not known."""
    from mochi_tune.parallel.forecast import CARDS, known_card

    found = known_card(name_here())
    return next((name for name, card in CARDS.items() if card is found), DEFAULT_CARD)


def plan_html(config: RunConfig, card: str) -> str:
    """Returns the plan of a run on a GPU as HTML, or one line that says why there is none."""
    from mochi_tune.parallel.forecast import in_words, known_card, short_seconds
    from mochi_tune.recipes.plan import main as plan

    try:
        made = plan(config, card or DEFAULT_CARD)
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
        unknown = f"The GPU of this machine, {name}, is not known: this is an estimate for a {card or DEFAULT_CARD}."
    cache_text = f"the cache up to {made.cache_bytes / GIB:.2g} GiB, " if made.cache_bytes else ""
    return (
        f"{html.note(unknown, 'warning')}<p>{escape(made.clips)}{escape(hours)}</p>"
        "<div class='scroll'><table class='plain'><tr><td></td><th class='number'>GiB</th><td></td><th>time</th></tr>"
        f"{rows}</table></div>"
        f"<p class='quiet'>Of {made.gib:.1f} GiB. On disk: {cache_text}checkpoints "
        f"{made.checkpoint_bytes / GIB:.2g} GiB.</p>" + "".join(html.note(line) for line in made.advice)
    )
