import gzip
import json
import re
from pathlib import Path

import pytest

from tacq_vllm.data.errors import DataError
from tacq_vllm.data.files import find_file, read_json, read_json_lines, read_text

TEXT = " = Ägypten = \n \n second line \n"


def write(path: Path, content: bytes) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_text_is_read_as_it_stands(tmp_path: Path, name: str) -> None:
    assert read_text(write(tmp_path / name, TEXT.encode())) == TEXT


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_blank_lines_are_skipped_and_counted(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, '{"a": 1}\n\n  \n["ä"]'.encode())
    assert list(read_json_lines(path)) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 4", ["ä"]),
    ]


@pytest.mark.parametrize("name", ["value.json", "value.json.gz"])
def test_one_json_value(tmp_path: Path, name: str) -> None:
    assert read_json(write(tmp_path / name, b'{\n"a": 1\n}')) == {"a": 1}


def check_message(
    path: Path, error: pytest.ExceptionInfo[DataError], fault: str
) -> None:
    assert re.fullmatch(re.escape(str(path)) + fault, str(error.value))


@pytest.mark.parametrize("name", ["none.txt", "none.txt.gz"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError) as error:
        read_text(path)
    check_message(path, error, ": no such file")
    with pytest.raises(DataError) as error:
        list(read_json_lines(path))
    check_message(path, error, ": no such file")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_text(tmp_path)
    check_message(tmp_path, error, ": cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.gz", gzip.compress(json.dumps(list(range(5000))).encode())[:-40]),
        ("plain.gz", b'{"a": 1}\n'),
        ("damaged.gz", gzip.compress(b"text")[:10] + b"\xff" * 20),
        ("latin1.txt", b"\xe4gypten"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_text(path)
    check_message(path, error, ": cannot be read: .+")
    with pytest.raises(DataError) as error:
        list(read_json_lines(path))
    check_message(path, error, ": cannot be read: .+")


@pytest.mark.parametrize(
    "line", ["{", "[" * 100_000, "9" * 5000], ids=["cut", "deep", "long"]
)
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "rows.jsonl", f"[]\n\n{line}\n".encode())
    rows = read_json_lines(path)
    assert next(rows) == (f"{path}, line 1", [])
    with pytest.raises(DataError) as error:
        next(rows)
    check_message(path, error, ", line 3: not JSON: .+")


def test_file_that_is_not_json(tmp_path: Path) -> None:
    path = write(tmp_path / "value.json", b"{} {}")
    with pytest.raises(DataError) as error:
        read_json(path)
    check_message(path, error, ": not JSON: .+")


def test_the_first_name_that_exists_is_found(tmp_path: Path) -> None:
    excerpt = write(tmp_path / "excerpt.txt.gz", b"")
    assert find_file(tmp_path, "train.txt", "excerpt.txt") == excerpt
    (tmp_path / "train.txt").mkdir()
    assert find_file(tmp_path, "train.txt", "excerpt.txt") == excerpt
    (tmp_path / "train.txt").rmdir()
    train = write(tmp_path / "train.txt", b"")
    assert find_file(tmp_path, "train.txt", "excerpt.txt") == train


def test_every_name_that_was_tried_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        find_file(tmp_path, "a.txt", "b.txt")
    names = r" \(nor a\.txt\.gz, b\.txt, b\.txt\.gz\)"
    check_message(tmp_path / "a.txt", error, ": no such file" + names)
