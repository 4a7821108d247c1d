"""The report of a `prepare`: a row for every input, and lines about what was refused, cut off and left out."""

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
from mochi_tune.data_prep.finding import BESIDE_DATASET, MADE_HERE, STILL, UNKNOWN
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
# Separates the captions of a clip.
_BETWEEN_CAPTIONS = " | "
# Clips that lose a larger share of their picture are reported.
MUCH_PICTURE = 1 / 3
# Maximum characters of a truncated caption's end in a line; the table has all.
_MAX_TAIL = 60
# A folder such as `5_ohwx`, with the files below it; four digits are a year.
_REPEATS = re.compile(r"(\d{1,3})_[^/]*/", re.ASCII)
# Unused footage is reported above this share of all footage.
_MUCH_FOOTAGE = 0.1


def make_records(
    cache: CacheWriter, inputs: Inputs, kept: Sequence[Row], bad: Mapping[str, str], tails: Mapping[str, str]
) -> list[dict]:
    """Returns a record for each clip, each refused file and each unused file, sorted by name.

    Args:
        cache: with everything that was encoded.
        inputs: of the run.
        kept: rows of the clips that are in the cache.
        bad: why clips are refused, by their sample_id.
        tails: truncated ends of captions that are too long for the text encoder, by caption.
    """
    names = {row.sample_id for row in kept}
    records = []
    for clip in inputs.clips:
        row = clip.row
        record: dict[str, Any] = {"clip": row.sample_id, "caption": _BETWEEN_CAPTIONS.join(row.captions)}
        record |= {"status": "refused", "reason": bad.get(row.sample_id, "")}
        if row.sample_id in names:
            counts = [cache.token_counts(key) for key in row.text_keys]
            lost = sum(tokens - kept for kept, tokens in counts)
            record |= {"caption_tokens": sum(tokens for _, tokens in counts)}
            record["lost_text"] = _BETWEEN_CAPTIONS.join(tails[text] for text in row.captions if text in tails)
            record |= describe_kept(row, cache.clip_report(row.clip_key), lost)
        records.append(record)
    for name, reason in inputs.refused.items():
        captions = _BETWEEN_CAPTIONS.join(inputs.files[name].captions)
        records.append({"clip": name, "status": "refused", "reason": reason, "caption": captions})
    records += [{"clip": name, "status": "unused", "reason": reason} for name, reason in inputs.unused.items()]
    return sorted(records, key=lambda record: record["clip"])


def describe_kept(row: Row, report: Mapping[str, Any], lost_tokens: int) -> dict[str, Any]:
    """Returns the fields of a kept clip's record, except for its captions.

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
    """Returns the share of the source's picture outside the crop of a clip."""
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
    """Returns lines about what was refused, cut off and left out, each with the setting that would change it."""
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
    if held := sorted({file.source.name for file in inputs.files.values() if file.source.validation}):
        num_held = sum(row.source in held for row in kept)
        lines.append(f"held out for validation, never trained on: {counted(num_held, 'clip')} of {some(held)}")
    lines += _repeats_in_names(inputs)
    return [printable(line) for line in lines] + not_taken(inputs)


def not_taken(inputs: Inputs) -> list[str]:
    """Returns lines about unused files in the folders, except captions without a video, which are reported earlier."""
    lines = []
    if made := sorted(" is ".join(why.rsplit(": is ", 1)) for why in inputs.unused.values() if why.endswith(MADE_HERE)):
        lines.append(f"not used: {some(made)}")
    if stills := sorted(name for name, why in inputs.unused.items() if why.endswith(STILL)):
        takes = "data.buckets=auto or a bucket of one frame uses them"
        lines.append(f"not used: {counted(len(stills), 'still')} ({some(stills)}): {takes}")
    if others := sorted(name for name, why in inputs.unused.items() if why.endswith(UNKNOWN)):
        lines.append(f"not used: {counted(len(others), 'file')} ({some(others)})")
    if beside := sorted(name for name, why in inputs.unused.items() if why.endswith(BESIDE_DATASET)):
        files = f"{counted(len(beside), 'file')} next to a dataset ({some(beside)})"
        lines.append(f"not used: {files}: clips that it lacks need a folder of their own in data.sources")
    known = (NO_VIDEO, STILL, UNKNOWN, BESIDE_DATASET, *MADE_HERE)
    lines += [
        f"not used: {path} is {why}"
        for path, _, why in sorted(why.partition(": is ") for why in inputs.unused.values() if not why.endswith(known))
    ]
    return [printable(line) for line in lines]


def _cut(record: Mapping[str, Any]) -> str:
    tail = record.get("lost_text", "")
    lost = f" ({tail if len(tail) <= _MAX_TAIL else tail[:_MAX_TAIL] + '...'!r} is lost)" if tail else ""
    return f"{record['clip']} by {record['lost_tokens']}{lost}"


def _wider(inputs: Inputs) -> str:
    buckets = {bucket for file in inputs.files.values() for bucket in file.source.buckets}
    if len(buckets) == 1:
        return "data.buckets=auto has a bucket for each shape"
    return "a bucket of their shape in data.buckets would keep it"


def _repeated(records: Sequence[Mapping[str, Any]], inputs: Inputs) -> list[str]:
    """Reports clips with repeated pictures, by file, with the numbers of its worst clip; ignores stills."""
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
    """Reports the draws from each source in an epoch, if repeats or weights are set."""
    sources = {file.source.name: file.source for file in inputs.files.values() if not file.source.validation}.values()
    if all(source.repeats == 1 and source.weight is None for source in sources):
        return []
    clips = Counter(row.source for row in kept)
    present = [source for source in sources if clips[source.name]]
    if any(source.weight is not None for source in present):
        total = sum(source.weight or 0 for source in present)
        shares = [f"{(source.weight or 0) / total:.0%} from {source.name} ({clips[source.name]})" for source in present]
        return [f"by the weights of data.sources, the clips drawn come to {', '.join(shares)}"]
    times = [f"{source.repeats:g} x {clips[source.name]} of {source.name}" for source in present]
    return [f"by the repeats of data.sources, an epoch takes the clips {', '.join(times)}"]


def _repeats_in_names(inputs: Inputs) -> list[str]:
    """Reports sources whose clips are all in folders like `5_ohwx`, from which kohya's scripts read repeats."""
    by_source: dict[str, list[MediaFile]] = {}
    for file in inputs.files.values():
        by_source.setdefault(file.source.name, []).append(file)
    lost: dict[str, None] = {}
    for files in by_source.values():
        source, named = files[0].source, [_REPEATS.match(file.relative) for file in files]
        if all(named) and source.repeats == 1 and source.weight is None:
            # 1_NAME is the default.
            lost |= dict.fromkeys(each[0].rstrip("/") for each in named if each and int(each[1]) != 1)
    if not lost:
        return []
    names = f"folder names such as {next(iter(lost))} are not read as repeats"
    return [f"{names}: set the repeats of each folder in data.sources"]


def _unused_footage(inputs: Inputs, kept: Sequence[Row]) -> list[str]:
    total, used = count_footage(inputs, kept)
    if total - used <= _MUCH_FOOTAGE * total:
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
        # Only clips=all cuts the rest of a video.
        others = [name for name in rests if sources[name].clips != "all" and name not in uncut]
        # For a rest: a shorter bucket of the same size.
        advice = [sources[name].shorter for name in rests]
        settings = [_cut_all(inputs, others)] if others else []
        settings += dict.fromkeys(each if "buckets" in each else "shorter buckets in data.buckets" for each in advice)
        if inputs.max_clips and any(sources[name].clips == "all" for name in rests):
            settings.append("a higher data.max_clips")
        changes.append(f"{' and '.join(settings)} would take {_amount(rests, total - used)}it")
    changes = changes or [f"the rest of each video, at most {TEMPORAL_FACTOR} frames, is too short for a clip"]
    return [f"{total - used:.1f} of {total:.1f} s of footage are not used; {', '.join(changes)}"]


def _amount(group: Mapping[str, float], left: float) -> str:
    """Returns the seconds of a group, such as "3.0 s of "; "" if it has all unused seconds."""
    seconds = sum(group.values())
    return "" if round(seconds, 1) == round(left, 1) else f"{seconds:.1f} s of "


def _cut_all(inputs: Inputs, names: Iterable[str]) -> str:
    """Returns the setting that cuts consecutive clips from the videos of these sources; [""] is a single source."""
    where = f"clips: all of {some(names)} in data.sources" if any(names) else "data.clips=all"
    return f"{where} without data.max_clips" if inputs.max_clips else where


def _left_by_source(inputs: Inputs, kept: Sequence[Row], group: Literal["most", "uncut", "rest"]) -> dict[str, float]:
    """Returns the unused seconds of each source for one reason.

    Args:
        inputs: of the run.
        kept: rows of the clips that are in the cache.
        group: "most": files with data.max_clips clips and room for another one. For all other files, "uncut": what
            data.clips=all would cut in addition, and "rest": what that leaves, unless it is shorter than any clip.
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
    """Returns the seconds of a file that data.clips=all would use, with the other settings of a cut."""
    data = DataConfig(frame_rate=cut.frame_rate, allow_upscale=cut.allow_upscale)
    return num_used_frames(choose_cuts(inputs.scans[name], inputs.files[name].source.buckets, "all", data)) / FPS


def count_footage(inputs: Inputs, kept: Sequence[Row]) -> tuple[float, float]:
    """Returns the seconds of all videos with a kept clip, as played to the model, and the seconds that clips use."""
    by_file = _footage_by_file(inputs, kept).values()
    return sum(total for total, _ in by_file), sum(used for _, used in by_file)


def _footage_by_file(inputs: Inputs, kept: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Returns the total and used seconds of `count_footage` by the name of the video."""
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
    """Returns a line with the number of clips in each bucket."""
    counts = sorted(Counter(row.bucket for row in kept).items())
    return "; ".join(f"{count} in {list(astuple(bucket))}" for bucket, count in counts)
