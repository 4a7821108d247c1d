"""What was edited beside the videos since `prepare`, which training does not read."""

from mochi_tune.config.schema import DataConfig
from mochi_tune.config.sources import read_sources
from mochi_tune.data.cache import Cache
from mochi_tune.data_prep.captions import CaptionRules, load_captions
from mochi_tune.data_prep.hf_dataset import is_dataset
from mochi_tune.errors import DataError, counted, some

# Of a larger cache, the captions are not read again at each start of a training: on a network disk that takes minutes.
MAX_CLIPS = 10_000


def tell_changed_captions(data: DataConfig, seed: int, cache: Cache) -> list[str]:
    """Compares the captions of a cache with the files that they were read from.

    Args:
        data: settings that the cache was prepared with.
        seed: of the captions' tags.
        cache: of the run.

    Returns:
        A line that says what has changed and what to do; nothing where all is as it was, or where the files are
        elsewhere.
    """
    if len(cache.rows) > MAX_CLIPS:
        return []
    changed, gone = [], []
    for source in read_sources(data):
        if not source.folder.is_dir() or is_dataset(source.folder):
            continue
        rows = cache.rows.tuples("source", "path", "captions")
        own = {source.folder / path: tuple(texts) for name, path, texts in rows if name == source.name}
        videos = {path: texts for path, texts in own.items() if path.exists()}
        if not videos:
            continue
        rules = CaptionRules(
            data.captions, source.caption_prefix, data.caption_suffix, data.tag_dropout, data.caption_variants, seed
        )
        try:
            found = load_captions(source.folder, list(videos), rules)
        except DataError as error:
            return [f"whether captions have changed since `prepare` cannot be told: {error}"]
        gone += [path.name for path in own if path not in videos]
        changed += [video.name for video, texts in videos.items() if found.texts.get(video, ("",)) != texts]
    lines = []
    if gone:
        lines.append(
            f"{counted(len(gone), 'clip')} of the cache {'is' if len(gone) == 1 else 'are'} not in the folder any more "
            f"({some(gone)}), and this run trains on {'it' if len(gone) == 1 else 'them'}: to leave "
            f"{'it' if len(gone) == 1 else 'them'} out, stop, run `mochi-tune prepare`, and train again"
        )
    if not changed:
        return lines
    return [
        *lines,
        f"captions of {counted(len(changed), 'clip')} have changed since `prepare` ({some(changed)}), and this "
        "run has the old ones: to use the new ones, stop, run `mochi-tune prepare` with these settings, which encodes "
        "those captions alone, and train again",
    ]
