"""The fields of a LoRA's settings: one form, which several tabs show, and which is checked while the user types."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.config.docs import packaged_files
from mochi_tune.config.explain import as_yaml, describe_type
from mochi_tune.config.load import load_config, quote
from mochi_tune.config.settings import known_keys, sections, value_of
from mochi_tune.errors import MochiTuneError
from mochi_tune.ui import html
from mochi_tune.ui.confs import (
    MAIN_KEYS,
    WORDS,
    Form,
    as_text,
    check_form,
    conf_mistake,
    conf_path,
    list_confs,
    newest_conf,
    read_form,
    save_conf,
)
from mochi_tune.ui.polling import Poller

TITLES = {
    "model": "Model",
    "data.videos": "Folder of videos",
    "data.num_frames": "Frames of a clip",
    "data.height": "Height",
    "data.width": "Width",
    "data.caption_prefix": "Words before each caption",
    "lora": "Layers that learn",
    "lora.rank": "Rank",
    "memory": "Memory",
    "train.steps": "Steps",
    "train.learning_rate": "Learning rate",
    "train.batch_size": "Clips per batch",
    "train.caption_dropout": "Caption dropout",
    "train.checkpoint_every": "Save every … steps",
    "train.validate_every": "Validate every … steps",
    "train.sample_every": "Videos every … steps",
    "train.sample_prompts": "Prompts of the videos, one per line",
}
# Choices of conf/base.yaml.
GROUP_DEFAULTS = {"model": "mochi_1", "lora": "attention", "memory": "80gb"}
# Help texts of the groups; docs/settings.md lists the settings of each file.
GROUP_MEANINGS = {
    "model": "mochi_1: Genmo's, 480p; toy and tiny are shipped, to try everything on any machine",
    "lora": "attention: what every program reads; attention_mlp: the MLPs too, learns more and is larger",
    "memory": "what the GPU has: less memory trains slower; auto: the fastest that fits",
}


# The browser keeps the LoRA of each of its tabs, so that a reload does not choose a conf that changed later.
KEPT_NAME = """
() => {
  try { return sessionStorage.getItem("mochi_tune_lora") ?? ""; } catch { return ""; }
}
"""
KEEP_NAME = """
(name) => {
  try { sessionStorage.setItem("mochi_tune_lora", name ?? ""); } catch {}
}
"""


# Text fields, which show the default as a placeholder.
_TEXT_KEYS = [
    key for key in MAIN_KEYS
    if key not in (*GROUP_DEFAULTS, "train.sample_prompts") and not known_keys()[key].choices
]  # fmt: skip


class SettingsForm:
    """The components of all settings. `show` places them in a tab."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = gr.Dropdown(
            list_confs(folder), value=newest_conf(folder), allow_custom_value=True, label="LoRA",
            info="a name: its settings are conf/NAME.yaml", elem_id="conf", render=False,
        )  # fmt: skip
        self.fields = {key: _field(key) for key in MAIN_KEYS}
        self.more = gr.Textbox(
            label="Other settings, one key=value per line", lines=4, max_lines=14, elem_id="more", render=False,
            placeholder="train.warmup_steps=20",
        )  # fmt: skip
        # Changes whenever the fields were filled, both when a page opens and when another conf is chosen.
        self.filled_times = gr.State(0)
        # The mistake that the last notice reported: opening a page fills the fields twice.
        self.reported = gr.State("")
        self.poller = Poller(folder)
        self.replaces = gr.Checkbox(label="replace it, if conf/NAME.yaml has other settings", render=False)

    @property
    def inputs(self) -> list[Any]:
        """All components of the form, in the order of the values of `form_of`."""
        return [self.name, *self.fields.values(), self.more]

    def show(self, *keys: str) -> None:
        """Places fields at this position of the page."""
        for key in keys:
            self.fields[key].render()

    def form_of(self, values: tuple[Any, ...]) -> Form:
        """Returns the form of the values of `inputs`."""
        name, *main, more = values
        texts = {key: str(value or "") for key, value in zip(self.fields, main, strict=True)}
        # Spaces alone count as empty. After words they may be intended.
        texts = {key: text if key in WORDS and text.strip() else text.strip() for key, text in texts.items()}
        if prompts := [line for line in texts["train.sample_prompts"].splitlines() if line.strip()]:
            texts["train.sample_prompts"] = f"[{', '.join(map(quote, prompts))}]"
        return Form(str(name or "").strip(), texts, str(more or ""))

    def save(self, values: tuple[Any, ...], replaces: bool) -> str:
        """Saves the conf and returns its name.

        Raises:
            MochiTuneError: as `save_conf`.
        """
        form = self.form_of(values)
        save_conf(self.folder, form, replaces)
        return form.name

    def message(self, *values: Any) -> str:
        """Returns one line as HTML: the error that the command line would report, or that all settings fit."""
        form = self.form_of(values)
        if mistake := conf_mistake(self.folder, form.name):
            return html.note(mistake, "error")
        try:
            config = check_form(self.folder, form)
        except MochiTuneError as error:
            return html.note(str(error), "error")
        is_new = not conf_path(self.folder, form.name).exists()
        data = config.data
        clips = f"{data.num_frames} frames, {data.width} x {data.height}"
        other = ""
        if config.name != form.name:
            other = (
                f"conf/{form.name}.yaml has name={config.name}: its run folder, cache and adapter take that name. "
                f"Remove name= from the other settings to call them {form.name}."
            )
        return html.note(other, "warning") + html.note(
            f"Every setting fits{f', conf/{form.name}.yaml will be written' if is_new else ''}. Clips: "
            f"{'of several sizes' if data.buckets else clips}."
        )

    def filled(self, name: str) -> Iterator[Any]:
        """Yields the values of all inputs except the name.

        A name without a conf leaves the inputs as they are. A conf that cannot be read empties them, so that they do
        not show the settings of another LoRA.
        """
        if not self._is_there(name):
            yield from [gr.skip()] * (len(self.fields) + 1)
            return
        try:
            form = read_form(self.folder, name)
        except MochiTuneError:
            form = Form(name)
        for key in self.fields:
            yield "\n".join(form.prompts) if key == "train.sample_prompts" else form.main.get(key, "")
        yield form.more

    def _is_there(self, name: str) -> bool:
        try:
            return bool(name) and conf_path(self.folder, name).is_file()
        except MochiTuneError:
            # The line below the settings reports the name.
            return False

    def wire(self, blocks: gr.Blocks) -> None:
        """Fills the form when the user chooses a conf, and when a page opens."""

        def open_page(kept: str) -> Any:
            names = list_confs(self.folder)
            return gr.Dropdown(names, value=kept if kept in names else newest_conf(self.folder))

        def fill(name: str, times: int, reported: str) -> list[Any]:
            mistake = conf_mistake(self.folder, name) if name else ""
            if mistake and mistake != reported:
                # The notice stays until the user closes it.
                gr.Warning(html.note(mistake, "error"), duration=None)
            return [*self.filled(name), times + 1, mistake]

        groups = [self.fields[key] for key in GROUP_DEFAULTS]
        gr.on(
            [group.change for group in groups], _placeholders, groups, [self.fields[key] for key in _TEXT_KEYS],
            trigger_mode="always_last", show_progress="hidden",
        )  # fmt: skip
        inputs, quiet = [self.name, self.filled_times, self.reported], "hidden"
        targets = [*self.fields.values(), self.more, self.filled_times, self.reported]
        self.name.change(fill, inputs, targets, show_progress=quiet)
        # The tick counts for one file only. The browser clears it at once.
        self.name.change(None, None, self.replaces, js="() => false", show_progress=quiet)
        self.filled_times.change(None, self.name, js=KEEP_NAME, show_progress=quiet)
        opened = blocks.load(open_page, self.name, self.name, js=KEPT_NAME, show_progress=quiet)
        opened.then(fill, inputs, targets, show_progress=quiet)


def _placeholders(*groups: str | None) -> list[Any]:
    """Returns updates of the text fields: the defaults under the chosen groups, in the order of GROUP_DEFAULTS."""
    chosen = [f"{key}={name}" for key, name in zip(GROUP_DEFAULTS, groups, strict=True) if name]
    try:
        config = load_config("base", ["name=x", *chosen])
    except MochiTuneError:
        # The line below the settings reports the error.
        return [gr.skip()] * len(_TEXT_KEYS)
    return [gr.Textbox(placeholder=as_text(value_of(config, key))) for key in _TEXT_KEYS]


def _field(key: str) -> Any:
    # Short lists are not filterable: gradio silently drops text that the user leaves before it is processed.
    shown = {"label": TITLES[key], "elem_id": key.replace(".", "_"), "render": False}
    if key in GROUP_DEFAULTS:
        files = packaged_files()[key]
        default = f"{GROUP_DEFAULTS[key]} (default)"
        return gr.Dropdown(
            [(default, ""), *((name, name) for name in files)],
            value="",
            info=GROUP_MEANINGS[key],
            filterable=False,
            **shown,
        )
    setting = known_keys()[key]
    default = "" if key == "train.sample_prompts" else as_text(setting.default)
    if setting.choices:
        choices = [(f"{default} (default)", ""), *((as_yaml(c), as_yaml(c)) for c in setting.choices)]
        return gr.Dropdown(choices, value="", info=setting.meaning, filterable=False, **shown)
    lines = {"lines": 3, "max_lines": 8} if key == "train.sample_prompts" else {}
    return gr.Textbox(info=setting.meaning, placeholder=default, **lines, **shown)


def settings_reference() -> str:
    """Returns a collapsible list of all settings and their meanings, by section."""
    parts = []
    for section, cls in sections().items():
        rows = "".join(
            f"<tr><td><code>{escape(key)}</code></td><td>{escape(as_yaml(s.default)) if not s.is_required else ''}</td>"
            f"<td>{escape(describe_type(s))}</td><td>{escape(s.meaning)}</td></tr>"
            for key, s in known_keys().items()
            if key.rpartition(".")[0] == section
        )
        about = escape((cls.__doc__ or "").splitlines()[0])
        head = "<tr><th>setting</th><th>default</th><th>takes</th><th>meaning</th></tr>"
        parts.append(
            f"<details><summary><strong>{section or 'run'}</strong>: {about}</summary>"
            f'<div class="scroll"><table class="plain">{head}{rows}</table></div></details>'
        )
    return "".join(parts)
