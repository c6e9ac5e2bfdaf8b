import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tacq_vllm.format.checkpoint import INDEX_NAME, WEIGHTS_NAME
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.weights import open_weights
from tests.builders import truncate


def save_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    names = [f"model-{number}.safetensors" for number in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    weight_map = {
        key: name
        for name, tensors in zip(names, shards, strict=True)
        for key in tensors
    }
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    return tmp_path


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    save_shards(
        tmp_path, [{"a": torch.arange(3.0)}, {"b": torch.ones(2, dtype=torch.bfloat16)}]
    )
    return tmp_path


def test_one_file(one_file: Path) -> None:
    weights = open_weights(one_file)

    assert sorted(weights) == ["a.weight", "b.weight"]
    assert "a.weight" in weights
    assert "c.weight" not in weights
    assert torch.equal(weights.load("a.weight"), torch.arange(6.0).view(2, 3))


def test_shards(two_shards: Path) -> None:
    weights = open_weights(two_shards)

    assert weights.file_of == {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    assert torch.equal(weights.load("a"), torch.arange(3.0))
    assert torch.equal(weights.load("b"), torch.ones(2, dtype=torch.bfloat16))


def test_an_index_counts_and_not_what_lies_beside_it(two_shards: Path) -> None:
    save_file({"c": torch.ones(1)}, two_shards / WEIGHTS_NAME)

    assert sorted(open_weights(two_shards)) == ["a", "b"]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")

    with pytest.raises(QuantizeError, match="only safetensors are read"):
        open_weights(tmp_path)


def test_a_shard_that_is_missing(two_shards: Path) -> None:
    (two_shards / "model-1.safetensors").unlink()

    with pytest.raises(QuantizeError, match=r"model-1\.safetensors: the file is m"):
        open_weights(two_shards)


def test_a_file_that_is_cut_short(one_file: Path) -> None:
    truncate(one_file / WEIGHTS_NAME)

    with pytest.raises(QuantizeError, match=r"model\.safetensors: cannot be loaded"):
        open_weights(one_file)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": [1]}}', "no weight_map"),
        ('{"weight_map": {"a": "../model-1.safetensors"}}', "not a file name"),
    ],
)
def test_a_malformed_index(two_shards: Path, index: str, reason: str) -> None:
    (two_shards / INDEX_NAME).write_text(index)

    with pytest.raises(QuantizeError, match=rf"index\.json: .*{reason}"):
        open_weights(two_shards)


def test_the_fingerprint_is_that_of_the_files(one_file: Path) -> None:
    before = open_weights(one_file).fingerprint()

    assert open_weights(one_file).fingerprint() == before
    path = one_file / WEIGHTS_NAME
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_weights(one_file).fingerprint() != before


def test_the_fingerprint_depends_on_names_and_shapes(one_file: Path) -> None:
    path = one_file / WEIGHTS_NAME
    seen = {open_weights(one_file).fingerprint()}
    times = path.stat()

    for tensors in (
        {"a.weight": torch.arange(6.0).view(3, 2), "b.weight": torch.ones(4)},
        {"a.weight": torch.arange(6.0).view(2, 3), "c.weight": torch.ones(4)},
    ):
        size = path.stat().st_size
        save_file(tensors, path)
        # Neither the size nor the time tells.
        assert path.stat().st_size == size
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen.add(open_weights(one_file).fingerprint())

    assert len(seen) == 3


def test_every_shard_is_in_the_fingerprint(two_shards: Path) -> None:
    before = open_weights(two_shards).fingerprint()

    save_file({"b": torch.zeros(3)}, two_shards / "model-1.safetensors")

    assert open_weights(two_shards).fingerprint() != before
