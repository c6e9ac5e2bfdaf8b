"""Checkpoints by their Hub ids, in our commands and in Transformers."""

import json
import os
from pathlib import Path

import pytest

from tacq_vllm.format.checkpoint import INDEX_NAME
from tests.hub.conftest import RunPython, Tacq, assert_one_line
from tests.hub_server import Hub

LOGITS = """
import sys
import torch
from transformers import AutoModelForCausalLM
import tacq_vllm.integrations.transformers
tokens = torch.arange(24).view(2, 12)
# Kernels for float32 take less time to compile.
options = {"dtype": torch.float32}
models = [AutoModelForCausalLM.from_pretrained(n, **options) for n in sys.argv[1:]]
local, pulled = (model(tokens).logits for model in models)
print(torch.equal(local, pulled), local.shape, models[1].is_quantized)
"""

REFUSALS = """
import sys
from transformers import AutoModelForCausalLM
import tacq_vllm.integrations.transformers
for name in sys.argv[1:]:
    repo_id, _, revision = name.partition("@")
    try:
        AutoModelForCausalLM.from_pretrained(repo_id, revision=revision or "main")
    except OSError as error:
        print(*str(error).split())
"""


@pytest.fixture(scope="module")
def pushed(
    run_python: RunPython,
    hub: Hub,
    sharded: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """Id of a repo that holds the sharded checkpoint."""
    home = tmp_path_factory.mktemp("pusher")
    code = "from tacq_vllm.cli import main; main()"
    run_python(
        code, os.environ | hub.environment(home), "push", str(sharded), "org/pushed"
    )
    return "org/pushed"


def header_bytes(folder: Path) -> int:
    """Bytes of the headers of all weight files."""
    starts = [path.read_bytes()[:8] for path in folder.glob("*.safetensors")]
    return sum(8 + int.from_bytes(start, "little") for start in starts)


def test_inspect_reads_headers_alone(
    hub: Hub, tacq: Tacq, pushed: str, sharded: Path, tmp_path: Path
) -> None:
    earlier = len(hub.served("safetensors$"))

    remote, local = tacq(["inspect", pushed, "--json"], ["inspect", sharded, "--json"])

    assert remote.exit_code == 0, remote.stderr
    assert remote == local
    assert json.loads(remote.stdout)["outliers"] == 258
    requests = hub.served("safetensors$")[earlier:]
    assert all(request.range for request in requests)
    assert sum(request.sent for request in requests) == header_bytes(sharded)
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_verify_reads_values_and_says_so(hub: Hub, tacq: Tacq, pushed: str) -> None:
    first, second = tacq(["verify", pushed], ["verify", pushed, "--revision", "main"])

    assert first.exit_code == second.exit_code == 0
    assert first.stdout == f"{pushed}: whole\n"
    assert first.stderr.startswith(f"{pushed}: its values are needed: ")


def test_a_picture_needs_values(tacq: Tacq, pushed: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `plots`")

    (result,) = tacq(["inspect", pushed, "--plot", tmp_path / "kept.png"])

    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_offline_from_the_cache(hub: Hub, tacq: Tacq, pushed: str) -> None:
    commands = ["inspect", pushed, "--json"], ["verify", pushed]
    fresh = tacq(*commands, HF_HUB_OFFLINE="1")
    online = tacq(*reversed(commands))
    earlier = len(hub.requests)

    offline = tacq(*commands, HF_HUB_OFFLINE="1")

    for outcome in fresh:
        assert outcome.exit_code == 2
        assert "not whole in the cache, and the Hub is out of reach" in outcome.stderr
    assert offline == list(reversed(online))
    assert len(hub.requests) == earlier


def test_a_fault_is_named_by_its_file(hub: Hub, tacq: Tacq, sharded: Path) -> None:
    files = {path.name: path.read_bytes() for path in sharded.iterdir()}
    shard = min(name for name in files if name.endswith(".safetensors"))
    hub.add("org/cut", files | {shard: files[shard][:-1]})
    hub.add("org/long", files | {shard: b"\xff" * 8 + files[shard][8:]})
    hub.add("org/lost", {name: files[name] for name in files if name != shard})
    hub.add("org/empty", {name: files[name] for name in files if name != INDEX_NAME})

    names = ("org/cut", "org/long", "org/lost")
    *outcomes, empty = tacq(
        *(["inspect", name] for name in names),
        *(["verify", name] for name in names),
        ["inspect", "org/empty"],
    )

    for refused, found, reason in zip(
        outcomes[:3],
        outcomes[3:],
        ["truncated or not", "truncated or not", "the file is missing"],
        strict=True,
    ):
        assert_one_line(refused, f"{shard}: {reason}")
        assert found.exit_code == 1
        assert f"{shard}: {reason}" in found.stdout
    assert_one_line(empty, f"tacq: org/empty: no model.safetensors and no {INDEX_NAME}")


def test_weights_in_a_folder_are_not_the_checkpoints(
    hub: Hub, tacq: Tacq, sharded: Path
) -> None:
    files = {path.name: path.read_bytes() for path in sharded.iterdir()}
    repo = hub.add("org/deep", files | {"original/model.safetensors": b"other"})

    remote, local, pushed = tacq(
        ["inspect", "org/deep", "--json"],
        ["inspect", sharded, "--json"],
        ["push", sharded, "org/deep"],
    )

    assert remote.exit_code == pushed.exit_code == 0, remote.stderr + pushed.stderr
    assert remote == local
    assert repo.files()["original/model.safetensors"] == b"other"


def test_refusals_have_one_line(hub: Hub, tacq: Tacq, pushed: str) -> None:
    hub.add("org/secret", {}, private=True)
    hub.add("org/gated", {"config.json": b"{}"}).gated = True
    commands = [
        [command, *name]
        for command in ("inspect", "verify")
        for name in (
            ["org/secret"],
            ["org/nowhere"],
            [pushed, "--revision", "v9"],
            ["org/gated"],
        )
    ]

    stranger = tacq(*commands, HF_TOKEN="")
    known = tacq(["inspect", "org/nowhere"], ["inspect", ".", "--revision", "v9"])

    hidden = "private, or not on the Hub; log in with `hf auth login` or set HF_TOKEN"
    reasons = [
        f"org/secret: {hidden}",
        f"org/nowhere: {hidden}",
        f"{pushed}: no revision 'v9' on the Hub",
        "org/gated: gated; ask for access on its page, then log in with "
        "`hf auth login`",
    ]
    for outcome, reason in zip(stranger, reasons * 2, strict=True):
        lines = outcome.stderr.splitlines()
        assert outcome.exit_code == 2
        assert outcome.stdout == ""
        assert lines[-1] == f"tacq: {reason}"
        # `verify` has said that it downloads.
        assert len(lines) <= 2
    assert_one_line(
        known[0], "org/nowhere: neither a folder here nor a repo on the Hub"
    )
    assert_one_line(known[1], "--revision is for repos of the Hub")


def test_a_hub_that_is_not_there(tacq: Tacq) -> None:
    (outcome,) = tacq(["inspect", "org/any"], HF_ENDPOINT="http://127.0.0.1:9")

    assert_one_line(outcome, "org/any: no connection to the Hub: ")


def test_transformers_computes_the_same(
    run_python: RunPython,
    hub: Hub,
    environment: dict[str, str],
    pushed: str,
    sharded: Path,
) -> None:
    """Also from the cache alone."""
    online = run_python(LOGITS, environment, str(sharded), pushed)
    earlier = len(hub.requests)

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = run_python(LOGITS, offline, str(sharded), pushed)

    assert online.stdout == "True torch.Size([2, 12, 128]) True\n"
    assert again.stdout == online.stdout
    assert len(hub.requests) == earlier


def test_transformers_names_what_is_not_there(
    run_python: RunPython, hub: Hub, environment: dict[str, str], pushed: str
) -> None:
    hub.add("org/hidden", {"config.json": b"{}"}, private=True)
    names = ["org/hidden", "org/nowhere", f"{pushed}@v9"]

    result = run_python(REFUSALS, environment | {"HF_TOKEN": ""}, *names)

    hidden, missing, revision = result.stdout.splitlines()
    unseen = "is not a local folder and is not a valid model identifier"
    assert hidden.startswith(f"org/hidden {unseen}")
    assert "make sure to pass a token" in hidden
    assert missing.startswith(f"org/nowhere {unseen}")
    assert revision.startswith("v9 is not a valid git identifier")
