"""The fields of a LoRA's settings, which several tabs show: one form, checked by the schema as one types."""

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
    conf_path,
    list_confs,
    newest_conf,
    read_form,
    save_conf,
)
from mochi_tune.ui.news import News

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
    "train.batch_size": "Clips a batch",
    "train.caption_dropout": "Caption dropout",
    "train.checkpoint_every": "Save every … steps",
    "train.validate_every": "Validate every … steps",
    "train.sample_every": "Videos every … steps",
    "train.sample_prompts": "Prompts of the videos, one a line",
}
# As conf/base.yaml chooses.
GROUP_DEFAULTS = {"model": "mochi_1", "lora": "attention", "memory": "80gb"}
# Of the packaged files; docs/settings.md says what each sets.
GROUP_MEANINGS = {
    "model": "mochi_1: Genmo's, 480p; toy and tiny are shipped, to try everything on any machine",
    "lora": "attention: what every program reads; attention_mlp: the MLPs too, learns more and is larger",
    "memory": "what the GPU has: less memory trains slower; auto: the fastest that fits",
}


# Fields that show their default.
_TEXT_KEYS = [
    key for key in MAIN_KEYS
    if key not in (*GROUP_DEFAULTS, "train.sample_prompts") and not known_keys()[key].choices
]  # fmt: skip


class SettingsForm:
    """The components of all settings, made once and shown by `show` where a tab wants them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = gr.Dropdown(
            list_confs(folder), value=newest_conf(folder), allow_custom_value=True, label="LoRA",
            info="a name: its settings are conf/NAME.yaml", elem_id="conf", render=False,
        )  # fmt: skip
        self.fields = {key: _field(key) for key in MAIN_KEYS}
        self.more = gr.Textbox(
            label="Other settings, key=value, one a line", lines=4, max_lines=14, elem_id="more", render=False,
            placeholder="train.warmup_steps=20",
        )  # fmt: skip
        # Another value whenever the fields were filled, be it for a page that opens or for another conf.
        self.filled_times = gr.State(0)
        self.news = News(folder)
        self.replaces = gr.Checkbox(label="replace it, if conf/NAME.yaml has other settings", render=False)

    @property
    def inputs(self) -> list[Any]:
        """All components of the form, in the order in which `form_of` takes their values."""
        return [self.name, *self.fields.values(), self.more]

    def show(self, *keys: str) -> None:
        """Puts fields here."""
        for key in keys:
            self.fields[key].render()

    def form_of(self, values: tuple[Any, ...]) -> Form:
        """Returns what somebody has filled in."""
        name, *main, more = values
        texts = {key: str(value or "") for key, value in zip(self.fields, main, strict=True)}
        # Blanks alone are nothing; after words they may be meant.
        texts = {key: text if key in WORDS and text.strip() else text.strip() for key, text in texts.items()}
        if prompts := [line for line in texts["train.sample_prompts"].splitlines() if line.strip()]:
            texts["train.sample_prompts"] = f"[{', '.join(map(quote, prompts))}]"
        return Form(str(name or "").strip(), texts, str(more or ""))

    def save(self, values: tuple[Any, ...], replaces: bool) -> str:
        """Writes the conf; returns its name.

        Raises:
            MochiTuneError: as `save_conf`.
        """
        form = self.form_of(values)
        save_conf(self.folder, form, replaces)
        return form.name

    def message(self, *values: Any) -> str:
        """Returns the one line that the command line would say of the form."""
        form = self.form_of(values)
        try:
            data = check_form(self.folder, form).data
        except MochiTuneError as error:
            return html.note(str(error), "error")
        is_new = not conf_path(self.folder, form.name).exists()
        clips = f"{data.num_frames} frames, {data.width} x {data.height}"
        return html.note(
            f"Every setting fits{f', conf/{form.name}.yaml will be written' if is_new else ''}. Clips: "
            f"{'of several sizes' if data.buckets else clips}."
        )

    def filled(self, name: str) -> Iterator[Any]:
        """Yields the values of all inputs but the name: of the conf, or as they are where there is none to be read."""
        form = None
        try:
            if name and conf_path(self.folder, name).is_file():
                form = read_form(self.folder, name)
        except MochiTuneError as error:
            # It stays until it is closed; the page is drawn all the same.
            gr.Warning(html.note(str(error), "error"), duration=None)
        for key in self.fields:
            text = form.main.get(key, "") if form else None
            if key == "train.sample_prompts" and form is not None:
                text = "\n".join(form.prompts)
            yield gr.skip() if text is None else text
        yield form.more if form else gr.skip()

    def wire(self, blocks: gr.Blocks) -> None:
        """Fills the form when a conf is chosen, and when a page opens."""

        def open_page() -> Any:
            return gr.Dropdown(list_confs(self.folder), value=newest_conf(self.folder))

        def fill_and_tell(name: str, times: int) -> list[Any]:
            return [*self.filled(name), times + 1]

        groups = [self.fields[key] for key in GROUP_DEFAULTS]
        gr.on(
            [group.change for group in groups], _placeholders, groups, [self.fields[key] for key in _TEXT_KEYS],
            trigger_mode="always_last", show_progress="hidden",
        )  # fmt: skip
        targets, quiet = [*self.fields.values(), self.more, self.filled_times], "hidden"
        self.name.change(fill_and_tell, [self.name, self.filled_times], targets, show_progress=quiet)
        blocks.load(open_page, None, self.name, show_progress=quiet).then(
            fill_and_tell, [self.name, self.filled_times], targets, show_progress=quiet
        )


def _placeholders(*groups: str | None) -> list[Any]:
    """Returns the fields with what they are by default under the chosen groups, in the order of GROUP_DEFAULTS."""
    chosen = [f"{key}={name}" for key, name in zip(GROUP_DEFAULTS, groups, strict=True) if name]
    try:
        config = load_config("base", ["name=x", *chosen])
    except MochiTuneError:
        # The line below the settings says it.
        return [gr.skip()] * len(_TEXT_KEYS)
    return [gr.Textbox(placeholder=as_text(value_of(config, key))) for key in _TEXT_KEYS]


def _field(key: str) -> Any:
    # Short lists are not typed in: a box that one leaves before gradio has taken the text goes back without a word.
    shown = {"label": TITLES[key], "elem_id": key.replace(".", "_"), "render": False}
    if key in GROUP_DEFAULTS:
        files = packaged_files()[key]
        default = f"as by default: {GROUP_DEFAULTS[key]}"
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
        choices = [(f"as by default: {default}", ""), *((as_yaml(c), as_yaml(c)) for c in setting.choices)]
        return gr.Dropdown(choices, value="", info=setting.meaning, filterable=False, **shown)
    lines = {"lines": 3, "max_lines": 8} if key == "train.sample_prompts" else {}
    return gr.Textbox(info=setting.meaning, placeholder=default, **lines, **shown)


def settings_reference() -> str:
    """Returns the list of all settings with their meaning, by section, folded."""
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
