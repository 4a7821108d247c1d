"""The tab Sample: renders prompts with adapters, and shows all videos with their settings."""

import contextlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.ui import html
from mochi_tune.ui.adapters import adapters_state, list_adapters, plain_name
from mochi_tune.ui.confs import Form, check_form, conf_of_run
from mochi_tune.ui.folder import inside, relative
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import add_job
from mochi_tune.ui.jobs_bar import saved_html
from mochi_tune.ui.renders import (
    BASE,
    SIZES,
    Grid,
    Render,
    SampleForm,
    adapters_of,
    arguments_of,
    changed_files,
    facts_of,
    find_render,
    form_of,
    list_grids,
    list_renders,
    renders_state,
    run_of,
)

NUM_CARDS = 12
NUM_GRIDS = 6
# Maximum number of adapters on the page; the command line takes any number.
NUM_ADAPTERS = 4
OWN = ("the run's own, where it has one", "")
KINDS = [("videos", "videos"), ("each beside the base", "compare"), ("grid", "grid")]
TITLES = {"num_frames": "Frames", "height": "Height", "width": "Width", "steps": "Steps"}
MEANINGS = {"num_frames": "6k+1", "height": "pixels, 16k", "width": "pixels, 16k", "steps": "time grows with it"}


class SampleFields:
    """The components of a `SampleForm`."""

    def __init__(self) -> None:
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self.prompts = gr.Textbox(
                    label="Prompt", info="one per line", lines=3, max_lines=8, elem_id="prompt",
                    placeholder="a teacup shatters on a stone floor",
                )  # fmt: skip
                self.negative = gr.Textbox(label="Negative prompt", info="what guidance leads away from", elem_id="not")
                with gr.Row():
                    self.seeds = gr.Textbox(
                        label="Seeds", info="one or several", placeholder="0, 1, 2", elem_id="seeds", min_width=110
                    )
                    self.sizes = [
                        gr.Textbox(label=TITLES[key], info=MEANINGS[key], elem_id=f"sample_{key}", min_width=110)
                        for key in SIZES
                    ]
            with gr.Column(scale=2, min_width=300):
                self.slots = [_adapter_slot(number) for number in range(NUM_ADAPTERS)]
                self.kind = gr.Radio(KINDS, value="videos", label="Render", elem_id="kind")
                with gr.Row(visible=False) as self.grid:
                    self.strengths = gr.Textbox(
                        label="Strengths of the grid", info="0 is the base", placeholder="0, 0.5, 1",
                        elem_id="strengths", min_width=130,
                    )  # fmt: skip
                    self.checkpoints = gr.Textbox(
                        label="Checkpoints of the grid", info="steps, or all", elem_id="checkpoints", min_width=130
                    )
                with gr.Accordion("Other settings of sample", open=False):
                    self.more = gr.Textbox(
                        label="one key=value per line", lines=3, max_lines=10, elem_id="sample_more",
                        placeholder="preset=balanced\nguidance=4.5",
                    )  # fmt: skip
        self.kind.change(lambda kind: gr.Row(visible=kind == "grid"), self.kind, self.grid, show_progress="hidden")
        for (_, adapter, _), (following, *_) in zip(self.slots, self.slots[1:], strict=False):
            # There is always an empty row below the last adapter.
            adapter.change(_row_after, adapter, following, show_progress="hidden")

    @property
    def inputs(self) -> list[Any]:
        """All components with a value."""
        pairs = [part for _, *pair in self.slots for part in pair]
        parts = [self.prompts, self.negative, self.seeds, *self.sizes, *pairs]
        return [*parts, self.kind, self.strengths, self.checkpoints, self.more]

    @staticmethod
    def form_of(values: Sequence[Any]) -> SampleForm:
        """Returns the form of the values of `inputs`."""
        texts = [str(value or "") for value in values]
        prompts, negative, seeds = texts[:3]
        sizes: dict[str, str] = dict(zip(SIZES, texts[3:], strict=False))
        pairs = texts[3 + len(SIZES) : -4]
        kind, strengths, checkpoints, more = texts[-4:]
        # Without a name, the strength of the first slot is that of the run's adapter.
        slots = enumerate(zip(pairs[::2], pairs[1::2], strict=True))
        adapters = tuple(slot for number, slot in slots if slot[0] or number == 0)
        assert kind in ("videos", "compare", "grid"), f"the page has no kind {kind}"
        return SampleForm(prompts, negative, seeds, sizes, adapters, kind, strengths, checkpoints, more)

    @staticmethod
    def values_of(form: SampleForm) -> list[Any]:
        """Returns the values of `inputs` for a form."""
        pairs = [*form.adapters, *[("", "1")] * max(NUM_ADAPTERS - len(form.adapters), 0)]
        sizes = [form.sizes.get(key, "") for key in SIZES]
        return [
            form.prompts, form.negative_prompt, form.seeds, *sizes, *(part for pair in pairs for part in pair),
            form.kind, form.strengths, form.checkpoints, form.more,
        ]  # fmt: skip


def _adapter_slot(number: int) -> tuple[Any, Any, Any]:
    with gr.Row(visible=number == 0, equal_height=True) as row:
        choices = [OWN, ("none: the base", BASE)] if number == 0 else [("none", "")]
        adapter = gr.Dropdown(
            choices, value="", label="Adapter" if number == 0 else f"Adapter {number + 1}", allow_custom_value=True,
            elem_id=f"adapter_{number}", scale=3, min_width=190,
        )  # fmt: skip
        strength = gr.Textbox("1", label="Strength", elem_id=f"strength_{number}", scale=1, min_width=80)
    return row, adapter, strength


def _row_after(adapter: str | None) -> Any:
    return gr.Row(visible=True) if adapter and adapter != BASE else gr.skip()


def build_tab(folder: Path, form: SettingsForm) -> None:
    """Builds the tab.

    Args:
        folder: folder of the page.
        form: form of the settings, whose conf is the one to sample with.
    """
    fields = SampleFields()
    with gr.Row(elem_classes="acts"):
        start = gr.Button("Sample", variant="primary", elem_id="sample", scale=0, min_width=160)
        gr.HTML(
            html.note("The conf is saved first, as in Train. An empty field leaves the value of the conf."),
            min_width=260,
        )
    said = gr.HTML(elem_id="sample_said")

    def sample(replaces: bool, *values: Any) -> list[Any]:
        own, settings = values[: len(fields.inputs)], values[len(fields.inputs) :]

        def add() -> str:
            conf = form.save(settings, replaces)
            asked = fields.form_of(own)
            arguments = arguments_of(folder, conf, asked)
            job = add_job(folder, "sample", arguments, f"sample {asked.prompts.strip().splitlines()[0][:60]}")
            return f"job {job.number}, {job.title}, is in the queue; its videos will be shown here"

        return saved_html(add)

    inputs = [form.replaces, *fields.inputs, *form.inputs]
    start.click(sample, inputs, [said, form.replaces], show_progress="hidden")
    _keep_choices(folder, fields, form)
    build_history(folder, fields, form, said)


def _keep_choices(folder: Path, fields: SampleFields, form: SettingsForm) -> None:
    """Adds new checkpoints to the lists of adapters."""

    def refresh(seen: list | None) -> list[Any]:
        there = [list(pair) for pair in list_adapters(folder)]
        if there == seen:
            return [gr.skip()] * (NUM_ADAPTERS + 1)
        pairs = [(title, name) for title, name in there]
        first = gr.Dropdown([OWN, ("none: the base", BASE), *pairs])
        return [first, *[gr.Dropdown([("none", ""), *pairs]) for _ in fields.slots[1:]], there]

    seen = gr.State(None)
    events = [form.poller.changes(adapters_state), form.filled_times.change]
    gr.on(events, refresh, seen, [*(slot[1] for slot in fields.slots), seen], show_progress="hidden")


class _Card:
    """The components of a video: the video with its settings, its file name, which is hidden, and its button."""

    def __init__(self) -> None:
        with gr.Column(elem_classes="card", min_width=240, visible=False) as self.column:
            self.shown = gr.HTML()
            self.again = gr.Button("Do it again", size="sm", elem_classes="again")
            self.name = gr.Textbox(elem_classes="file_name", show_label=False)

    @property
    def parts(self) -> list[Any]:
        return [self.column, self.shown, self.name]


def build_history(folder: Path, fields: SampleFields, form: SettingsForm, said: Any) -> None:
    """Builds the gallery of all videos and the links to grids, which show new ones automatically."""
    gr.HTML("<h2>Videos</h2>")
    grids = gr.HTML(elem_id="grids")
    page = gr.State(0)
    with gr.Row(elem_id="render_pager", elem_classes="pager"):
        back = gr.Button("← newer", size="sm", scale=0, min_width=90)
        where = gr.HTML(min_width=80)
        forward = gr.Button("older →", size="sm", scale=0, min_width=90)
    empty = gr.HTML(elem_id="renders_empty")
    with gr.Row(elem_classes="clips", elem_id="renders"):
        cards = [_Card() for _ in range(NUM_CARDS)]
    seen = gr.State(None)

    def draw(number: int, seen: list | None) -> list[Any]:
        renders = list_renders(folder)
        number = min(number, max(len(renders) - 1, 0) // NUM_CARDS)
        shown = [render for render in renders[number * NUM_CARDS :][:NUM_CARDS] if render.record]
        links = grids_html(folder, list_grids(folder))
        now = [number, len(renders), [(str(each.video), each.modified) for each in shown], links]
        # Drawing again would interrupt playing videos.
        if now == seen:
            return [gr.skip()] * (5 + 3 * NUM_CARDS)
        hint = "Fill in a prompt above and press Sample. Each video stays here, with the settings that made it."
        first = number * NUM_CARDS + 1
        place = f"{first} to {first + len(shown) - 1} of {len(renders)}" if shown else ""
        updates: list[Any] = ["" if shown else html.empty_state("No videos yet", hint), html.note(place)]
        updates += [links, number, now]
        for render in shown:
            updates += [gr.Column(visible=True), card_html(folder, render), relative(folder, render.video)]
        return updates + [gr.Column(visible=False), "", ""] * (NUM_CARDS - len(shown))

    def again(name: str, *settings: Any) -> list[Any]:
        try:
            render = find_render(folder, name)
            if (count := len(form_of(folder, render.record).adapters)) > NUM_ADAPTERS:
                raise ConfigError(
                    f"{render.video.name} has {count} adapters, and this page takes {NUM_ADAPTERS}: use "
                    "`mochi-tune sample` with adapter=[FILE,FILE]."
                )
            conf, words = conf_to_choose(folder, form.form_of(settings), run_of(folder, render.video))
        except MochiTuneError as error:
            return [html.note(str(error), "error"), *[gr.skip()] * (len(fields.inputs) + 1)]
        note = f"the settings of {render.video.name} are filled in{words}; it was made on the weights "
        note = html.note(note + str(render.record.get("model")), "good" if conf else "warning")
        if changed := changed_files(folder, render.record):
            note += html.note(
                f"changed since this video was made: {', '.join(changed)}: Sample renders another video, unless you "
                "choose a file with the old content, such as a checkpoint.",
                "warning",
            )
        return [note, conf or gr.skip(), *fields.values_of(form_of(folder, render.record))]

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    targets = [empty, where, grids, page, seen, *(part for card in cards for part in card.parts)]
    gr.on([form.poller.changes(renders_state), form.filled_times.change], draw, [page, seen], targets, **quiet)
    back.click(lambda number, seen: draw(max(number - 1, 0), seen), [page, seen], targets, **quiet)
    forward.click(lambda number, seen: draw(number + 1, seen), [page, seen], targets, **quiet)
    for card in cards:
        card.again.click(again, [card.name, *form.inputs], [said, form.name, *fields.inputs], **quiet)


def conf_to_choose(folder: Path, form: Form, run_dir: str) -> tuple[str, str]:
    """Returns the conf for rendering a video of a run again, "" if no conf has the run, and a message about it.

    Args:
        folder: folder of the page.
        form: the present settings, which are kept if their run folder is `run_dir`.
        run_dir: run folder of the video.
    """
    with contextlib.suppress(MochiTuneError):
        if inside(folder, check_form(folder, form).run_dir) == inside(folder, run_dir):
            return form.name, ""
    name = conf_of_run(folder, run_dir)
    if name:
        return name, f", and conf/{name}.yaml is chosen"
    return "", f", and the conf is not changed, because none here has run_dir={run_dir}"


def grids_html(folder: Path, grids: Sequence[Grid]) -> str:
    """Returns links to the pages and videos of the newest grids, "" if there are none."""
    rows = []
    for grid in grids[:NUM_GRIDS]:
        page, name = html.address(folder, grid.page), f"{Path(run_of(folder, grid.page)).name}, {grid.page.parent.name}"
        links = [f'<a href="{page}" target="_blank" rel="noopener">open its page</a>']
        if grid.video.is_file():
            links.append(f'<a href="{html.address(folder, grid.video)}&amp;download=true" download>grid.mp4</a>')
        rows.append(f"<li>{escape(name)}, {grid.num_cells} videos: {' · '.join(links)}</li>")
    more = f"<li>{len(grids) - NUM_GRIDS} older ones are in the grids folders of their runs</li>"
    rows += [more] if len(grids) > NUM_GRIDS else []
    return f'<p class="quiet">Grids</p><ul class="plain">{"".join(rows)}</ul>' if rows else ""


def card_html(folder: Path, render: Render) -> str:
    """Returns a video with its main settings, its adapters, a collapsible list of all settings, and a download link."""
    video, record = render.video, render.record
    is_still = video.suffix in (".png", ".gif", ".webp")
    address = html.address(folder, video)
    picture = f'<img src="{address}" alt="" loading="lazy">' if is_still else html.video(folder, video)
    adapters = "".join(
        f'<span class="flag">{escape(plain_name(name))} × {escape(strength)}</span>'
        for name, strength in adapters_of(folder, record)
    )
    negative = record.get("negative_prompt")
    settings = escape(json.dumps(record, indent=1, ensure_ascii=False))
    return (
        f"{picture}<h3>{escape(str(record['prompt']))}</h3>"
        f"{html.note(f'not: {negative}') if negative else ''}"
        f"<p class='facts'>{html.facts(facts_of(record))}</p>{adapters}"
        f"<details><summary>All settings</summary>"
        f'<pre class="log" tabindex="0" aria-label="all settings">{settings}</pre></details>'
        f'<a class="download" href="{address}&amp;download=true" download>Download {escape(video.suffix[1:])}</a>'
    )
