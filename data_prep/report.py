"""The report of a `prepare`: a row for every input, and the lines that a user should not have to look for."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Literal

from mochi_tune.config.schema import DataConfig
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.data.rows import Row
from mochi_tune.data_prep.clips import Cut
from mochi_tune.data_prep.finding import MADE_HERE, STILL
from mochi_tune.data_prep.gather import NO_VIDEO, Clip, Inputs, MediaFile
from mochi_tune.data_prep.windows import choose_cuts, num_used_frames
from mochi_tune.errors import counted, printable, some
from mochi_tune.models.latents import FPS, TEMPORAL_FACTOR
from mochi_tune.models.text_encoder import MAX_TOKENS

COLUMNS: tuple[str, ...] = (
    "clip", "status", "reason", "caption", "caption_tokens", "lost_tokens", "lost_text", "bucket", "start_seconds",
    "scale", "crop", "lost_picture", "source_width", "source_height", "source_frames", "source_seconds", "source_fps",
    "frame_rate", "distinct_frames", "rotation", "is_mirrored", "pixel_aspect", "deinterlaced", "hdr", "color_matrix",
    "decoder",
)  # fmt: skip
# Between the captions of a clip that has several.
BETWEEN_CAPTIONS = " | "
# A clip that loses more of its picture is told.
MUCH_PICTURE = 1 / 3
# A line shows this many characters of what is cut off; the table shows all.
MAX_TAIL = 60
# A folder `5_ohwx`, and what is below it; four digits are a year.
_REPEATS = re.compile(r"(\d{1,3})_[^/]*/", re.ASCII)
# Footage that is not used is told above this share of all.
MUCH_FOOTAGE = 0.1


def make_records(
    cache: CacheWriter, inputs: Inputs, kept: Sequence[Row], bad: Mapping[str, str], tails: Mapping[str, str]
) -> list[dict]:
    """Returns a record for each clip, each refused file and each file that was not taken, sorted by name.

    Args:
        cache: with all that was encoded.
        inputs: of the run.
        kept: rows of the clips that are in the cache.
        bad: why clips are refused, by their sample_id.
        tails: what is lost of captions that are longer than the text encoder reads, by caption.
    """
    names = {row.sample_id for row in kept}
    records = []
    for clip in inputs.clips:
        row = clip.row
        record: dict[str, Any] = {"clip": row.sample_id, "caption": BETWEEN_CAPTIONS.join(row.captions)}
        record |= {"status": "refused", "reason": bad.get(row.sample_id, "")}
        if row.sample_id in names:
            counts = [cache.token_counts(key) for key in row.text_keys]
            lost = sum(tokens - kept for kept, tokens in counts)
            record |= {"caption_tokens": sum(tokens for _, tokens in counts)}
            record["lost_text"] = BETWEEN_CAPTIONS.join(tails[text] for text in row.captions if text in tails)
            record |= describe_kept(row, cache.clip_report(row.clip_key), lost)
        records.append(record)
    for name, reason in inputs.refused.items():
        captions = BETWEEN_CAPTIONS.join(inputs.files[name].captions)
        records.append({"clip": name, "status": "refused", "reason": reason, "caption": captions})
    records += [{"clip": name, "status": "unused", "reason": reason} for name, reason in inputs.unused.items()]
    return sorted(records, key=lambda record: record["clip"])


def describe_kept(row: Row, report: Mapping[str, Any], lost_tokens: int) -> dict[str, Any]:
    """Returns what a record of a kept clip holds besides its captions.

    Args:
        row: of the clip.
        report: of its decoding.
        lost_tokens: of all its captions.
    """
    return dict(report) | {
        "clip": row.sample_id,
        "status": "kept",
        "lost_tokens": lost_tokens,
        "bucket": str(row.bucket),
        "crop": json.dumps(report["crop"]),
        "lost_picture": lost_picture(report),
    }


def lost_picture(report: Mapping[str, Any]) -> float:
    """Returns the share of the source's picture that the crop of a clip leaves out."""
    _, _, width, height = report["crop"]
    whole = report["source_width"] * report["source_height"]
    return round(max(1 - width * height / whole, 0), 4)


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of report.csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def notes(records: Sequence[Mapping[str, Any]], inputs: Inputs, kept: Sequence[Row]) -> list[str]:
    """Returns what was refused, cut off and left out, each with the setting that would change it."""
    lines = [f"refused: {record['reason']}" for record in records if record["status"] == "refused"]
    clips = [record for record in records if record["status"] == "kept"]
    if cut := [_cut(record) for record in clips if record["lost_tokens"]]:
        lines.append(f"captions cut to {MAX_TOKENS} tokens: {some(cut)}")
    lost = {record["clip"]: record["lost_picture"] for record in clips if record["lost_picture"] > MUCH_PICTURE}
    if lost:
        names = some(f"{name} by {share:.0%}" for name, share in lost.items())
        lines.append(
            f"more than a third of the picture is lost in {counted(len(lost), 'clip')}: {names}; {_wider(inputs)}"
        )
    lines += _repeated(clips, inputs)
    lines += _unused_footage(inputs, kept)
    lines += _draws(inputs, kept)
    lines += _repeats_in_names(inputs)
    return [printable(line) for line in lines] + not_taken(inputs)


def not_taken(inputs: Inputs) -> list[str]:
    """Returns what lies in the folders and is not taken; captions without a video are told before."""
    lines = []
    if made := sorted(" is ".join(why.rsplit(": is ", 1)) for why in inputs.unused.values() if why.endswith(MADE_HERE)):
        lines.append(f"not taken: {some(made)}")
    if stills := sorted(name for name, why in inputs.unused.items() if why.endswith(STILL)):
        takes = "data.buckets=auto, or a bucket of one frame, takes them"
        lines.append(f"not taken: {counted(len(stills), 'still')} ({some(stills)}): {takes}")
    known = (NO_VIDEO, STILL, *MADE_HERE)
    if others := sorted(name for name, why in inputs.unused.items() if not why.endswith(known)):
        lines.append(f"not taken: {counted(len(others), 'file')} ({some(others)})")
    return [printable(line) for line in lines]


def _cut(record: Mapping[str, Any]) -> str:
    tail = record.get("lost_text", "")
    lost = f" ({tail if len(tail) <= MAX_TAIL else tail[:MAX_TAIL] + '...'!r} is lost)" if tail else ""
    return f"{record['clip']} by {record['lost_tokens']}{lost}"


def _wider(inputs: Inputs) -> str:
    buckets = {bucket for file in inputs.files.values() for bucket in file.source.buckets}
    if len(buckets) == 1:
        return "data.buckets=auto gives each shape a size of its own"
    return "a bucket of their shape in data.buckets would keep it"


def _repeated(records: Sequence[Mapping[str, Any]], inputs: Inputs) -> list[str]:
    """Tells of clips that show a picture twice, by file, with the pictures of the worst; stills have but one."""
    files = {clip.row.sample_id: clip.file.name for clip in inputs.clips}
    worst: dict[str, tuple[int, int]] = {}
    num_clips = 0
    for record in records:
        distinct, length = record["distinct_frames"], int(record["bucket"].split()[0])
        if 1 < length > distinct:
            num_clips += 1
            name = files[record["clip"]]
            worst[name] = min(worst.get(name, (distinct, length)), (distinct, length), key=_share_seen)
    if not worst:
        return []
    names = some(f"{name} {distinct} in {length}" for name, (distinct, length) in worst.items())
    return [
        f"clips with repeated frames: {num_clips}, of {counted(len(worst), 'file')} (pictures in frames: {names}); "
        "data.frame_rate=retime would play each picture once, at another speed"
    ]


def _share_seen(pictures: tuple[int, int]) -> float:
    return pictures[0] / pictures[1]


def _draws(inputs: Inputs, kept: Sequence[Row]) -> list[str]:
    """Tells what an epoch takes of each source, where some are taken more often than others."""
    sources = {file.source.name: file.source for file in inputs.files.values()}.values()
    if all(source.repeats == 1 and source.weight is None for source in sources):
        return []
    clips = Counter(row.source for row in kept)
    present = [source for source in sources if clips[source.name]]
    if any(source.weight is not None for source in present):
        total = sum(source.weight or 0 for source in present)
        shares = [f"{(source.weight or 0) / total:.0%} from {source.name} ({clips[source.name]})" for source in present]
        return [f"by the weights of data.sources, of the clips drawn come {', '.join(shares)}"]
    times = [f"{source.repeats:g} x {clips[source.name]} of {source.name}" for source in present]
    return [f"by the repeats of data.sources, an epoch takes the clips {', '.join(times)}"]


def _repeats_in_names(inputs: Inputs) -> list[str]:
    """Tells where all clips of a source lie in folders named as kohya's scripts read repeats from, `5_ohwx`."""
    by_source: dict[str, list[MediaFile]] = {}
    for file in inputs.files.values():
        by_source.setdefault(file.source.name, []).append(file)
    lost: dict[str, None] = {}
    for files in by_source.values():
        source, named = files[0].source, [_REPEATS.match(file.relative) for file in files]
        if all(named) and source.repeats == 1 and source.weight is None:
            # 1_NAME is what happens anyway.
            lost |= dict.fromkeys(each[0].rstrip("/") for each in named if each and int(each[1]) != 1)
    if not lost:
        return []
    names = f"folder names such as {next(iter(lost))} are not read as repeats"
    return [f"{names}: give each folder in data.sources its repeats"]


def _unused_footage(inputs: Inputs, kept: Sequence[Row]) -> list[str]:
    total, used = count_footage(inputs, kept)
    if total - used <= MUCH_FOOTAGE * total:
        return []
    uncut, rests, most = (_left_by_source(inputs, kept, group) for group in ("uncut", "rest", "most"))
    sources = {file.source.name: file.source for file in inputs.files.values()}
    changes = []
    if uncut:
        changes.append(f"{_cut_all(inputs, uncut)} cuts {_amount(uncut, total - used) or 'all of '}it")
    if most:
        amount = _amount(most, total - used)
        changes.append(f"data.max_clips={inputs.max_clips} leaves {amount}it out, a higher one cuts more")
    if rests:
        # Other ways to cut clips cut no rests.
        others = [name for name in rests if sources[name].clips != "all" and name not in uncut]
        # A bucket for the rests, beside the size that the clips have.
        advice = [sources[name].shorter for name in rests]
        settings = [_cut_all(inputs, others)] if others else []
        settings += dict.fromkeys(each if "buckets" in each else "shorter buckets in data.buckets" for each in advice)
        changes.append(f"{' and '.join(settings)} would take {_amount(rests, total - used)}it")
    changes = changes or [f"no clip is as short as what is left of a video, at most {TEMPORAL_FACTOR} frames"]
    return [f"{total - used:.1f} of {total:.1f} s of footage are not used; {', '.join(changes)}"]


def _amount(group: Mapping[str, float], left: float) -> str:
    """Returns how many of the seconds that are left a group has; "" where it has all."""
    seconds = sum(group.values())
    return "" if round(seconds, 1) == round(left, 1) else f"{seconds:.1f} s of "


def _cut_all(inputs: Inputs, names: Iterable[str]) -> str:
    """Returns the setting that cuts one clip after the other from the videos of sources, "" the only one."""
    where = f"clips: all of {some(names)} in data.sources" if any(names) else "data.clips=all"
    return f"{where} without data.max_clips" if inputs.max_clips else where


def _left_by_source(inputs: Inputs, kept: Sequence[Row], group: Literal["most", "uncut", "rest"]) -> dict[str, float]:
    """Returns the seconds that are not used of each source for one reason.

    Args:
        inputs: of the run.
        kept: rows of the clips that are in the cache.
        group: "most": data.max_clips clips were cut of a file, and there is room for another one; of the other files
            "uncut": what data.clips=all would cut besides, and "rest": what it leaves over, but for what is shorter
            than any clip.
    """
    cuts: dict[str, list[Cut]] = {}
    for clip in inputs.clips:
        cuts.setdefault(clip.file.name, []).append(clip.cut)
    left: dict[str, float] = {}
    for name, (total, used) in _footage_by_file(inputs, kept).items():
        source = inputs.files[name].source
        has_room = round((total - used) * FPS) >= cuts[name][-1].num_frames
        if source.clips != "head" and len(cuts[name]) == inputs.max_clips and has_room:
            seconds = {"most": total - used}
        else:
            more = max(_seconds_of_all(inputs, name, cuts[name][0]) - used, 0.0) if source.clips != "all" else 0.0
            rest = total - used - more
            seconds = {"uncut": more, "rest": rest if round(rest * FPS) > TEMPORAL_FACTOR else 0.0}
        left[source.name] = left.get(source.name, 0.0) + seconds.get(group, 0.0)
    return {name: seconds for name, seconds in left.items() if round(seconds, 1) > 0}


def _seconds_of_all(inputs: Inputs, name: str, cut: Cut) -> float:
    """Returns how many seconds of a file data.clips=all would use, with the other settings of a cut."""
    data = DataConfig(frame_rate=cut.frame_rate, allow_upscale=cut.allow_upscale)
    return num_used_frames(choose_cuts(inputs.scans[name], inputs.files[name].source.buckets, "all", data)) / FPS


def count_footage(inputs: Inputs, kept: Sequence[Row]) -> tuple[float, float]:
    """Returns the seconds, as they are played to the model, of all videos with a kept clip, and of them those used."""
    by_file = _footage_by_file(inputs, kept).values()
    return sum(total for total, _ in by_file), sum(used for _, used in by_file)


def _footage_by_file(inputs: Inputs, kept: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Returns what `count_footage` counts, by the name of the video."""
    names = {row.sample_id for row in kept}
    by_file: dict[str, list[Clip]] = {}
    for clip in inputs.clips:
        if clip.row.sample_id in names:
            by_file.setdefault(clip.file.name, []).append(clip)
    found: dict[str, tuple[float, float]] = {}
    for name, clips in by_file.items():
        scan = inputs.scans[name]
        if not scan.is_still:
            frames = scan.num_source_frames if clips[0].cut.frame_rate == "retime" else scan.num_frames
            found[name] = frames / FPS, min(num_used_frames([clip.cut for clip in clips]), frames) / FPS
    return found


def count_buckets(kept: Sequence[Row]) -> str:
    """Returns how many clips each bucket has, in one line."""
    counts = sorted(Counter(row.bucket for row in kept).items())
    return "; ".join(f"{count} in {list(astuple(bucket))}" for bucket, count in counts)
