"""What the processes of a run must have in common: the code, the settings and the run folder."""

import shutil

import pytest

from mochi_tune.errors import ParallelError
from mochi_tune.training import agreement
from mochi_tune.training.agreement import check_agreement, check_shared, code_digest, versions


@pytest.fixture
def answer(monkeypatch):
    """Returns a function that sets what a second process gathers, computed from what this one does."""

    def set_answer(other) -> None:
        monkeypatch.setattr(agreement, "gather_object", lambda own: [*own, other(own[0])])

    return set_answer


@pytest.mark.parametrize("fact", [*versions("mochi-tune", "torch", "accelerate"), "the code of mochi-tune"])
def test_processes_with_other_code_are_named(answer, fact):
    answer(lambda own: own)
    check_agreement({"the setting seed": 1})
    answer(lambda own: own | {fact: "another"})
    with pytest.raises(ParallelError, match=f"^{fact}: another on rank 1, .* on rank 0: start all processes"):
        check_agreement({"the setting seed": 1})


def test_the_digest_of_the_code_is_that_of_its_files_wherever_they_are(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = (tmp_path,)

    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: Spec)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.py").write_text("a = 1")
    before = code_digest()
    shutil.move(tmp_path / "inner/a.py", tmp_path / "a.py")
    assert code_digest() == before
    (tmp_path / "a.py").write_text("a = 2")
    assert code_digest() != before


def test_a_machine_with_a_run_folder_of_its_own_is_named(answer, tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    path.write_text("{}")
    answer(lambda own: own)
    check_shared([path, tmp_path / "absent"], 0.0)
    answer(lambda own: ("nodeB", [path]))
    with pytest.raises(ParallelError, match=r"history\.jsonl of rank 0 \(machine .*on rank 1 \(machine nodeB\): put"):
        check_shared([path], 0.0)
    # What the other machine finds, where another file has the name.
    seen = []
    answer(lambda own: seen.append(own) or ("nodeB", []))
    monkeypatch.setattr(agreement, "broadcast", lambda digests: dict.fromkeys(digests, "of rank 0"))
    check_shared([path], 0.0)
    assert seen[0][1] == [path]
