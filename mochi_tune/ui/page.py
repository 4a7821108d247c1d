"""The frame of the page: its appearance, its tabs, and the bar of jobs below them.

A tab is a file with a function `build_tab(folder, form)`, which runs inside its `gr.Tab`, and an entry of `TABS`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from mochi_tune.ui import data_tab, jobs_bar, lora_tab, sample_tab, train_tab
from mochi_tune.ui.folder import make_own_folder
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import start_runner
from mochi_tune.ui.signing import read_key

TABS: dict[str, Callable[[Path, SettingsForm], None]] = {
    "Data": data_tab.build_tab,
    "Train": train_tab.build_tab,
    "Sample": sample_tab.build_tab,
    "LoRA": lora_tab.build_tab,
}
FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
# Seconds between searches for unused uploads, and their age in seconds at which they are removed.
DELETE_CACHE = (3600, 86400)
SWITCH_THEME = """
() => {
  const dark = document.body.classList.toggle("dark");
  try { localStorage.setItem("mochi_tune_theme", dark ? "dark" : "light"); } catch {}
}
"""
# The theme that the user chose last, or the browser's.
KEPT_THEME = """
() => {
  let kept = null;
  try { kept = localStorage.getItem("mochi_tune_theme"); } catch {}
  const dark = kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.body.classList.toggle("dark", dark);
}
"""

# Files that are dropped anywhere on the page are uploaded. The browser would open them, each in a tab.
TAKE_DROPS = """
() => {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  window.addEventListener("drop", (event) => {
    const input = document.querySelector("input[type=file]");
    if (!hasFiles(event)) return;
    event.preventDefault();
    if (!input) return;
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
}
"""

# On a narrow screen notices are at the bottom, where they do not cover the tabs. Gradio does not apply `css` to them.
NOTICES = "@media (max-width: 640px) { .toast-wrap.toast-wrap { top: auto; bottom: 12px; } }"


def looks() -> dict[str, Any]:
    """Returns the theme and the style of the page, which fetch nothing from other servers."""
    theme = themes.Base(
        primary_hue=themes.colors.teal, neutral_hue=themes.colors.slate, font=FONTS, font_mono=MONO,
        text_size=themes.sizes.text_md, radius_size=themes.sizes.radius_md,
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
        input_background_fill="white", input_background_fill_dark="*neutral_800",
        input_border_width="1px", input_border_color="*neutral_300", input_border_color_dark="*neutral_600",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        button_large_text_size="*text_md", button_large_text_weight="600", button_large_padding="8px 16px",
        button_secondary_border_color="*neutral_300", button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_width="1px", block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent", block_label_border_width="0px",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
    )  # fmt: skip
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css, "head": f"<style>{NOTICES}</style>"}


def build_page(folder: Path) -> gr.Blocks:
    """Returns the page of a folder. Its state is in files, so any number of pages may be open.

    Raises:
        ConfigError: the folder or the home folder cannot be written, or the folder's disk has no file locks.
    """
    make_own_folder(folder)
    # Made now, so that a home folder that cannot be written is reported at the start.
    read_key()
    with gr.Blocks(title="mochi-tune", analytics_enabled=False, delete_cache=DELETE_CACHE, fill_width=True) as blocks:
        with gr.Row(elem_id="top"):
            gr.HTML(f"<h1>mochi-tune</h1><p class='quiet'>{_escaped(folder)}</p>", elem_id="title")
            theme = gr.Button("Light / dark", size="sm", elem_id="theme", scale=0, min_width=120)
        theme.click(None, js=SWITCH_THEME)
        # Gradio resets the theme to the browser's when it begins to draw.
        blocks.load(None, js=KEPT_THEME)
        blocks.load(None, js=TAKE_DROPS)
        form = SettingsForm(folder)
        with gr.Row(elem_id="which"):
            form.name.render()
            form.show("model")
        with gr.Tabs(elem_id="tabs"):
            for name, build_tab in TABS.items():
                with gr.Tab(name, id=name.lower()):
                    build_tab(folder, form)
        jobs_bar.build_bar(folder, form)
        form.wire(blocks)
        form.poller.wire()
        # Continues the queue after a restart of the machine.
        blocks.load(lambda: start_runner(folder), show_progress="hidden")
    for event in blocks.fns.values():
        if event.show_progress == "hidden":
            # Otherwise the browser updates the progress of all components at each step of each event, which took half
            # of the time of an open page while a run went on. A button shows no progress.
            event.show_progress_on = [theme]
    return blocks


def _escaped(folder: Path) -> str:
    from html import escape

    return escape(str(folder))
