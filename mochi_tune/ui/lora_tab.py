"""The tab LoRA: inspects, exports, resizes, merges and publishes adapters."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.adapters.files import FORMATS
from mochi_tune.errors import ConfigError, MochiTuneError
from mochi_tune.ui import html
from mochi_tune.ui.adapters import (
    HUB,
    MADE_FOLDER,
    Push,
    adapters_state,
    check_adapter,
    export_arguments,
    inspect_page,
    list_adapters,
    merge_arguments,
    resize_arguments,
)
from mochi_tune.ui.folder import inside
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import add_job
from mochi_tune.ui.jobs_bar import result_html

DTYPES = ["fp32", "bf16", "fp16"]
# Format -> the programs that read it.
READERS = {
    "diffusers": "diffusers",
    "comfyui": "ComfyUI",
    "kohya": "kohya: ComfyUI and tools of kohya's files",
    "official": "official: genmoai/mochi, attention alone",
    "native": "native: mochi-tune",
}
QUIET: dict[str, Any] = {"show_progress": "hidden"}


def build_tab(folder: Path, form: SettingsForm) -> None:
    """Builds the tab.

    Args:
        folder: folder of the page.
        form: form of the settings, whose events say when the page opens and when adapters change.
    """
    with gr.Row(elem_id="lora_top", equal_height=False):
        adapter = gr.Dropdown(
            [], label="Adapter", info="of the runs, or copied to loras/", allow_custom_value=True, elem_id="lora_file",
            scale=4, min_width=240,
        )  # fmt: skip
        with gr.Column(scale=1, min_width=150, elem_id="lora_inspect_side"):
            inspect = gr.Button("Inspect", elem_id="lora_inspect")
    said = gr.HTML(elem_id="lora_said")
    shown = gr.HTML(elem_id="lora_page")
    with gr.Row(equal_height=False, elem_classes="panels"):
        with gr.Column(elem_classes="panel", min_width=300):
            _build_export(folder, adapter, said)
        with gr.Column(elem_classes="panel", min_width=300):
            _build_resize(folder, adapter, said)
    with gr.Row(equal_height=False, elem_classes="panels"):
        with gr.Column(elem_classes="panel", min_width=300):
            merged = _build_merge(folder, said)
        with gr.Column(elem_classes="panel", min_width=300):
            _build_push(folder, adapter, said)
    gr.HTML("<h2>Made here</h2>")
    made = gr.HTML(elem_id="lora_made")

    def refresh(name: str | None, seen: list | None) -> list[Any]:
        there = [list(pair) for pair in list_adapters(folder)]
        page, files = page_html(folder, name or ""), made_html(folder)
        now = [there, page, files]
        old = seen or [None, None, None]
        lists: list[Any] = [gr.skip(), gr.skip()]
        if there != old[0]:
            pairs = [(title, path) for title, path in there]
            first = name or (there[0][1] if there else None)
            lists = [gr.Dropdown(pairs, value=first), gr.Dropdown(pairs)]
        return [
            *lists, *(new if new != before else gr.skip() for new, before in zip(now[1:], old[1:], strict=True)), now
        ]  # fmt: skip

    def start_inspect(name: str | None) -> str:
        return result_html(lambda: _inspect(folder, name or ""))

    seen = gr.State(None)
    events = [form.poller.changes(adapters_state), adapter.change, form.filled_times.change]
    gr.on(events, refresh, [adapter, seen], [adapter, merged, shown, made, seen], **QUIET)
    inspect.click(start_inspect, adapter, said, **QUIET)


def _queue(folder: Path, verb: str, make: Callable[[], Sequence[str]]) -> str:
    """Adds a job, and returns a message or the error in one line."""

    def add() -> str:
        arguments = list(make())
        out = next(each.removeprefix("out=") for each in arguments if each.startswith("out="))
        return f"job {add_job(folder, verb, arguments).number} is in the queue: it writes {out}"

    return result_html(add)


def _inspect(folder: Path, name: str) -> str:
    file = check_adapter(folder, name)
    if file.startswith(HUB):
        raise ConfigError(f"{file} is not a file of this folder: export it as native, and inspect that.")
    page = inspect_page(folder, file)
    if inside(folder, page).is_file():
        return "its page is shown below already"
    inside(folder, page).parent.mkdir(parents=True, exist_ok=True)
    job = add_job(folder, "lora", ["inspect", file, f"out={page}"])
    return f"job {job.number} makes its page, which appears below"


def _limits(prefix: str) -> tuple[Any, Any]:
    with gr.Row():
        rank = gr.Textbox(label="Rank", info="at most", elem_id=f"{prefix}_rank", min_width=110)
        energy = gr.Textbox(
            label="or energy", info="share to keep", placeholder="0.99", elem_id=f"{prefix}_energy", min_width=110
        )
    return rank, energy


def _new_file(prefix: str) -> Any:
    info = f"empty: a new name in {MADE_FOLDER}/"
    return gr.Textbox(label="New file", info=info, placeholder="NAME.safetensors", elem_id=f"{prefix}_out")


def _numbers(prefix: str) -> Any:
    elem_id = f"{prefix}_dtype"
    return gr.Dropdown(DTYPES, value="fp32", label="Numbers", elem_id=elem_id, scale=1, min_width=100, filterable=False)


def _build_export(folder: Path, adapter: Any, said: Any) -> None:
    gr.HTML("<h2>Export</h2>" + html.note("The same change of the weights, in the layout of another program."))
    with gr.Row():
        choices = [(READERS.get(to, to), to) for to in FORMATS]
        to = gr.Dropdown(
            choices, value="diffusers", label="For", elem_id="export_to", scale=2, min_width=150, filterable=False
        )
        dtype = _numbers("export")
    out = _new_file("export")
    button = gr.Button("Export", variant="primary", elem_id="export")

    def act(name: str | None, to: str, dtype: str, out: str) -> str:
        return _queue(folder, "export", lambda: export_arguments(folder, name or "", to, dtype, out))

    button.click(act, [adapter, to, dtype, out], said, **QUIET)


def _build_resize(folder: Path, adapter: Any, said: Any) -> None:
    gr.HTML("<h2>Resize</h2>" + html.note("A lower rank: the nearest adapter of that size, with its error in the log."))
    limits = _limits("resize")
    out = _new_file("resize")
    button = gr.Button("Resize", elem_id="resize")

    def act(name: str | None, rank: str, energy: str, out: str) -> str:
        return _queue(folder, "lora", lambda: resize_arguments(folder, name or "", (rank, energy), out))

    button.click(act, [adapter, *limits, out], said, **QUIET)


def _build_merge(folder: Path, said: Any) -> Any:
    gr.HTML("<h2>Merge</h2>" + html.note("The sum of adapters as one. Without a rank or an energy it is exact."))
    files = gr.Dropdown([], multiselect=True, label="Adapters", info="two or more", elem_id="merge_files")
    strengths = gr.Textbox(
        label="Strengths", info="one for each; empty: 1", placeholder="0.8, 0.5", elem_id="merge_strengths"
    )
    limits = _limits("merge")
    out = _new_file("merge")
    button = gr.Button("Merge", elem_id="merge")

    def act(names: list[str] | None, strengths: str, rank: str, energy: str, out: str) -> str:
        return _queue(folder, "lora", lambda: merge_arguments(folder, names or [], strengths, (rank, energy), out))

    button.click(act, [files, strengths, *limits, out], said, **QUIET)
    return files


def _build_push(folder: Path, adapter: Any, said: Any) -> None:
    gr.HTML("<h2>Push</h2>" + html.note("To the Hugging Face hub, with a model card. The login is that of `hf auth`."))
    repo = gr.Textbox(label="Repository", placeholder="owner/name", elem_id="push_repo")
    with gr.Row():
        formats = gr.Dropdown(
            list(FORMATS), value=["diffusers"], multiselect=True, label="For", elem_id="push_to", scale=2, min_width=150
        )
        dtype = _numbers("push")
    with gr.Row():
        license = gr.Textbox(label="License", placeholder="that of the adapter", elem_id="license", min_width=120)
        trigger = gr.Textbox(label="Trigger", placeholder="that of the adapter", elem_id="trigger", min_width=120)
    private = gr.Checkbox(True, label="private, if the repository is new", elem_id="push_private")
    preview = gr.HTML(elem_id="push_preview")
    with gr.Row():
        dry = gr.Button("Make the folder only", elem_id="push_dry", min_width=140)
        push = gr.Button("Push", elem_id="push", min_width=100)
    inputs = [adapter, repo, formats, dtype, private, license, trigger]

    def asked(values: tuple[Any, ...]) -> Push:
        name, repo, formats, dtype, private, license, trigger = values
        return Push(name or "", repo or "", tuple(formats or ()), dtype, bool(private), license or "", trigger or "")

    def start(is_dry: bool) -> Any:
        def act(*values: Any) -> str:
            def make() -> list[str]:
                arguments = asked(values).arguments(folder, is_dry)
                if not is_dry:
                    from mochi_tune.weights.push import check_login

                    check_login("push", asked(values).repo.strip())
                return arguments

            return _queue(folder, "export", make)

        return act

    dry.click(start(True), inputs, said, **QUIET)
    push.click(start(False), inputs, said, **QUIET)
    gr.on(
        [each.change for each in inputs], lambda *values: push_html(folder, asked(values)), inputs, preview,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip


def push_html(folder: Path, push: Push) -> str:
    """Returns a description of what an upload would send, or the error."""
    if not push.repo.strip():
        return html.note("Nothing is sent before you press Push. Name a repository to see here what would be sent.")
    try:
        lines = push.explain(folder)
    except MochiTuneError as error:
        return html.note(str(error), "error")
    return f"<ul class='plain'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def page_html(folder: Path, name: str) -> str:
    """Returns the page of `lora inspect` on an adapter, or how to make it."""
    if not name:
        hint = "Train one, or copy a .safetensors file to loras/. It shows up here by itself."
        return "" if list_adapters(folder) else html.empty_state("No adapter yet", hint)
    try:
        page = inside(folder, inspect_page(folder, check_adapter(folder, name)))
    except (MochiTuneError, OSError):
        return html.note(f"{name} is not a file of this folder; Export and Push fetch hub:OWNER/NAME.")
    if not page.is_file():
        return html.note("`Inspect` makes a page of its ranks, norms and metadata.")
    address = html.address(folder, page)
    return (
        f'<iframe class="page" sandbox="allow-scripts" title="what the adapter holds" src="{address}"></iframe>'
        f'<a href="{address}" target="_blank" rel="noopener">open it in a new tab</a>'
    )


def made_html(folder: Path) -> str:
    """Returns the files of `loras/` with their sizes and download links, and the folders prepared for the hub."""
    root = folder / MADE_FOLDER
    files = sorted((p for p in root.glob("*.safetensors") if p.is_file()), key=lambda p: -p.stat().st_mtime)
    cards = sorted(root.glob("hub/*/README.md"), key=lambda p: -p.stat().st_mtime)
    if not files and not cards:
        return html.empty_state("Nothing yet", "Files of Export, Resize and Merge will be listed here for download.")
    rows = [
        f"<tr><td>{escape(path.name).replace('_', '_<wbr>')}</td>"
        f"<td class='number'>{path.stat().st_size / 2**20:.1f} MiB</td>"
        f"<td><a href='{html.address(folder, path)}&amp;download=true' download>download</a></td></tr>"
        for path in files
    ]
    rows += [
        f"<tr><td>{escape(str(card.parent.relative_to(folder)))}, to be sent</td><td></td>"
        f"<td>{len([p for p in card.parent.rglob('*') if p.is_file()])} files</td></tr>"
        for card in cards
    ]
    return f'<div class="scroll"><table class="plain">{"".join(rows)}</table></div>'
