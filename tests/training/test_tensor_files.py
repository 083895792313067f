"""Files are those of the safetensors library, and their digests are known without reading them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tbpo_ray.training.tensor_files import FileFacts, write_tensors

FLOATS = {
    "b@0@master": torch.arange(7.0),
    "a@3@square_avg": torch.randn(2, 3),
    "step": torch.tensor(4.0),
    "größe \"q\" \\": torch.ones(1),
    "empty": torch.zeros(0),
}  # fmt: skip
BYTES = {"cpu": torch.arange(11, dtype=torch.uint8)}


@pytest.mark.parametrize("tensors", [FLOATS, BYTES, FLOATS | BYTES, {}], ids=["f32", "u8", "both", "none"])
def test_the_bytes_are_the_library_s_and_the_digest_is_theirs(tmp_path, tensors):
    save_file(tensors, tmp_path / "library")
    facts = write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert facts == FileFacts.read(tmp_path / "ours")
    assert FileFacts.from_json(facts.to_json()) == facts


def test_every_dtype_is_read_back_by_the_library(tmp_path):
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    dtypes = (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.tensor([[0, 1, 3]]).to(dtype) for dtype in dtypes}
    write_tensors(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 2).t(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)],
    ids=["strided", "elsewhere", "complex"],
)
def test_a_tensor_that_the_file_cannot_hold_is_named(tmp_path, tensor):
    with pytest.raises(ValueError, match="weights: a torch"):
        write_tensors(tmp_path / "file", {"weights": tensor})
    assert not (tmp_path / "file").exists()


def test_facts_of_a_text(tmp_path):
    (tmp_path / "text").write_text("grün", encoding="utf-8")
    assert FileFacts.of_text("grün") == FileFacts.read(tmp_path / "text")
