import pytest
import torch
from safetensors.torch import load_file

from mochi_tune.weights.writing import stream_tensors

LAYOUT = {"norm": (torch.float32, (3,)), "x": (torch.bfloat16, (2, 5)), "y": (torch.float16, (1, 1, 7))}


def test_tensors_are_written_one_by_one_in_the_librarys_format(tmp_path):
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in LAYOUT.items()}
    # Rows that are not next to each other in memory.
    tensors["x"] = tensors["x"].T.contiguous().T
    stream_tensors(tmp_path / "x.safetensors", LAYOUT, iter(tensors.items()))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_an_error_while_streaming_leaves_no_file(tmp_path):
    def broken():
        yield "norm", torch.zeros(3)
        raise OSError(28, "no space")

    with pytest.raises(OSError):
        stream_tensors(tmp_path / "x.safetensors", LAYOUT, broken())
    assert list(tmp_path.iterdir()) == []
