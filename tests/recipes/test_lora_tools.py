import json
import math
import re

import pytest
import torch
from helpers_adapters import ALL, ATTENTION, GOLDEN, MIXED, random_adapter, with_magnitudes
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.cli.main import run
from mochi_tune.cli.options import LORA_OPTIONS
from mochi_tune.errors import ConfigError, MochiTuneError, some
from mochi_tune.recipes.lora_tools import inspect


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns a folder with two adapters of one base, the first in two layouts, one of another base, and a DoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    first, second, other = random_adapter(ALL, MIXED), random_adapter(ATTENTION, seed=1), random_adapter(seed=2)
    for adapter, base in ((first, "ab"), (second, "ab"), (other, "ef")):
        adapter.metadata["base_fingerprint"] = base * 32
    first.metadata["prompt"] = "<script>alert(1)</script>"
    save_adapter(folder / "first.safetensors", first)
    save_adapter(folder / "first_diffusers.safetensors", first, "diffusers")
    save_adapter(folder / "second.safetensors", second)
    save_adapter(folder / "other.safetensors", other)
    save_adapter(folder / "dora.safetensors", with_magnitudes(random_adapter()))
    return folder


def lora(*arguments, capsys):
    assert run(["lora", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_prints_a_table_and_the_metadata(files, capsys):
    text = lora("inspect", files / "first.safetensors", capsys=capsys)
    assert "layers   13" in text and "rank     3, 4, 5, 16" in text
    assert "alpha    1, 7, 8, 64 (stated in the file)" in text
    assert re.search(r"base_fingerprint +abab", text) and not re.search(r"[0-9a-f]{64}", text)
    assert re.search(r"^sha256   [0-9a-f]{12}$", text, re.MULTILINE)
    rows = [line.split() for line in text.partition("norm of ΔW")[2].splitlines()[1:]]
    assert rows[0] == ["block", *sorted(ALL)] and [row[0] for row in rows[1:]] == ["0", "1", "all"]
    norms = [float(row[1]) for row in rows[1:]]
    assert norms[2] == pytest.approx(math.hypot(*norms[:2]), rel=1e-2) and len(rows[3]) == 1 + 8
    # The last block does not update text; such a cell has one word instead of a norm and two ranks.
    assert rows[2].count("-") == 3 and len(rows[1]) == 1 + 2 * 8 and len(rows[2]) == 1 + 2 * 5 + 3


def test_inspect_prints_json(files, capsys):
    found = json.loads(lora("inspect", files / "first.safetensors", "json=true", capsys=capsys))
    assert len(found["layers"]) == 13 and found["metadata"]["num_blocks"] == "2" and not found["is_dora"]
    assert found["layers"]["blocks.0.attn.qkv_x"].keys() == {"rank", "alpha", "norm", "rank_90", "rank_99"}


def test_inspect_writes_a_self_contained_page(files, tmp_path):
    inspect(files / "first.safetensors", tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<figure>") == 8 and page.count('<rect class="bar"') == 13
    assert page.count('tabindex="0" role="region"') == 2
    assert "&lt;script&gt;" in page and "<script" not in page
    assert not re.search(r"(src|href)=|url\(|https?:", page)
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        inspect(files / "first.safetensors", tmp_path / "new" / "page.html")


def test_a_dora_is_inspected(files, capsys):
    assert "a DoRA: norms are before" in lora("inspect", files / "dora.safetensors", capsys=capsys)


def test_merge_and_resize_write_what_sample_can_check(files, tmp_path, capsys):
    merged, small = tmp_path / "new" / "merged.safetensors", tmp_path / "small.safetensors"
    names = [files / "first.safetensors", files / "second.safetensors"]
    text = lora("merge", *names, "strengths=[0.8,-0.5]", f"out={merged}", capsys=capsys)
    assert "13 layers, rank 3 to 32, exact sum" in text
    adapter = load_adapter(merged)
    assert adapter.metadata["base_fingerprint"] == "ab" * 32 and adapter.metadata["num_blocks"] == "2"
    assert [each["strength"] for each in json.loads(adapter.metadata["sources"])] == [0.8, -0.5]
    assert adapter.metadata["name"] == "merged"
    text = lora("resize", merged, "rank=4", f"out={small}", capsys=capsys)
    assert re.search(r"13 layers, rank 3 to 4, relative error 0\.\d+, at most .* in blocks\.\d.*; \d layers", text)
    assert load_adapter(small).metadata["base_fingerprint"] == "ab" * 32
    assert "13 layers" in lora("merge", *names, "energy=0.9", f"out={tmp_path / 'm.safetensors'}", capsys=capsys)


def test_compare_recognises_a_conversion(files, capsys):
    both = [files / "first.safetensors", files / "first_diffusers.safetensors"]
    assert lora("compare", *both, capsys=capsys).splitlines()[-1] == "the same change of the weights"
    text = lora("compare", both[0], files / "second.safetensors", capsys=capsys)
    assert text.splitlines()[-1] == "not the same change of the weights"
    assert f"only in {both[0]}: 6 layers, blocks.0.mlp_x.w1" in text and "only in second" not in text
    assert json.loads(lora("compare", *both, "json=true", capsys=capsys))["is_same"] is True


OUT = "out=NEW/out.safetensors"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("insepct first", "lora insepct is not a verb; did you mean lora inspect?"),
        ("inspect", "lora inspect needs an adapter file: mochi-tune lora inspect FILE"),
        ("inspect nothing", "nothing.safetensors does not exist"),
        ("inspect first jsn=true", "did you mean json=?"),
        ("inspect first json=yes", "json=yes is not possible: use true or false."),
        ("inspect first out=NEW/page.txt", "must end in .html: use page.html."),
        (f"merge first {OUT}", "lora merge takes two adapter files or more, got "),
        ("merge first second", "lora merge needs out=..."),
        (f"merge first second strengths=[1] {OUT}", "one strength each, got 2 and 1"),
        (f"merge first second strengths=[1,x] {OUT}", "strengths=x does not fit: it takes a number"),
        (f"merge first second strengths=[1,0] {OUT}", "strengths: 0 does not fit"),
        (f"merge first second strengths=[1e300,1] {OUT}", "strengths: 1e+300 is too large for blocks.0.attn"),
        (f"merge first first strengths=[1,-1] rank=2 {OUT}", "cancel out, so that nothing is left"),
        (f"merge first other {OUT}", "trained on different bases, by their base_fingerprint"),
        (f"merge first dora {OUT}", "dora.safetensors is a DoRA and cannot be merged"),
        (f"merge first second rank=0 {OUT}", "rank=0 does not fit"),
        (f"merge first second rank=2 energy=0.5 {OUT}", "rank= and energy= are both given"),
        (f"resize first {OUT}", "rank= and energy= are neither given"),
        (f"resize first rank=16 {OUT}", "is not below that of any layer"),
        (f"resize first energy=2 {OUT}", "energy=2 does not fit"),
        (f"resize first rnak=2 {OUT}", "did you mean rank=?"),
        ("resize first rank=2 out=first.safetensors", "exists and is never overwritten"),
        ("resize first rank=2 out=first.safetensors/x.safetensors", "its folder cannot be made"),
        ("resize first rank=2 out=NEW/out.pt", "must end in .safetensors: use out.safetensors."),
        ("compare first", "lora compare takes two adapter files, got "),
        ("compare first dora", "is a DoRA and the other adapter is not"),
        ("bake first model.weights=nowhere out=NEW", "model.weights=nowhere does not exist"),
        ("bake other model.weights=package:tiny out=NEW", "was trained on another base: base_fingerprint is efef"),
        ("bake first model.weights=package:tiny out=NEW to=comfyui", "to=comfyui is not possible: use official or"),
        ("bake first model.weights=package:tiny out=NEW dtype=int8", "dtype=int8 is not possible: use bf16 or fp16"),
        ("bake first model.weights=package:tiny out=NEW strength=much", "strength=much does not fit"),
        ("bake first model.weights=package:tiny out=NEW strength=0", "strength=0 is the base itself"),
        (f"extract base=package:tiny tuned=package:tiny rank=2 {OUT}", "are equal in each layer"),
        (f"extract base=package:tiny tuned=package:toy rank=2 {OUT}", "are models of other sizes"),
        (f"extract base=package:tiny tuned=package:toy rank=0 {OUT}", "rank=0 does not fit"),
        (f"extract base=package:tiny tuned=package:toy rank=2 targets=mlp {OUT}", "targets=mlp is not possible"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(files, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(files)
    names = ("first", "second", "other", "dora", "nothing")
    words = [f"{word}.safetensors" if word in names else word for word in arguments.split()]
    with pytest.raises(MochiTuneError) as caught:
        run(["lora", *(word.replace("NEW", str(tmp_path / "new")) for word in words)])
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_help_names_every_setting(capsys):
    text = lora(capsys=capsys)
    for verb, known in LORA_OPTIONS.items():
        alone = lora(verb, "--help", capsys=capsys)
        assert f"mochi-tune lora {verb}" in text and f"mochi-tune lora {verb}" in alone
        assert all(f"  {key}=" in alone for key in known)


def test_the_reference_trainers_file_is_inspected(capsys):
    assert "rank     2, 4" in lora("inspect", GOLDEN / "lora.safetensors", capsys=capsys)


def test_every_tool_reports_an_assumed_alpha(tmp_path, capsys):
    stated, bare = tmp_path / "stated.safetensors", tmp_path / "bare.safetensors"
    save_adapter(stated, random_adapter(ATTENTION))
    # With the keys of diffusers and nothing that states alpha.
    save_adapter(tmp_path / "diffusers.safetensors", random_adapter(ATTENTION), "diffusers")
    save_file(load_file(tmp_path / "diffusers.safetensors"), bare)
    note = f"the alpha of {bare} is assumed to be the rank, as nothing states it\n"
    merge = ("merge", stated, bare, f"out={tmp_path / 'merged.safetensors'}")
    resize = ("resize", bare, "rank=1", f"out={tmp_path / 'small.safetensors'}")
    bake = ("bake", bare, f"model.weights={GOLDEN}", f"out={tmp_path / 'baked'}")
    for arguments in (merge, resize, bake, ("compare", stated, bare)):
        assert note in lora(*arguments, capsys=capsys)
    assert "assumed" not in lora("compare", stated, stated, capsys=capsys)
    assert "(assumed to be the rank" in lora("inspect", bare, capsys=capsys)


def test_a_link_that_leads_nowhere_is_not_replaced(files, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")
    first, second = (str(files / f"{name}.safetensors") for name in ("first", "second"))
    for arguments in (["merge", first, second], ["resize", first, "rank=2"]):
        with pytest.raises(ConfigError, match="exists and is never overwritten"):
            run(["lora", *arguments, f"out={link}"])
    assert link.is_symlink()


def test_a_foreign_file_sends_nothing_to_the_terminal(tmp_path, capsys):
    foreign, adapter = "\x1b[2J\x07\u202e\x9b1m", random_adapter()
    adapter.metadata |= {foreign: foreign, "base_fingerprint": f"{foreign}{'ab' * 32}"}
    save_adapter(tmp_path / "a.safetensors", adapter)
    text = lora("inspect", tmp_path / "a.safetensors", capsys=capsys)
    assert r"\x1b[2J\x07\u202e\x9b1m" in text and text.replace("\n", "").isprintable()
    named, resized = (tmp_path / f"{foreign}{number}.safetensors" for number in (1, 2))
    save_adapter(named, random_adapter(ALL))
    for arguments in (["inspect"], ["compare", tmp_path / "a.safetensors"], ["resize", "rank=1", f"out={resized}"]):
        text = lora(*arguments, named, capsys=capsys)
        assert r"\x1b" in text and text.replace("\n", "").isprintable()
    save_file({f"blocks.0.{foreign}": torch.ones(1)}, tmp_path / "b.safetensors")
    bake = ["bake", str(tmp_path / "a.safetensors"), f"model.weights={GOLDEN}", f"out={tmp_path / 'baked'}"]
    for arguments in (["inspect", str(tmp_path / "b.safetensors")], bake):
        with pytest.raises(MochiTuneError, match=r"\\x1b\[2J") as caught:
            run(["lora", *arguments])
        assert str(caught.value).isprintable()
    assert some([foreign]).isprintable()


def test_a_folder_of_a_sweep_is_no_setting(files, tmp_path, capsys, monkeypatch):
    for folder in ("lr=1e-4", "deep/lr=1e-4"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.safetensors").write_bytes((files / "first.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in ("lr=1e-4/a.safetensors", "deep/lr=1e-4/a.safetensors", "./lr=1e-4/a.safetensors"):
        assert "layers   13" in lora("inspect", name, capsys=capsys)
    with pytest.raises(ConfigError, match="ouut"):
        run(["lora", "inspect", "lr=1e-4/a.safetensors", "ouut=x"])
