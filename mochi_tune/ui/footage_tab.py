"""The steps before the clips, as a collapsed part of the tab Data: split films, filter and describe clips."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.ui import html
from mochi_tune.ui.confs import Form, videos_of
from mochi_tune.ui.folder import inside
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import add_job, ended_jobs
from mochi_tune.ui.jobs_bar import result_html

# Settings with a field, by verb: title, default and meaning. docs/footage.md lists all settings.
SPLIT = {
    "in": ("Films", "footage", "a film, or a folder with films and folders in it"),
    "max_seconds": ("Longest clip, seconds", "6", "longer scenes are divided; 163 frames are 5.4 s"),
    "min_seconds": ("Shortest clip, seconds", "1.25", "shorter scenes give no clip; 37 frames are 1.23 s"),
    "threshold": ("Threshold of cuts", "", "lower finds more cuts; empty: the detector's own"),
}
DETECTORS = ("adaptive", "content", "threshold")
FILTER = {
    "max_black": ("Black", "0.1", "most black frames, as a share; off: no limit, as for all of these"),
    "max_frozen": ("Frozen", "0.2", "longest run of equal frames, as a share"),
    "min_sharpness": ("Sharpness", "10", "least; about 7 to 14 is blurred, from 24 on sharp"),
    "min_motion": ("Motion", "0.3", "least difference of frames 0.1 s apart, of 255"),
    "max_border": ("Border", "4", "widest black bar, in pixels"),
    "duplicate_distance": ("Doubled", "0.1", "clips whose hashes differ in a smaller share of bits"),
}
DESCRIBE = {
    "endpoint": ("Endpoint", "http://localhost:8000/v1", "up to /v1; local: a model of transformers in a folder"),
    "model": ("Model", "", "its name at the endpoint; for local its folder"),
    "trigger": ("Trigger word", "", "put before each caption; empty: none"),
}
KEY_WORDS = (
    "OPENAI_API_KEY of the terminal in which the page was started is sent to https://api.openai.com/v1 alone, or to "
    "what OPENAI_BASE_URL names there; other endpoints are asked without a key."
)


def build_footage(folder: Path, form: SettingsForm) -> None:
    """Builds the fields and buttons of the three verbs, and the links to their results.

    Args:
        folder: folder of the page.
        form: form of the settings, which has the folder of videos.
    """
    with gr.Accordion("From footage to captioned clips: split, filter, describe", open=False, elem_id="footage"):
        gr.HTML("<h3>Split films into clips, one a scene</h3>")
        with gr.Row():
            split = _fields("split", SPLIT)
            split["detector"] = gr.Dropdown(
                DETECTORS, value="adaptive", label="Detector",
                info="threshold: the film fades to black", elem_id="split_detector", min_width=180, filterable=False,
            )  # fmt: skip
        run_split = gr.Button("Split into the folder of videos", elem_id="split")
        gr.HTML("<h3>Find clips that are not worth a caption</h3>")
        with gr.Row():
            limits = _fields("filter", FILTER)
        with gr.Row():
            run_filter = gr.Button("Filter", elem_id="filter")
            move = gr.Button("Filter, and move the flagged aside", elem_id="filter_move")
            undo = gr.Button("Move them back", elem_id="filter_undo")
        gr.HTML("<h3>Write captions for clips that have none</h3>")
        with gr.Row():
            describe = _fields("describe", DESCRIBE)
        with gr.Row():
            dry = gr.Button("Show the prompt only", elem_id="describe_dry")
            run_describe = gr.Button("Describe", elem_id="describe")
        gr.HTML(html.note(KEY_WORDS))
        said = gr.HTML(elem_id="footage_said")
        links = gr.HTML(elem_id="footage_links")

    def start(verb: str, keys: list[str], extra: dict[str, str]) -> Any:
        def started(*values: Any) -> str:
            given, form_values = values[: len(keys)], values[len(keys) :]

            def add() -> str:
                texts = dict(zip(keys, map(_text, given), strict=True)) | extra
                arguments = footage_arguments(folder, verb, videos_of(folder, form.form_of(form_values)), texts)
                job = add_job(folder, verb, arguments)
                return f"job {job.number}, {verb}, is in the queue: see below"

            return result_html(add)

        return started

    for button, verb, fields, extra in (
        (run_split, "split", split, {}),
        (run_filter, "filter", limits, {}),
        (move, "filter", limits, {"move": "true"}),
        (undo, "filter", {}, {"undo": "true"}),
        (dry, "describe", describe, {"dry_run": "true"}),
        (run_describe, "describe", describe, {}),
    ):
        inputs = [*fields.values(), *form.inputs]
        button.click(start(verb, list(fields), extra), inputs, said, show_progress="hidden")

    def refresh(shown: str, *values: Any) -> Any:
        now = links_html(folder, form.form_of(values))
        return gr.skip() if now == shown else now

    events = [form.poller.changes(footage_state), form.filled_times.change, form.fields["data.videos"].blur]
    gr.on(events, refresh, [links, *form.inputs], links, show_progress="hidden")


def _fields(verb: str, settings: Mapping[str, tuple[str, str, str]]) -> dict[str, Any]:
    return {
        key: gr.Textbox(default, label=title, info=meaning, elem_id=f"{verb}_{key}", min_width=180)
        for key, (title, default, meaning) in settings.items()
    }


def _text(value: Any) -> str:
    return str(value or "").strip()


def footage_arguments(folder: Path, verb: str, videos: str, texts: Mapping[str, str]) -> list[str]:
    """Returns the arguments of a verb. An empty field leaves the default.

    Args:
        folder: folder of the page.
        verb: split, filter or describe.
        videos: folder of videos, which split writes and the others read.
        texts: setting -> text of its field.

    Raises:
        MochiTuneError: a folder is outside of the page's folder, or a required field is empty.
    """
    inside(folder, videos)
    if verb == "split":
        if not texts["in"]:
            raise ConfigError("Films is empty: name a film, or a folder of films, in the folder of this page.")
        if not inside(folder, texts["in"]).exists():
            raise ConfigError(
                f"{texts['in']} does not exist: copy films to it, or name another folder in the folder of this page."
            )
    if verb == "describe" and not (texts["endpoint"] and texts["model"]):
        raise ConfigError("describe needs an endpoint and the name of a model there: fill in both.")
    place = {"split": "out", "filter": "videos", "describe": "videos"}[verb]
    return [*(f"{key}={text}" for key, text in texts.items() if text), f"{place}={videos}"]


def footage_state(folder: Path) -> list[Any]:
    """Returns a state of the results. The ended jobs in it stand for results in deeper folders."""
    patterns = ("*_split/scenes*", "*_filter/*.*", "*/describe.jsonl")
    files = sorted(str(path) for pattern in patterns for path in folder.glob(pattern))
    return [files, ended_jobs(folder)]


def links_html(folder: Path, form: Form) -> str:
    """Returns links to the tables and pages of the verbs, "" if there are none."""
    try:
        root = inside(folder, videos_of(folder, form))
    except MochiTuneError:
        # The form reports the error.
        return ""
    split, filtered = (root.with_name(f"{root.name}_{verb}") for verb in ("split", "filter"))
    sheets = sorted(split.glob("scenes*.png"), key=lambda path: (len(path.name), path.name))
    found = {
        "Scenes": [split / "scenes.csv", *sheets],
        "Filter": [filtered / name for name in ("filter.html", "filter.csv", "moved.csv")],
        "Captions": [root / "describe.jsonl"],
    }
    lines = []
    for title, paths in found.items():
        there = [path for path in paths if path.is_file()]
        if there:
            made = " · ".join(
                f'<a href="{html.address(folder, path)}" target="_blank" rel="noopener">{escape(path.name)}</a>'
                for path in there
            )
            lines.append(f"<p>{title}: {made}</p>")
    return "".join(lines)
