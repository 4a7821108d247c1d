from pathlib import Path

import pytest

from mochi_tune.config.load import load_config
from mochi_tune.config.sources import buckets_by_source, largest_bucket, read_sources, share_of_buckets
from mochi_tune.data.buckets import Bucket
from mochi_tune.errors import ConfigError


def data(*settings: str):
    return load_config("my_lora", list(settings)).data


def test_without_buckets_there_is_one_size():
    assert buckets_by_source(data()) == {"": [Bucket(37, 480, 848)]}
    assert largest_bucket(data()) == Bucket(37, 480, 848)


def test_automatic_buckets_are_of_the_area_and_length_that_are_asked_for():
    [buckets] = buckets_by_source(data("data.buckets=auto", "data.resolution=256", "data.max_frames=13")).values()
    assert max(bucket.num_frames for bucket in buckets) == 13 and Bucket(13, 256, 256) in buckets
    assert all(abs(bucket.height * bucket.width / 256**2 - 1) < 0.1 for bucket in buckets)
    assert largest_bucket(data("data.buckets=[[7,64,64],[1,128,128]]")) == Bucket(1, 128, 128)


def test_a_source_has_its_own_settings_or_those_of_the_data():
    cats = "{folder: '~/cats', repeats: 2.5, buckets: [[7,32,48]]}"
    dogs = "{folder: dogs, caption_prefix: '', clips: head}"
    found = data("data.caption_prefix=a film,", "data.clips=all", f"data.sources=[{cats}, {dogs}]")
    cats, dogs = read_sources(found)
    assert (cats.name, cats.folder, cats.repeats) == ("cats", Path("~/cats").expanduser(), 2.5)
    assert (cats.buckets, cats.clips, cats.caption_prefix) == ([Bucket(7, 32, 48)], "all", "a film,")
    assert (dogs.buckets, dogs.clips, dogs.caption_prefix) == ([Bucket(37, 480, 848)], "head", "")


def test_one_folder_is_two_sources_by_names_and_a_source_of_validation_needs_no_weight():
    own = "{folder: cats, weight: 1}, {folder: cats, name: large, weight: 2, buckets: [[7,64,64]]}"
    found = read_sources(data(f"data.sources=[{own}, {{folder: dogs, validation: true}}]"))
    assert [(source.name, source.validation) for source in found] == [("cats", False), ("large", False), ("dogs", True)]
    assert [str(source.folder) for source in found] == ["cats", "cats", "dogs"]
    assert read_sources(data("data.sources=[{folder: cats, name: 7}]"))[0].name == "7"


def test_shares_belong_to_listed_buckets():
    listed = ["data.buckets=[[7,32,48],[1,64,64]]", "data.bucket_shares=[3,1]"]
    assert share_of_buckets(data(*listed)) == {Bucket(7, 32, 48): 3.0, Bucket(1, 64, 64): 1.0}
    assert share_of_buckets(data()) == {}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["data.buckets=foo"], "data.buckets=foo does not fit: it takes auto, a list of"),
        (["data.buckets=[[37,480]]"], r"data.buckets has \[37, 480\]: a bucket is \[frames, height, width\]"),
        (["data.buckets=[[38,480,848]]"], "num_frames=38 does not fit the VAE, which takes 6k\\+1: use 37 or 43"),
        (["data.buckets=auto", "data.max_frames=40"], "num_frames=40 does not fit"),
        (
            ["data.sources=[{folder: x, foo: 1}]"],
            r"data.sources\[0\]: foo is not known: it takes folder, repeats, weight",
        ),
        (["data.sources=[{repeats: 1}]"], r"data.sources\[0\] names no folder"),
        (["data.sources=[{folder: x, buckets: [[37, 480]]}]"], r"data.sources\[0\].buckets has \[37, 480\]"),
        (["data.sources=[{foldr: x}]"], r"foldr is not known; did you mean folder\?"),
        (["data.sources=[{folder: x, clips: al}]"], r"clips=al is not possible: it must be 'head', 'uniform'"),
        (
            ["data.sources=[{folder: x, repeats: 0}]"],
            r"data.sources\[0\]: repeats=0 is not possible: it must be above 0",
        ),
        (["data.sources=[{folder: a/x}, {folder: b/x}]"], "two sources with the name x.*name: x_2"),
        (["data.sources=[{folder: x, name: a/b}]"], r"sources\[0\]: name=a/b is not possible: it must be up to 100"),
        (["data.sources=[{folder: x, name: ''}]"], r"sources\[0\]: name=.* is not possible: it must be up to 100"),
        (["data.sources=[{folder: x, name: ..}]"], "no . in front"),
        (["data.sources=[{folder: x, validation: perhaps}]"], "validation=perhaps is not possible: it must be true or"),
        (["data.sources=[{folder: x, validation: true}]"], "no source to train on"),
        (["data.sources=[{folder: a}, {folder: b, validation: true, repeats: 2}]"], "leave its repeats or weight out"),
        (["data.sources=[{folder: a, weight: 1}, {folder: b}]"], "give either each source a weight or use repeats"),
        (["data.bucket_shares=[1]"], "set data.buckets to a list, or leave data.bucket_shares out."),
        (["data.clips=uniform"], "set data.max_clips=4"),
        (["data.clip_stride=5"], "data.clip_stride=5 does nothing without data.clips=slide"),
        (["data.max_frames=13"], "data.max_frames does nothing without data.buckets=auto"),
        (["data.resolution=256"], "data.resolution does nothing without data.buckets=auto"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, text):
    with pytest.raises(ConfigError, match=text) as caught:
        data(*settings)
    assert "\n" not in str(caught.value)


def test_shares_do_not_go_with_buckets_of_a_source():
    sources = "data.sources=[{folder: a}, {folder: b, buckets: [[1, 480, 848]]}]"
    more = ["data.buckets=[[37,480,848],[1,480,848]]", "data.bucket_shares=[0.5,0.5]"]
    with pytest.raises(ConfigError, match="the source b has its own buckets"):
        share_of_buckets(load_config("my_lora", [*more, sources]).data)
    assert len(share_of_buckets(load_config("my_lora", more).data)) == 2


def test_a_source_of_the_working_folder_has_that_folders_name(tmp_path, monkeypatch):
    for name in ("cats", "dogs", "cats/kittens"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "dogs")
    monkeypatch.chdir(tmp_path / "cats" / "kittens")
    found = read_sources(data("data.sources=[{folder: .}, {folder: ..}, {folder: ../../linked}]"))
    assert [source.name for source in found] == ["kittens", "cats", "linked"]
    # The clips of caches that were made of it alone have no name before theirs.
    assert read_sources(data("data.sources=[{folder: .}]"))[0].name == ""
    with pytest.raises(ConfigError, match="the folder / has no name"):
        data("data.sources=[{folder: /}, {folder: .}]")
    with pytest.raises(ConfigError, match="two sources with the name kittens"):
        data("data.sources=[{folder: .}, {folder: ../../x/kittens}]")
