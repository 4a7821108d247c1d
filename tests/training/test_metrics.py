import json

from mochi_tune.training.metrics import Metrics


def test_rows_after_the_checkpoint_and_an_unfinished_line_are_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    with Metrics(tmp_path, last_step=3) as metrics:
        metrics.log({"step": 4, "loss": 0.5})
        metrics.log_validation({"step": 4, "validation_loss": 1.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 0.5
    assert (tmp_path / "validation.jsonl").read_text() == '{"step": 4, "validation_loss": 1.0}\n'


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Metrics(tmp_path, last_step=0) as metrics:
        metrics.log({"step": 1, "loss": 0.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5
