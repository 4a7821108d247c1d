import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_process import run
from helpers_road import ENVIRONMENT, command

from mochi_tune import assets
from mochi_tune.recipes import doctor

TINY = assets.FOLDER / "tiny"
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_it_examines_everything_and_a_machine_that_passes_exits_with_0(tmp_path):
    done = run("doctor", "device=cpu", f"model.weights={TINY}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = dict(re.findall(r"^(?:ok|note|FAIL) +(\S+).*?$()", done.stdout, re.MULTILINE))
    expected = set("Python torch packages GPU attention kernels memory disk video extras weights numbers".split())
    assert expected <= verdicts.keys() | {name.rstrip("0123456789") for name in verdicts}
    assert "nothing failed" in done.stdout and "sample: ready" in done.stdout


def test_what_fails_says_what_to_do_and_exits_with_1(tmp_path):
    # A torch that does not load, as one whose libraries are gone.
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    # A fresh process: that of `run` has torch.
    env = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command("doctor"), env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAIL +torch +cannot be imported: libcudart\.so\.12.*\n +pip install", done.stdout)
    assert "1 FAILED" in done.stdout and "numbers" not in done.stdout


@pytest.mark.parametrize(("version", "fits"), [((3, 10, 9), 0), ((3, 11, 0), 1), ((3, 13, 5), 1), ((3, 14, 0), 0)])
def test_the_versions_of_python(version, fits):
    finding = doctor.check_python(version)
    assert (finding.verdict == doctor.OK) == bool(fits) and bool(finding.advice) != bool(fits)


@pytest.mark.parametrize(("version", "fits"), [("2.9.1", False), ("2.10.0", True), ("2.14.0.dev20260101+cu130", True)])
def test_the_versions_of_torch(version, fits, monkeypatch):
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.setattr(doctor, "has_nvidia_driver", lambda: False)
    assert (doctor.check_torch().verdict == doctor.OK) == fits


def test_a_required_package_that_is_missing_or_too_old_fails(monkeypatch):
    assert doctor.check_packages().verdict == doctor.OK
    versions = {"peft": "0.18.1"}

    def version(name):
        if name == "transformers":
            raise PackageNotFoundError
        return versions.get(name, "99")

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda _: ["peft>=0.19", "transformers>=5.1", "gradio>=6; extra == 'ui'"])
    finding = doctor.check_packages()
    assert finding.verdict == doctor.FAIL
    assert finding.says == "peft 0.18.1, needed is >=0.19; transformers is not installed"
    assert finding.advice == "pip install 'peft>=0.19' 'transformers>=5.1'"


def test_the_extras_are_those_of_the_package():
    assert doctor.EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"dev", "docs"}


def test_incomplete_weights_fail_and_absent_ones_are_a_note(tmp_path):
    assert doctor.check_weights_at(tmp_path / "nowhere").verdict == doctor.NOTE
    finding = doctor.check_weights_at(tmp_path)
    assert finding.verdict == doctor.FAIL and "sample: lacks DiT" in finding.says and "weights check" in finding.advice


def test_a_codec_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "DECODERS", ("h264", "no_such_codec"))
    finding = doctor.check_video()
    assert finding.verdict == doctor.NOTE and "lacks no_such_codec (read)" in finding.says


def test_an_extra_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "zebra", (("no_such_module",), "stripes"))
    finding = doctor.check_extras()
    assert finding.verdict == doctor.NOTE and "zebra for stripes" in finding.advice


def test_an_extra_that_does_not_load_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "striped.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "EXTRAS", {"zebra": (("striped",), "stripes")})
    finding = doctor.check_extras()
    assert finding.verdict == doctor.NOTE and "zebra cannot be imported: libGL.so.1" in finding.says
    assert finding.advice == "repair it before you use stripes"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    # No user can write there, root neither.
    finding = doctor.check_disk(Path("/proc/self"), tmp_path)
    assert finding.verdict == doctor.FAIL and "/proc/self cannot be written to" in finding.says
    finding = doctor.check_disk(tmp_path, Path("/proc/self/weights"))
    assert finding.verdict == doctor.NOTE and "/proc/self cannot be written to" in finding.says
    assert doctor.check_disk(tmp_path, Path("/proc/self")).verdict == doctor.OK, "weights that are there are only read"


@pytest.mark.parametrize(
    ("free_gib", "has_weights", "verdict"),
    [(1, True, doctor.FAIL), (3, True, doctor.OK), (3, False, doctor.NOTE), (16, False, doctor.OK)],
)
def test_the_disk_needs_space_for_a_run_and_for_weights_that_are_not_there(
    tmp_path, monkeypatch, free_gib, has_weights, verdict
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gib * doctor.GIB))
    weights = tmp_path if has_weights else tmp_path / "weights"
    assert doctor.check_disk(tmp_path, weights).verdict == verdict


def test_little_memory_is_a_note(monkeypatch):
    for gib, verdict in ((11, doctor.NOTE), (12, doctor.OK)):
        memory = SimpleNamespace(total=64 * doctor.GIB, available=gib * doctor.GIB)
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        assert doctor.check_memory().verdict == verdict


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose kernels do not run")
def test_kernels_that_do_not_run_are_a_note_and_numbers_that_cannot_be_computed_fail(monkeypatch):
    assert doctor.check_kernels().verdict == doctor.OK
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    finding = doctor.check_kernels()
    assert finding.verdict == doctor.NOTE and "apt-get install gcc python3-dev" in finding.advice
    finding = doctor.check_numbers("cuda")
    assert finding.verdict == doctor.FAIL and "the tiny DiT does not run on cuda" in finding.says


def test_numbers_that_are_off_fail(monkeypatch):
    assert doctor.check_numbers("cpu").verdict == doctor.OK
    # Below what fp32 can do.
    monkeypatch.setattr(doctor, "TOLERANCE", sys.float_info.epsilon)
    finding = doctor.check_numbers("cpu")
    assert finding.verdict == doctor.FAIL and "mochi-tune verify" in finding.advice
