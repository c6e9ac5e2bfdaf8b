import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tacq_vllm.format.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointReader,
    CheckpointWriter,
    read_schema,
)
from tacq_vllm.format.schema import FormatError
from tests.builders import truncate


def make_tensors() -> dict[str, Tensor]:
    """Five tensors of 64 bytes."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"part.{index}": torch.randn(4, 8, generator=generator).to(torch.bfloat16)
        for index in range(5)
    }


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def read(folder: Path) -> dict[str, Tensor]:
    with CheckpointReader(folder) as reader:
        return {name: reader.load(name) for name in reader}


def edit_index(folder: Path, name: str, file_name: str) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][name] = file_name
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three shards and their index."""
    write(tmp_path / "sharded", make_tensors(), max_shard_bytes=150)
    return tmp_path / "sharded"


def assert_refused(folder: Path, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        CheckpointReader(folder)


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    tensors = make_tensors()

    write(tmp_path, tensors, max_shard_bytes=320)

    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_NAME]
    # A server may run as another user.
    assert (tmp_path / WEIGHTS_NAME).stat().st_mode & 0o044 == 0o044
    stored = read(tmp_path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_several_shards_and_their_index(sharded: Path) -> None:
    tensors = make_tensors()

    files = sorted(path.name for path in sharded.iterdir())

    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert files == [*shards, INDEX_NAME]
    index = json.loads((sharded / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 320
    assert index["weight_map"].keys() == tensors.keys()
    for shard in shards:
        names = load_file(sharded / shard).keys()
        assert len(names) <= 2
        assert all(index["weight_map"][name] == shard for name in names)
    stored = read(sharded)
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"small": torch.zeros(2), "large": torch.zeros(99), "last": torch.ones(2)}

    write(tmp_path, tensors, max_shard_bytes=16)

    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert read(tmp_path).keys() == tensors.keys()


def test_reader_tells_types_shapes_and_bytes(sharded: Path) -> None:
    with CheckpointReader(sharded) as reader:
        entry = reader["part.4"]

        assert "part.4" in reader
        assert "part.5" not in reader
        assert entry.dtype == torch.bfloat16
        assert entry.shape == (4, 8)
        assert entry.file_name == "model-00003-of-00003.safetensors"
        assert reader.file_bytes == sum(
            path.stat().st_size for path in sharded.glob("*.safetensors")
        )


def test_a_type_that_the_format_lacks_is_told_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / WEIGHTS_NAME)

    with CheckpointReader(tmp_path) as reader:
        assert reader["a"].dtype is None
        assert reader["a"].dtype_name == "I64"


@pytest.mark.parametrize("max_shard_bytes", [150, 4000])
def test_save_load_save_gives_equal_bytes(tmp_path: Path, max_shard_bytes: int) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, make_tensors(), max_shard_bytes)

    write(second, dict(sorted(read(first).items())), max_shard_bytes)

    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {path.name: path.read_bytes() for path in second.iterdir()} == files


def test_no_weights(tmp_path: Path) -> None:
    assert_refused(tmp_path, f"no {WEIGHTS_NAME} and no {INDEX_NAME}")


@pytest.mark.parametrize("count", [1, 300])
def test_truncated_file(sharded: Path, count: int) -> None:
    truncate(sharded / "model-00002-of-00003.safetensors", count)

    assert_refused(sharded, "model-00002-of-00003.safetensors: truncated")


def test_file_that_is_not_safetensors(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"\x80\x04 a pickle, say")

    assert_refused(tmp_path, f"{WEIGHTS_NAME}: truncated or not safetensors")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").unlink()

    assert_refused(sharded, "model-00003-of-00003.safetensors: the file is missing")

    # Nor is it there where another kind of thing has its name.
    (sharded / "model-00003-of-00003.safetensors").mkdir()

    assert_refused(sharded, "model-00003-of-00003.safetensors: the file is missing")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "model.bin"]
)
def test_index_that_leaves_the_folder(sharded: Path, name: str) -> None:
    write(sharded.parent / "a", make_tensors(), 4000)
    edit_index(sharded, "part.0", name)

    assert_refused(sharded, f"'{name}' is not a file name")


def test_index_that_names_the_wrong_file(sharded: Path) -> None:
    edit_index(sharded, "part.0", "model-00003-of-00003.safetensors")

    assert_refused(sharded, "part.0 is not in model-00003-of-00003.safetensors")


def test_index_that_names_a_tensor_nobody_has(sharded: Path) -> None:
    edit_index(sharded, "part.9", "model-00001-of-00003.safetensors")

    assert_refused(sharded, "part.9 is not in model-00001-of-00003.safetensors")


def test_tensor_stored_twice(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    save_file(load_file(path) | {"part.0": torch.zeros(1)}, path)

    assert_refused(sharded, "part.0 is stored twice")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (f'{{"weight_map": {"9" * 5000}}}', "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"part.0": 3}}', "no weight_map"),
    ],
    ids=["cut", "deep", "digits", "list", "empty", "number"],
)
def test_malformed_index(sharded: Path, content: str, reason: str) -> None:
    (sharded / INDEX_NAME).write_text(content)

    assert_refused(sharded, reason)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: the file is missing"):
        read_schema(tmp_path)


def test_config_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(FormatError, match="not a TaCQ checkpoint"):
        read_schema(tmp_path)
