from mochi_tune.data_prep.finding import find_unused, find_videos


def test_hidden_folders_are_left_out_and_linked_ones_told_of(tmp_path):
    """File managers keep what was deleted in a hidden folder of the disk."""
    videos, real = tmp_path / "videos", tmp_path / "real"
    for folder in (videos / ".Trash-1000" / "files", videos / "more", real):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").touch()
    (videos / "linked").symlink_to(real)
    assert find_videos(videos) == [videos / "more" / "clip.mp4"]
    unused = find_unused(videos, find_videos(videos))
    assert (
        list(unused) == [videos / "linked"]
        and "is a link to a folder, which is not followed" in unused[videos / "linked"]
    )
