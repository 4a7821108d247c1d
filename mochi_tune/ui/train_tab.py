"""The tab Train: the main settings, the plan, start and stop, and the curves and videos of runs."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.errors import DataError, MochiTuneError
from mochi_tune.pages.charts import Line, line_chart
from mochi_tune.training.eval_files import prompt_of
from mochi_tune.ui import html, runs
from mochi_tune.ui.confs import check_form
from mochi_tune.ui.folder import inside
from mochi_tune.ui.form import SettingsForm, settings_reference
from mochi_tune.ui.jobs import add_job, ended_jobs, is_queued
from mochi_tune.ui.jobs_bar import result_html, saved_html
from mochi_tune.ui.plan import known_cards, likely_card, plan_html
from mochi_tune.ui.posters import posters
from mochi_tune.ui.rows import NUMBERS

# Styles of the lines of a chart in order: five colours, first solid, then dashed and so on. page.css has their rules.
COLOURS = ("accent", "level1", "level2", "level3", "plain")
LINE_STYLES = tuple(f"{colour}{dash}" for dash in ("", " dashed", " dotted", " dashdot") for colour in COLOURS)
PLAY_ALL = """
() => document.querySelectorAll("#samples video").forEach((v) => { v.pause(); v.currentTime = 0; v.play(); })
"""
# Files of a run that the page links to.
LINKS = {
    "report.html": "its report",
    "metrics.jsonl": "numbers of each step",
    "validation.jsonl": "numbers of each validation",
}


def build_tab(folder: Path, form: SettingsForm) -> None:
    """Builds the tab.

    Args:
        folder: of the page.
        form: the settings.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                form.show("lora", "lora.rank")
            with gr.Row():
                form.show("train.steps", "train.learning_rate", "train.batch_size")
            with gr.Row():
                form.show("memory", "train.caption_dropout")
            with gr.Row():
                form.show("train.checkpoint_every", "train.validate_every", "train.sample_every")
            form.show("train.sample_prompts")
            with gr.Accordion("All other settings", open=False):
                form.more.render()
                gr.HTML(settings_reference(), elem_id="reference", padding=True)
        with gr.Column(scale=2, min_width=300):
            card = gr.Dropdown(
                known_cards(), value=likely_card(), label="Estimate for", elem_id="card", filterable=False
            )
            plan = gr.HTML(html.note("Memory, time and disk are estimated as you type."), elem_id="plan", padding=True)
            message = gr.HTML(elem_id="train_message")
            form.replaces.render()
            with gr.Row():
                save = gr.Button("Save", elem_id="save")
                start = gr.Button("Train", variant="primary", elem_id="train")
            said = gr.HTML(elem_id="train_said")

    def check(card: str, *values: Any) -> Any:
        text = form.message(*values)
        yield text, gr.skip()
        if "note error" not in text:
            yield text, plan_html(check_form(folder, form.form_of(values)), card)

    def save_only(replaces: bool, *values: Any) -> list[Any]:
        return saved_html(lambda: f"conf/{form.save(values, replaces)}.yaml is saved")

    def train(replaces: bool, *values: Any) -> list[Any]:
        def add() -> str:
            name = form.save(values, replaces)
            check_prepared(folder, name, check_form(folder, form.form_of(values)).data.cache)
            job = add_job(folder, "train", [f"conf={name}"])
            return f"job {job.number}, {job.title}, is in the queue; a run that was stopped goes on where it was"

        return saved_html(add)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    # The plan depends on the clips, which `prepare` and other jobs change. Once saved, the conf is not new any more.
    watched = (*form.inputs, card, form.filled_times, said)
    events = [*(each.change for each in watched), form.poller.changes(ended_jobs)]
    gr.on(
        events, check, [card, *form.inputs], [message, plan],
        trigger_mode="always_last", concurrency_limit=1, **quiet,
    )  # fmt: skip
    save.click(save_only, [form.replaces, *form.inputs], [said, form.replaces], **quiet)
    start.click(train, [form.replaces, *form.inputs], [said, form.replaces], **quiet)
    build_runs(folder, form)


def check_prepared(folder: Path, conf: str, cache: str) -> None:
    """Refuses to train a conf without a cache, unless a job in the queue will make it.

    Raises:
        DataError: there is no cache.
    """
    if not (folder / cache).exists() and not is_queued(folder, "prepare", conf):
        raise DataError(f"{conf} is not prepared: press Prepare in Data.")


def build_runs(folder: Path, form: SettingsForm) -> None:
    """Builds the view of the runs. It is drawn when the page opens, and when their files have changed."""
    gr.HTML("<h2>Runs</h2>")
    with gr.Row():
        chosen = gr.Dropdown([], multiselect=True, label="Runs to compare", elem_id="runs", scale=3)
        step = gr.Dropdown([], label="Videos of step", elem_id="sample_step", scale=1, filterable=False)
    figures = gr.HTML(elem_id="figures")
    stop = gr.Button("Stop the run: it saves first", size="sm", elem_id="run_stop", visible=False)
    stop_said = gr.HTML(elem_id="run_stop_said")
    charts = gr.HTML(elem_id="charts")
    play = gr.Button("Play all from the start", size="sm", elem_id="play_all", visible=False)
    samples = gr.HTML(elem_id="samples")
    shown = gr.State({})
    outputs = [chosen, step, figures, stop, charts, samples, play, shown]

    def refresh(names: list[str] | None, wanted: int | None, shown: dict[str, Any]) -> list[Any]:
        there = runs.list_runs(folder)
        names = [name for name in names or [] if name in there] or there[:1]
        now: dict[str, Any] = {"runs": (there, names)}
        now["charts"] = charts_html(folder, names)
        now["figures"] = figures_html(folder, names)
        now["trains"] = bool(names) and runs.owner(inside(folder, names[0])) != 0
        videos = runs.list_samples(inside(folder, names[0])) if names else []
        steps = sorted({video.step for video in videos}, reverse=True)
        was_newest = not shown.get("steps") or wanted == shown["steps"][0] or wanted not in steps
        wanted = (steps[0] if steps else None) if was_newest else wanted
        now |= {"steps": steps, "wanted": wanted, "videos": [video for video in videos if video.step == wanted]}

        def changed(*keys: str) -> bool:
            return any(now[key] != shown.get(key) for key in keys)

        return [
            gr.Dropdown(there, value=names) if changed("runs") else gr.skip(),
            gr.Dropdown([(f"step {each}", each) for each in steps], value=wanted) if changed("steps") else gr.skip(),
            now["figures"] if changed("figures") else gr.skip(),
            _stop_button(names, now["trains"]) if changed("trains", "runs") else gr.skip(),
            now["charts"] if changed("charts") else gr.skip(),
            samples_html(folder, names, now["videos"]) if changed("videos", "runs") else gr.skip(),
            gr.Button(visible=bool(now["videos"])) if changed("videos") else gr.skip(),
            now,
        ]

    def ask_to_stop(shown: dict[str, Any]) -> str:
        def act() -> str:
            _, names = shown.get("runs") or ((), [])
            if not names:
                raise DataError("no run is chosen: choose the one to stop.")
            pid = runs.stop_run(inside(folder, names[0]))
            return f"{Path(names[0]).name}: process {pid} was asked to save and stop"

        return result_html(act)

    stop.click(ask_to_stop, shown, stop_said, show_progress="hidden")
    events = [form.poller.changes(runs.runs_state), form.filled_times.change, chosen.input, step.input]
    gr.on(events, refresh, [chosen, step, shown], outputs, show_progress="hidden", concurrency_limit=4)
    play.click(None, js=PLAY_ALL)


def _stop_button(names: Sequence[str], trains: bool) -> Any:
    return gr.Button(f"Stop {Path(names[0]).name}: it saves first" if trains else "Stop", visible=trains)


def charts_html(folder: Path, names: Sequence[str]) -> str:
    """Returns charts with the curves of some runs, and for a single run the validation loss by noise level."""
    points = runs.curves(folder, names)
    found = {NUMBERS[key]: (points[key], "run") for key in ("loss", "lr")}
    found["validation loss"] = (runs.validation_curves(folder, names), "line")
    found |= {NUMBERS[key]: (points[key], "run") for key in ("seconds", "memory_gib")}
    # A run has the same style in all charts, even if another run has no points in some of them.
    order = [Path(name).name for name in names] if len(names) > 1 else []
    made = [line_chart(title, _lines(rows, by, order), "step", "") for title, (rows, by) in found.items() if rows]
    return f'<div class="charts">{"".join(made)}</div>' if made else ""


def _lines(points: Sequence[dict[str, Any]], by: str, order: Sequence[str]) -> list[Line]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        lines.setdefault(point[by], []).append((point["step"], point["value"]))
    places = {name: place for place, name in enumerate(order or lines)}
    return [Line(name, LINE_STYLES[places[name] % len(LINE_STYLES)], rows) for name, rows in lines.items()]


def figures_html(folder: Path, names: Sequence[str]) -> str:
    """Returns the progress of each run."""
    if not names:
        return html.empty_state("No run yet", "Prepare the clips in Data, choose settings above, then press Train.")
    parts = []
    for name in names:
        try:
            run_dir = inside(folder, name)
        except MochiTuneError as error:
            parts.append(html.note(str(error), "error"))
            continue
        state, rows, best = runs.read_state(run_dir), runs.read_rows(run_dir / "metrics.jsonl"), runs.best_step(run_dir)
        last = rows[-1] if rows else {}
        word = "trains" if state.owner_pid else "is complete" if state.is_finished else "is stopped and can go on"
        figures = {
            "run": f"{Path(name).name} {word}",
            "step": str(state.step),
            "loss": f"{last['loss']:.4f}" if "loss" in last else "",
            "seconds a step": f"{last['seconds']:.2f}" if "seconds" in last else "",
            "best validation": f"{best[1]:.4f} at step {best[0]}" if best else "",
            "checkpoints": ", ".join(map(str, state.checkpoints[-4:])),
        }
        parts.append(
            '<dl class="figures">'
            + "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in figures.items() if value)
            + "</dl>"
        )
        links = [
            f'<a href="{html.address(folder, run_dir / file)}" target="_blank">{title}</a>'
            for file, title in LINKS.items()
            if (run_dir / file).is_file()
        ]
        parts.append(", ".join(links))
    return "".join(parts)


def samples_html(folder: Path, names: Sequence[str], videos: Sequence[runs.Sample]) -> str:
    """Returns the eval videos of a step, each with the base model on the left and the LoRA on the right."""
    if not videos:
        return html.note("Eval videos come here once train.sample_prompts names prompts.") if names else ""
    prompts = runs.prompts_of(inside(folder, names[0]))
    figures = []
    paths = [video.path for video in videos if video.path.suffix != ".png"]
    pictures = dict(zip(paths, posters(folder, paths), strict=True))
    for video in videos:
        is_still = video.path.suffix == ".png"
        picture = (
            f'<img src="{html.address(folder, video.path)}" alt="">'
            if is_still
            else html.video(folder, video.path, pictures[video.path])
        )
        prompt = prompt_of(video.path, video.prompt, prompts)
        figures.append(
            f'<figure><div class="halves"><span>base</span><span>LoRA</span></div>{picture}'
            f"<figcaption>{escape(prompt)}</figcaption></figure>"
        )
    return f'<div class="samples">{"".join(figures)}</div>'
