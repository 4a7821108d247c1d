import pytest
import torch

from mochi_tune.errors import CheckpointError
from mochi_tune.training.checkpoint import (
    check_checkpoint,
    find_checkpoints,
    load_optimizer,
    load_tensors,
    new_checkpoint,
    optimizer_tensors,
    save_tensors,
)


def write(folder, step, keep=3):
    with new_checkpoint(folder, step, keep) as new:
        save_tensors(new / "adapter.safetensors", {"a": torch.full((3,), float(step))})


def test_a_checkpoint_appears_whole_and_old_ones_go_after(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000002", "step_000010"]
    check_checkpoint(tmp_path / "step_000010")
    assert load_tensors(tmp_path / "step_000010" / "adapter.safetensors")["a"].tolist() == [10.0] * 3


def test_a_save_that_breaks_off_leaves_the_one_before(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(OSError, match="disk"), new_checkpoint(tmp_path, 2, 3) as new:
        (new / "adapter.safetensors").write_bytes(b"half")
        raise OSError("the disk is full")
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000001"]
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "extra"])
def test_damage_is_named(tmp_path, damage):
    write(tmp_path, 1)
    folder = tmp_path / "step_000001"
    file = folder / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="extra.bin" if damage == "extra" else "adapter.safetensors"):
        check_checkpoint(folder)


def test_an_optimizer_goes_on_where_it_was(tmp_path):
    def build():
        torch.manual_seed(0)
        parameters = {"x": torch.nn.Parameter(torch.randn(4)), "y": torch.nn.Parameter(torch.randn(2, 3))}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    def step(parameters, optimizer, number):
        for i, parameter in enumerate(parameters.values()):
            parameter.grad = torch.full_like(parameter, 0.1 * number + i)
        optimizer.step()

    straight, straight_optimizer = build()
    for number in range(6):
        step(straight, straight_optimizer, number)
    first, first_optimizer = build()
    for number in range(3):
        step(first, first_optimizer, number)
    save_tensors(tmp_path / "optimizer.safetensors", optimizer_tensors(first_optimizer, first))
    second, second_optimizer = build()
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    load_optimizer(tmp_path / "optimizer.safetensors", second_optimizer, second)
    for number in range(3, 6):
        step(second, second_optimizer, number)
    assert all(torch.equal(straight[name], second[name]) for name in straight)
    with pytest.raises(CheckpointError, match="is not this run's"):
        load_optimizer(tmp_path / "optimizer.safetensors", second_optimizer, {"x": second["x"]})
