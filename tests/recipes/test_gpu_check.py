import json

from mochi_tune.cli.options import BENCH_OPTIONS, VERIFY_OPTIONS, plain_options
from mochi_tune.recipes.gpu_check import PARTS, TOTAL_SECONDS, Part, main, result_of

SMALL = ("model=tiny", "num_frames=7", "height=32", "width=48", "device=cpu", "repeats=1")


def test_each_part_is_a_line_whatever_befalls_it(tmp_path):
    parts = [
        Part(("bench", "what=train", *SMALL), 600),
        Part(("bench", "what=cook", *SMALL), 600),
        Part(("demo", f"out={tmp_path / 'demo'}"), 1),
    ]
    assert main(tmp_path / "gpu.jsonl", parts, 1800) == 2
    done, refused, late = (json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert done["exit_code"] == 0 and done["result"]["seconds_per_step"] > 0 and "what=train" in done["command"]
    assert refused["exit_code"] == 2 and "what=cook is not possible" in refused["error"][-1]
    assert late["exit_code"] is None


def test_a_result_is_found_among_other_lines_and_an_output_without_one_keeps_its_end():
    figures = {"seconds": 1.5, "layout": {"data": 1}}
    dumped = json.dumps(figures, indent=1)
    assert result_of(dumped) == result_of(f"{{x}} is not compiled\n{dumped}\nlast words\n") == figures
    assert result_of("checks\n" * 9 + "all ok\n") == ["checks"] * 4 + ["all ok"]
    assert result_of('{\n "seconds": 1') == ["{", ' "seconds": 1']


def test_no_part_begins_when_the_time_is_over(tmp_path):
    assert main(tmp_path / "gpu.jsonl", [Part(("bench", "what=train", *SMALL), 600)], 0) == 0
    assert not (tmp_path / "gpu.jsonl").exists()


def test_the_parts_of_a_gpu_are_commands_that_exist():
    assert TOTAL_SECONDS < 480
    for part in PARTS:
        verb, *arguments = part.arguments
        assert plain_options(verb, arguments, {"bench": BENCH_OPTIONS, "verify": VERIFY_OPTIONS}[verb])
        assert part.limit <= 100
