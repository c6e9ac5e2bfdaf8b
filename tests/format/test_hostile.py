"""Each kind of broken checkpoint, and what `tacq verify` says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tacq_vllm.cli import app
from tacq_vllm.format.validation import find_faults
from tests.hostile.good import CLUSTERED, GOOD, set_config, shard
from tests.hostile.kind import Kind
from tests.hostile.kinds import KINDS

MEMORY = 1 << 30
"""Bytes that reading a few kilobytes may take, over what is taken already."""

_LIMITED = """
import json, resource, sys
from pathlib import Path
from tacq_vllm.format.validation import find_faults
import transformers.models.llama.modeling_llama
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(json.dumps([find_faults(Path(folder)) for folder in sys.argv[2:]]))
"""


def test_the_kinds_are_many() -> None:
    assert len(KINDS) >= 40


def test_good_checkpoints_are_whole(tmp_path: Path) -> None:
    sharded = Kind("good", shard, ()).make(tmp_path / "sharded")

    assert find_faults(GOOD) == find_faults(CLUSTERED) == []
    assert find_faults(sharded) == []


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_verify_names_file_tensor_and_reason(kind: Kind, tmp_path: Path) -> None:
    folder = kind.make(tmp_path / "broken")

    result = CliRunner().invoke(app, ["verify", str(folder)])

    assert result.exit_code == 1, result.output
    first, *_ = result.output.splitlines()
    assert all(part in first for part in kind.parts), first
    assert first.isprintable()


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """All in one process, whose memory is limited."""
    huge = [name for name in KINDS if "huge" in name or "many" in name]
    folders = [KINDS[name].make(tmp_path / name) for name in (*huge, "all kept")]
    blocks = Kind("blocks", set_config(num_hidden_layers=10**9), ())
    folders.append(blocks.make(tmp_path / "blocks"))

    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(MEMORY), *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    lines = json.loads(result.stdout)
    assert lines == [find_faults(folder) for folder in folders]
    assert all(lines)
    assert "1000000000 blocks, but the files hold" in lines[-1][0]
