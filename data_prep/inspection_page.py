"""Builds the page of `mochi-tune inspect`, a single HTML file."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mochi_tune.data_prep.bar_charts import bar_chart, count_names, count_numbers
from mochi_tune.data_prep.inspection import PICTURE_SIZE, Inspection, SeenClip
from mochi_tune.data_prep.report import count_footage, describe_kept, notes
from mochi_tune.errors import counted
from mochi_tune.models.latents import FPS
from mochi_tune.models.text_encoder import MAX_TOKENS, MeasuredCaption
from mochi_tune.pages.html_page import Head, data_uri, document, scrollable, section

# Maximum characters of a caption's read and lost parts, and captions of a clip; the rest is only counted.
_MAX_CHARACTERS, _MAX_LOST_CHARACTERS, _MAX_CAPTIONS = 1500, 400, 6
# Maximum characters of a caption in the table of clips without pictures.
_MAX_TABLE_CHARACTERS = 120
_STYLE = """
:root{--warn:#a3480a}@media(prefers-color-scheme:dark){:root{--warn:#f0a35e}}
ul.advice{margin:1.6rem 0 0;padding-left:1.2rem;max-width:80ch}ul.advice li{overflow-wrap:anywhere}
.bar{fill:var(--accent)}svg text{fill:var(--soft)}
.clip{display:grid;grid-template-columns:15rem minmax(0,1fr);gap:.9rem 1.6rem;padding:1.6rem 0;
border-top:1px solid var(--rule)}
.clip h3{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:0 1rem;margin:0;overflow-wrap:anywhere}
.clip h3 span{color:var(--soft);font-weight:400}
svg.source{width:auto;height:auto;max-width:100%;max-height:12rem;margin:0;border-radius:4px}
svg.source .cut{fill:#000;fill-opacity:.55}
svg.source rect{fill:none;stroke:#ffd400;stroke-width:2;vector-effect:non-scaling-stroke}
.strip{display:flex;align-items:flex-start;gap:4px}
.strip img{display:block;flex:0 1 var(--w);width:var(--w);min-width:0;height:auto;border-radius:3px;
background:var(--rule)}
.window{display:flex;align-items:center;gap:.8rem;margin-top:.7rem;color:var(--soft);font-size:.85rem}
.window div{position:relative;flex:1 1 8rem;max-width:30rem;height:6px;border-radius:3px;background:var(--rule)}
.window i{position:absolute;top:0;bottom:0;min-width:3px;border-radius:3px;background:var(--accent)}
.caption{margin-top:.7rem;max-width:80ch;overflow-wrap:anywhere}
.caption .lost span{color:var(--warn);text-decoration:line-through}.caption small{color:var(--soft);font-size:.85rem}
.flags{display:flex;flex-wrap:wrap;gap:.3rem .4rem;margin:.7rem 0 0;padding:0;list-style:none;font-size:.8rem}
.flags li{padding:.05rem .55rem;border:1px solid var(--rule);border-radius:1rem;color:var(--soft)}
.flags .notable{color:var(--ink)}.flags .warning{color:var(--warn);border-color:currentColor}
.scroll{max-height:36rem;overflow:auto;border:1px solid var(--rule);border-radius:6px}
table{width:100%;border-collapse:collapse;font-size:.85rem;line-height:1.4}
th,td{padding:.4rem .7rem;border-top:1px solid var(--rule);text-align:left;vertical-align:top;
overflow-wrap:anywhere;min-width:6rem}
td:first-child{min-width:min(14rem,30vw)}
tr:first-child>*{border-top:0}th{color:var(--soft);font-weight:600}
@media(max-width:44rem){.clip{grid-template-columns:minmax(0,1fr)}.strip{flex-wrap:wrap}
.strip img{flex:0 1 calc((100% - 8px)/3)}}
@media print{body{padding:0}.clip,figure{break-inside:avoid}.scroll{max-height:none}}
"""


def make_page(found: Inspection, name: str, obstacle: str = "") -> str:
    """Returns the HTML of the page.

    Args:
        found: the inspection.
        name: of the run.
        obstacle: why `prepare` would not start; "" if it would.
    """
    drawn = [seen for seen in found.clips if seen.pictures]
    others = [seen for seen in found.clips if not seen.pictures]
    content = [
        _advice(found, obstacle),
        section("Numbers", _numbers_note(found), f'<div class="charts">{_charts(found)}</div>'),
    ]
    if found.refused:
        note = f"These files and clips cannot be used{'' if obstacle else '; all others can'}."
        content.append(section("Refused", note, _reasons("Refused", found.refused)))
    if found.inputs.unused:
        note = "These files of the folder are neither clips nor captions of clips."
        content.append(section("Not used", note, _reasons("Not used", found.inputs.unused)))
    if drawn:
        clips = "".join(_clip(found, seen) for seen in drawn)
        content.append(section("Clips", _clips_note(len(drawn), len(others)), clips))
    if others:
        content.append(section("More clips", "These were read and cut as well.", _table(found, others)))
    summary = (
        "What training will see: the frames after rotation, scaling and cropping, and the part of each caption that "
        "the text encoder reads. No model was involved."
    )
    return document(Head(f"{name}: the data set", summary, _figures(found)), _STYLE, "\n".join(content))


def _figures(found: Inspection) -> dict[str, tuple[str, str]]:
    rows = [seen.clip.row for seen in found.clips]
    total, used = count_footage(found.inputs, rows)
    files = {seen.clip.file.name for seen in found.clips}
    num_held = sum(seen.clip.file.source.validation for seen in found.clips)
    held = f", {num_held} for validation" if num_held else ""
    num_stills = sum(found.inputs.scans[name].is_still for name in files)
    return {
        "Clips": (str(len(rows)), f"of {len(files)} of {counted(len(found.inputs.files), 'file')}{held}"),
        "Footage used": (f"{used / total:.0%}" if total else "–", f"{_duration(used)} of {_duration(total)}"),
        "Stills": (str(num_stills), "pictures, clips of one frame"),
        "Buckets": (str(len({row.bucket for row in rows})), "sizes that the clips have"),
        "Refused": (str(len(found.refused)), "files or clips, listed with the reason"),
        "Not used": (str(len(found.inputs.unused)), "other files of the folder"),
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _advice(found: Inspection, obstacle: str) -> str:
    """Returns the obstacle and the notes of `prepare`, without those about clips that the page lists."""
    records = [
        describe_kept(seen.clip.row, seen.report, sum(caption.lost_tokens for caption in _captions(found, seen)))
        for seen in found.clips
    ]
    lines = notes(records, found.inputs, [seen.clip.row for seen in found.clips])
    items = "".join(f"<li>{escape(line)}</li>" for line in filter(None, [obstacle, *lines]))
    return f'<ul class="advice">{items}</ul>' if items else ""


def _captions(found: Inspection, seen: SeenClip) -> list[MeasuredCaption]:
    return [found.captions[text] for text in seen.clip.row.captions]


def _has_tokens(found: Inspection) -> bool:
    return any(caption.num_tokens is not None for caption in found.captions.values())


def _numbers_note(found: Inspection) -> str:
    if _has_tokens(found):
        return f"The text encoder reads {MAX_TOKENS} tokens of a caption; the rest is struck out below."
    return (
        "The number of tokens of the captions is unknown, as the text encoder's tokenizer is missing: "
        "`mochi-tune weights pull` downloads it."
    )


def _charts(found: Inspection) -> str:
    scans = [found.inputs.scans[name] for name in dict.fromkeys(seen.clip.file.name for seen in found.clips)]
    videos = [scan for scan in scans if not scan.is_still]
    captions = [caption for seen in found.clips for caption in _captions(found, seen)]
    if _has_tokens(found):
        lengths = bar_chart("Captions, tokens", count_numbers(caption.num_tokens or 0 for caption in captions))
    else:
        lengths = bar_chart("Captions, words", count_numbers(len(caption.text.split()) for caption in captions))
    buckets = sorted(seen.clip.row.bucket for seen in found.clips)
    sizes = (f"{scan.width}x{scan.height} ({scan.width / scan.height:.2f} : 1)" for scan in scans)
    return (
        bar_chart("Clips of each bucket (height x width)", count_names(map(str, buckets)))
        + bar_chart("Files by size (width x height)", count_names(sizes))
        + bar_chart("Videos, seconds", count_numbers(round(scan.source_seconds, 1) for scan in videos))
        + bar_chart("Videos, frames per second", count_numbers(round(scan.source_fps, 2) for scan in videos))
        + lengths
    )


def _clips_note(num_drawn: int, num_others: int) -> str:
    what = (
        "The first picture of each is its first frame as the file has it, with the crop; the others are frames as the "
        "model gets them, the first and the last one among them."
    )
    if not num_others:
        return what
    return (
        f"{num_drawn} of {num_drawn + num_others} clips, those with flags first; the others are in the "
        f"table below. {what}"
    )


def _clip(found: Inspection, seen: SeenClip) -> str:
    row, report = seen.clip.row, seen.report
    still = found.inputs.scans[seen.clip.file.name].is_still
    rate = "still" if still else f"{report['source_seconds']:.2f} s at {report['source_fps']:.4g} fps"
    size = f"{report['source_width']} wide, {report['source_height']} high"
    width = PICTURE_SIZE * min(row.bucket.width / row.bucket.height, 1)
    pictures = "".join(
        f'<img alt="" width="{row.bucket.width}" height="{row.bucket.height}" src="{data_uri("image/jpeg", picture)}">'
        for picture in seen.pictures
    )
    captions = _captions(found, seen)
    texts = "".join(_caption(caption) for caption in captions[:_MAX_CAPTIONS])
    if len(captions) > _MAX_CAPTIONS:
        texts += f'<p class="caption"><small>and {len(captions) - _MAX_CAPTIONS} more captions</small></p>'
    return (
        f'<article class="clip"><h3><bdi>{escape(row.sample_id)}</bdi> <span>{row.bucket}</span></h3>'
        f"<figure>{_source(seen)}<figcaption>{size}<br>{rate}</figcaption>"
        f'</figure><div><div class="strip" style="--w:{width:.0f}px">{pictures}</div>{_window(found, seen)}{texts}'
        f"{_flags(seen)}</div></article>\n"
    )


def _source(seen: SeenClip) -> str:
    """Returns an SVG of the source's frame with the cropped parts darkened; its units are pixels of the source."""
    width, height = seen.report["source_width"], seen.report["source_height"]
    left, top, kept_width, kept_height = seen.report["crop"]
    share = 240 / max(width, height)
    return (
        f'<svg class="source" width="{width * share:.0f}" height="{height * share:.0f}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="the source and its crop">'
        f'<image width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="{data_uri("image/jpeg", seen.source)}"/>'
        f'<path class="cut" fill-rule="evenodd" d="M0 0H{width}V{height}H0ZM{left} {top}h{kept_width}v{kept_height}'
        f'h-{kept_width}Z"/><rect x="{left}" y="{top}" width="{kept_width}" height="{kept_height}"/></svg>'
    )


def window_seconds(found: Inspection, seen: SeenClip) -> tuple[float, float]:
    """Returns the begin and end of a clip in its video, in seconds from the video's first picture."""
    scan, cut = found.inputs.scans[seen.clip.file.name], seen.clip.cut
    begin = max(seen.report["start_seconds"] - scan.start_seconds, 0.0)
    length = cut.num_frames / (scan.source_fps if cut.frame_rate == "retime" else FPS)
    return begin, min(begin + length, scan.source_seconds)


def _window(found: Inspection, seen: SeenClip) -> str:
    scan = found.inputs.scans[seen.clip.file.name]
    if scan.is_still:
        return ""
    begin, end = window_seconds(found, seen)
    left, width = 100 * begin / scan.source_seconds, 100 * (end - begin) / scan.source_seconds
    return (
        f'<div class="window"><div><i style="left:{left:.2f}%;width:{width:.2f}%"></i></div>'
        f"<span>{begin:.2f} – {end:.2f} s</span></div>"
    )


def _caption(caption: MeasuredCaption) -> str:
    read, lost = caption.text[: caption.num_read], caption.text[caption.num_read :]
    # <bdi> isolates text from right to left and direction overrides.
    text = f"<bdi>{_shortened(read, _MAX_CHARACTERS)}</bdi>" if read else "<i>no caption</i>"
    if lost:
        text += f'<bdi class="lost">{_shortened(lost, _MAX_LOST_CHARACTERS)}</bdi>'
    about = ""
    if caption.num_tokens is not None:
        about = f" <small>({caption.num_tokens} tokens)</small>"
    if caption.lost_tokens:
        about = f" <small>({caption.num_tokens} tokens, {caption.lost_tokens} of them cut off)</small>"
    return f'<p class="caption">{text}{about}</p>'


def _shortened(text: str, most: int) -> str:
    more = f" <small>… and {len(text) - most} more characters</small>" if len(text) > most else ""
    return f"<span>{escape(text[:most])}</span>{more}"


def _flags(seen: SeenClip) -> str:
    items = "".join(f'<li class="{flag.weight}">{escape(flag.text)}</li>' for flag in seen.flags)
    return f'<ul class="flags">{items}</ul>' if items else ""


def _reasons(label: str, reasons: Mapping[str, str]) -> str:
    return _as_table(label, ("file or clip", "why"), sorted(reasons.items()))


def _table(found: Inspection, clips: Iterable[SeenClip]) -> str:
    rows = []
    for seen in clips:
        begin, end = window_seconds(found, seen)
        caption = seen.clip.row.captions[0]
        text = caption[:_MAX_TABLE_CHARACTERS] + ("…" if len(caption) > _MAX_TABLE_CHARACTERS else "")
        flags = ", ".join(flag.text for flag in seen.flags)
        rows.append((seen.clip.row.sample_id, str(seen.clip.row.bucket), f"{begin:.2f} – {end:.2f}", text, flags))
    return _as_table("More clips", ("clip", "bucket", "seconds", "caption", "flags"), rows)


def _as_table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td><bdi>{escape(cell)}</bdi></td>' for cell in row)}</tr>" for row in rows)
    return scrollable(label, f"<table><tr>{names}</tr>{body}</table>")
