"""The tab Data: adds clips, shows them, edits their captions, and prepares them."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mochi_tune.config.schema import DataConfig
from mochi_tune.errors import ConfigError, DataError, MochiTuneError
from mochi_tune.ui import html
from mochi_tune.ui.clips import (
    PLAYED,
    UPLOADED,
    ClipCard,
    Gallery,
    caption_path,
    changed_captions,
    list_videos,
    lonely_captions,
    read_captions,
    take_uploads,
    write_caption,
)
from mochi_tune.ui.confs import check_form, sources_note, videos_of
from mochi_tune.ui.folder import inside, relative
from mochi_tune.ui.footage_tab import build_footage
from mochi_tune.ui.form import SettingsForm
from mochi_tune.ui.jobs import add_job
from mochi_tune.ui.jobs_bar import result_html, saved_html

# Options of events whose result appears at once.
_QUIET: dict[str, Any] = {"show_progress": "hidden"}
# Number of cards on a page; each is decoded once.
NUM_CARDS = 12


def build_tab(folder: Path, form: SettingsForm) -> None:
    """Builds the tab.

    Args:
        folder: folder of the page.
        form: form of the settings; the tab shows those of the data.
    """
    with gr.Row():
        form.show("data.videos", "data.num_frames", "data.height", "data.width", "data.caption_prefix")
    with gr.Row():
        upload = gr.UploadButton(
            "Add clips and captions", file_count="multiple", file_types=list(UPLOADED), elem_id="upload"
        )
        look = gr.Button("Refresh", elem_id="look")
        inspect = gr.Button("Inspect", elem_id="inspect")
        prepare = gr.Button("Prepare", variant="primary", elem_id="prepare")
    said = gr.HTML(elem_id="data_said")
    message = gr.HTML(elem_id="data_message")
    build_footage(folder, form)
    # Changes whenever the gallery must be drawn again.
    version = gr.State(0)
    _build_changes(folder, form, said, version)
    _build_gallery(folder, form, said, version)

    def add_files(files: list[str] | None, number: int, *values: Any) -> Any:
        try:
            videos = videos_of(folder, form.form_of(values))
        except MochiTuneError as error:
            return html.note(str(error), "error"), number
        taken, refused = take_uploads(folder, videos, [Path(file) for file in files or []])
        lines = [html.note(f"added: {', '.join(taken)}", "good")] if taken else []
        lines += [
            html.note(f"{name} has no clip of its name yet: add {Path(name).stem}.mp4.", "warning")
            for name in lonely_captions(folder, videos, taken)
        ]
        return "".join([*lines, *(html.note(text, "error") for text in refused)]), number + 1

    def start(verb: str) -> Any:
        def started(replaces: bool, *values: Any) -> list[Any]:
            def add() -> str:
                name = form.save(values, replaces)
                job = add_job(folder, verb, [f"conf={name}"])
                return f"job {job.number}, {job.title}, is in the queue: see below"

            return saved_html(add)

        return started

    upload.upload(add_files, [upload, version, *form.inputs], [said, version])
    look.click(lambda number: number + 1, version, version, **_QUIET)
    for button, verb in ((prepare, "prepare"), (inspect, "inspect")):
        button.click(start(verb), [form.replaces, *form.inputs], [said, form.replaces], **_QUIET)
    own, model = [form.fields[key] for key in form.fields if key.startswith("data.")], form.fields["model"]
    # Once saved, the conf is not new any more.
    watched = (*own, model, form.more, form.name, form.filled_times, version, said)
    gr.on(
        [each.change for each in watched], form.message, form.inputs, message, trigger_mode="always_last", **_QUIET
    )  # fmt: skip
    # Another folder or size changes the cards. They are drawn when the field is left, not at every key. A model has
    # sizes of its own.
    events = [*(field.blur for field in (*own, form.more)), model.input]
    gr.on(events, lambda number: number + 1, version, version, **_QUIET)
    form.filled_times.change(lambda number: number + 1, version, version, **_QUIET)
    with gr.Accordion("The page of Inspect", open=False):
        link = gr.HTML(elem_id="inspect_link")
    gr.on(
        [version.change, inspect.click], lambda *values: inspect_link(folder, form, values), form.inputs, link, **_QUIET
    )


def _build_gallery(folder: Path, form: SettingsForm, said: Any, version: Any) -> None:
    """Builds the cards of the videos, a page of them at a time; a caption is saved when its field is left."""
    gallery, page, last = Gallery(folder), gr.State(0), gr.State(0)
    with gr.Row(elem_id="pager"):
        back = gr.Button("← before", size="sm", elem_id="page_back", scale=0, min_width=90)
        where = gr.HTML(elem_id="page_where", min_width=80)
        forward = gr.Button("next →", size="sm", elem_id="page_forward", scale=0, min_width=90)
    empty = gr.HTML(elem_id="gallery_empty")
    with gr.Row(elem_classes="clips", elem_id="gallery"):
        slots = [_Slot() for _ in range(NUM_CARDS)]

    def draw(number: int, *values: Any) -> list[Any]:
        names, drawn, values = values[:NUM_CARDS], values[NUM_CARDS : 2 * NUM_CARDS], values[2 * NUM_CARDS :]
        data, root, videos, trouble = read_videos(folder, form, values)
        first = _page(number, videos) * NUM_CARDS
        shown = videos[first:][:NUM_CARDS] if data else []
        texts = read_captions(folder, root, shown, data) if data and shown else {}
        cards = gallery.cards(root, texts, data) if data and shown else []
        updates: list[Any] = [gr.HTML(trouble, visible=bool(trouble))]
        for card, name, text in zip(cards, names, drawn, strict=False):
            updates += _drawn(folder, card, texts[card.path], (name, text))
        updates += [gr.Column(visible=False), "", "", "", ""] * (NUM_CARDS - len(cards))
        place = html.note(f"{first + 1} to {first + len(shown)} of {len(videos)}") if shown else ""
        return [*updates, place, _page(len(videos), videos)]

    for slot in slots:
        # The browser sends the name with the text, so that no caption goes to another clip.
        slot.caption.blur(
            lambda *values: save_caption(folder, *values), [slot.caption, slot.name, slot.drawn], [said, slot.drawn],
            **_QUIET,
        )  # fmt: skip
    back.click(lambda number, last: max(min(number, last) - 1, 0), [page, last], page, **_QUIET)
    forward.click(lambda number, last: min(number + 1, last), [page, last], page, **_QUIET)
    targets = [empty, *(part for slot in slots for part in slot.parts), where, last]
    gr.on(
        [page.change, version.change], draw,
        [page, *(slot.name for slot in slots), *(slot.drawn for slot in slots), *form.inputs], targets,
        trigger_mode="always_last", concurrency_limit=4, **_QUIET,
    )  # fmt: skip


def _build_changes(folder: Path, form: SettingsForm, said: Any, version: Any) -> None:
    """Builds the form that changes the captions of all videos."""
    with gr.Accordion("Change many captions at once", open=False):
        with gr.Row():
            find = gr.Textbox(label="Find", elem_id="find")
            replacement = gr.Textbox(label="Replace by", elem_id="replacement")
            prefix = gr.Textbox(label="Put before each", elem_id="prefix", placeholder="a phrase and a space")
        with gr.Row():
            count = gr.Button("How many would change?", elem_id="count_changes")
            change = gr.Button("Change them", elem_id="change_captions")

    def change_all(writes: bool) -> Any:
        def changed(find: str, replacement: str, prefix: str, number: int, *values: Any) -> Any:
            def act() -> str:
                data, root, videos, trouble = read_videos(folder, form, values)
                if data and data.sources:
                    raise ConfigError(sources_note(data))
                if trouble or data is None:
                    return "there are no clips to caption"
                new = changed_captions(read_captions(folder, root, videos, data), find, replacement, prefix)
                if writes:
                    for video, text in new.items():
                        write_caption(folder, video, text)
                return f"{len(new)} of {len(videos)} captions {'were' if writes else 'would be'} changed"

            return result_html(act), number + writes

        return changed

    many = [find, replacement, prefix, version, *form.inputs]
    count.click(change_all(False), many, [said, version], show_progress="hidden")
    change.click(change_all(True), many, [said, version], show_progress="hidden")


def _page(number: int, videos: Sequence[Path]) -> int:
    """Returns the number of the page to show, which is the last one if there are fewer pages now."""
    return min(number, max(len(videos) - 1, 0) // NUM_CARDS)


class _Slot:
    """The components of a card: picture and facts, caption, and the name of the file, which is hidden."""

    def __init__(self) -> None:
        with gr.Column(elem_classes="card", min_width=240, visible=False) as self.column:
            self.card = gr.HTML()
            self.caption = gr.Textbox(
                lines=3, max_lines=8, show_label=False, elem_classes="caption",
                placeholder="What is seen, in a sentence or two",
            )  # fmt: skip
            self.name = gr.Textbox(elem_classes="file_name", show_label=False)
            # Text of the caption when it was drawn. A file with another text was changed elsewhere.
            self.drawn = gr.Textbox(elem_classes="file_name", show_label=False, lines=2)

    @property
    def parts(self) -> list[Any]:
        return [self.column, self.card, self.caption, self.name, self.drawn]


def _drawn(folder: Path, card: ClipCard, text: str, before: tuple[str, str]) -> list[Any]:
    """Returns the updates of a slot.

    Args:
        folder: folder of the page.
        card: card to show.
        text: its caption.
        before: file and caption that the slot shows already.
    """
    name = relative(folder, card.path)
    updates: list[Any] = [gr.Column(visible=True), card_html(folder, card)]
    if before == (name, text):
        # The user may be typing there.
        return [*updates, gr.skip(), gr.skip(), gr.skip()]
    return [*updates, gr.Textbox(text, label=f"Caption of {card.name}"), name, text]


def save_caption(folder: Path, text: str, name: str, drawn: str) -> tuple[str, str]:
    """Saves the caption of a card, unless it is unchanged or the file was changed elsewhere.

    Args:
        folder: folder of the page.
        text: text of the box.
        name: path of the video in the folder; "" for an empty card.
        drawn: text of the box when it was drawn.

    Returns:
        The message as HTML, and the text to compare the next change with.
    """
    begins, text = drawn, text.strip()

    def act() -> str:
        nonlocal begins
        if not name or text == drawn.strip():
            return ""
        video = inside(folder, name)
        there = read_captions(folder, video.parent, [video], DataConfig())[video]
        # Without a file the caption is from a table; the new file takes precedence.
        if caption_path(video).is_file() and there not in (drawn.strip(), text):
            raise DataError(
                f"the caption of {video.name} was changed elsewhere meanwhile, to {there[:200]!r}, and is kept: copy "
                "your text, press Refresh, and paste it."
            )
        write_caption(folder, video, text)
        begins = text
        return f"the caption of {video.name} is saved"

    return result_html(act), begins


def read_videos(
    folder: Path, form: SettingsForm, values: tuple[Any, ...]
) -> tuple[DataConfig | None, Path, list[Path], str]:
    """Returns the settings of the data, the folder of videos, the videos, and a message as HTML if there are none."""
    filled = form.form_of(values)
    try:
        data = check_form(folder, filled).data
    except MochiTuneError as error:
        return None, folder, [], html.note(str(error), "error")
    if data.sources:
        return data, folder, [], html.note(sources_note(data), "warning")
    try:
        root = inside(folder, data.videos)
        return data, root, list_videos(folder, data.videos), ""
    except MochiTuneError as error:
        title = "No clips yet"
        hint = (
            f"Add clips with the button above, or copy them to {data.videos} and press Refresh. "
            "Three to thirty of a few seconds each are a good start; each gets a caption in a .txt file of its name."
        )
        known = html.empty_state(title, hint) if "holds no video" in str(error) or "not exist" in str(error) else ""
        return data, folder, [], known or html.note(str(error), "error")


def inspect_link(folder: Path, form: SettingsForm, values: tuple[Any, ...]) -> str:
    """Returns a link to the page of `inspect`, or how to make it."""
    try:
        path = inside(folder, Path(check_form(folder, form.form_of(values)).run_dir) / "inspect" / "inspect.html")
    except MochiTuneError as error:
        return html.note(str(error), "error")
    if not path.is_file():
        return html.note("`Inspect` makes a page of the clips as the model will see them.")
    return f'<a href="{html.address(folder, path)}" target="_blank" rel="noopener">open the page</a>'


def card_html(folder: Path, card: ClipCard) -> str:
    """Returns the picture or video, the name, the facts and the flags of a clip."""
    if card.path.suffix.lower() in PLAYED and not (card.refused and card.thumbnail is None) and card.path.exists():
        picture = html.video(folder, card.path, card.thumbnail)
    elif card.thumbnail is not None:
        picture = f'<img src="{html.address(folder, card.thumbnail)}" alt="" loading="lazy">'
    else:
        picture = '<div class="missing">no picture</div>'
    facts = " · ".join(filter(None, (card.length, card.size, card.bucket)))
    flags = "".join(f'<span class="flag {flag.weight}">{escape(flag.text)}</span>' for flag in card.flags)
    return (
        f"{picture}<h3>{escape(card.name).replace('_', '_<wbr>')}</h3><p class='facts'>{html.facts(facts)}</p>{flags}"
        f"{html.note(card.refused, 'error')}"
    )
