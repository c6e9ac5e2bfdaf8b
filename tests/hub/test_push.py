"""`tacq push` by the real client, to a Hub on loopback."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tacq_vllm.format.checkpoint import INDEX_NAME, WEIGHTS_NAME
from tacq_vllm.hub.merge import BEGIN, CARD_NAME
from tests.hub.conftest import RunPython, Tacq, assert_one_line
from tests.hub_server import TOKEN, Hub

TACQ = Path(sys.executable).with_name("tacq")

PARAGRAPH = (
    "I asked it about rivers: it knows them all.\n\n```\nname a river\n\nthe Elbe\n```"
)

RACE = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from tacq_vllm.hub.errors import HubError
from tacq_vllm.hub.push import plan_push, upload
plan = plan_push(Path(sys.argv[1]), "org/raced", False, None)
HfApi().upload_file(
    path_or_fileobj=b"New.", path_in_repo="README.md", repo_id="org/raced"
)
try:
    upload(plan)
except HubError as error:
    print(error)
"""


def shard_hashes(folder: Path) -> set[str]:
    return {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def card_of(hub: Hub, repo_id: str, branch: str = "main") -> ModelCard:
    return ModelCard(hub.repos[repo_id].files(branch)[CARD_NAME].decode())


def test_every_file_arrives_with_the_repo_in_the_card(
    hub: Hub, tacq: Tacq, sharded: Path, tmp_path: Path
) -> None:
    before = folder_files(sharded)

    (result,) = tacq(["push", sharded, "org/whole"])

    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{hub.url}/org/whole/commit/")
    assert folder_files(sharded) == before
    files = hub.repos["org/whole"].files()
    assert files.keys() == {*before, ".gitattributes"}
    assert all(files[name] == before[name] for name in before if name != CARD_NAME)
    card = card_of(hub, "org/whole")
    assert "vllm serve org/whole\n" in card.text
    assert 'from_pretrained("org/whole")' in card.text
    assert not hub.repos["org/whole"].private
    # The client reads the token; nobody writes it.
    cached = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    stored = [*files.values(), *(path.read_bytes() for path in cached)]
    assert not any(TOKEN.encode() in content for content in stored)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)]
)
def test_an_upload_that_is_stopped_goes_on_where_it_was(
    hub: Hub,
    tacq: Tacq,
    environment: dict[str, str],
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    exit_code: int,
) -> None:
    repo_id = f"org/stopped-by-{number.name}"
    hub.objects.clear()
    hub.was_cut.clear()
    monkeypatch.setattr(hub, "whole_uploads", 2)
    process = subprocess.Popen(
        [TACQ, "push", sharded, repo_id],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background of a shell are told to ignore it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert hub.was_cut.wait(120)
    deadline = time.monotonic() + 60
    while len(hub.objects) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, words = process.communicate()
    assert process.returncode == exit_code
    if number == signal.SIGINT:
        # Threads of the client may still have something to say.
        assert "\ntacq: interrupted; the same command" in f"\n{words}"
        assert "Traceback" not in words
    hub.whole_uploads = -1
    arrived = set(hub.objects)
    assert len(arrived) == 2
    assert hub.repos[repo_id].files().keys() == {".gitattributes"}
    earlier = len(hub.requests)

    (result,) = tacq(["push", sharded, repo_id])

    assert result.exit_code == 0, result.stderr
    sent = [request.path for request in hub.requests[earlier:]]
    sent = [path.rpartition("/")[2] for path in sent if path.startswith("/lfs/")]
    assert sorted(sent) == sorted(shard_hashes(sharded) - arrived)
    assert shard_hashes(sharded) <= set(hub.objects)
    assert hub.repos[repo_id].files().keys() >= set(folder_files(sharded)) - {CARD_NAME}


def test_a_hub_that_fails_in_the_middle(
    hub: Hub, tacq: Tacq, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers that it cannot, or not at all, however often it is asked."""
    hub.objects.clear()
    failures = {
        "/lfs/org/uploading/": 503,
        "/org/committing/commit/": 500,
        "/org/silent/commit/": 0,
    }
    monkeypatch.setattr(hub, "failures", failures)
    repo_ids = ["org/uploading", "org/committing", "org/silent"]

    outcomes = tacq(*(["push", sharded, repo_id] for repo_id in repo_ids))

    for repo_id, outcome in zip(repo_ids, outcomes, strict=True):
        assert_one_line(outcome, f"tacq: {repo_id}: ")
        assert outcome.stderr.endswith(
            "the same command goes on where this one stopped\n"
        )
        assert hub.repos[repo_id].files().keys() == {".gitattributes"}
    assert "503" in outcomes[0].stderr
    assert "500" in outcomes[1].stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("size=4k", "No space left on device")],
)
def test_a_cache_that_takes_nothing(
    hub: Hub,
    tacq: Tacq,
    sharded: Path,
    mount: Callable[..., Path],
    options: str,
    reason: str,
) -> None:
    """The card that is published is read through it."""
    card = b"Of a person.\n" * 1000
    hub.add("org/uncached", {CARD_NAME: card})

    (outcome,) = tacq(["push", sharded, "org/uncached"], HF_HOME=str(mount(options)))

    *_, line = outcome.stderr.splitlines()
    assert outcome.exit_code == 2
    assert line.startswith("tacq: org/uncached: ")
    assert reason in line
    assert "Traceback" not in outcome.stderr
    assert hub.repos["org/uncached"].files() == {CARD_NAME: card}


def test_a_second_push_keeps_what_a_person_added(
    hub: Hub, tacq: Tacq, copy: Path
) -> None:
    tacq(["push", copy, "org/edited"])
    repo = hub.repos["org/edited"]
    text = repo.files()[CARD_NAME].decode()
    text = text.replace("---\n", "---\n# Of a person\nlanguage: en # or so\n", 1)
    text = text.replace("- 3-bit\n", "- 3-bit\n- rivers\n")
    hub.add("org/edited", repo.files() | {CARD_NAME: f"{text}\n{PARAGRAPH}\n".encode()})
    (copy / "report.jsonl").write_text("{}\n")
    local = (copy / CARD_NAME).read_text()
    (copy / CARD_NAME).write_text(local.replace(BEGIN, f"Mine.\n\n{BEGIN}"))

    outcomes = tacq(["push", copy, "org/edited"], ["push", copy, "org/edited"])

    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    files = hub.repos["org/edited"].files()
    assert files["report.jsonl"] == b"{}\n"
    new = files[CARD_NAME].decode()
    assert new == f"{text}\n{PARAGRAPH}\n\nMine.\n"


def test_dry_run_uploads_nothing(hub: Hub, tacq: Tacq, sharded: Path) -> None:
    hub.add("org/old", {CARD_NAME: b"Of a person.", WEIGHTS_NAME: b"old"})
    before = len(hub.requests), dict(hub.objects), hub.repos["org/old"].files()

    new, old, branch = tacq(
        ["push", sharded, "org/new", "--private", "--dry-run"],
        ["push", sharded, "org/old", "--dry-run"],
        ["push", sharded, "org/old", "--revision", "other", "--dry-run"],
    )

    assert all(request.method != "PUT" for request in hub.requests[before[0] :])
    assert all(request.method != "POST" for request in hub.requests[before[0] :])
    assert (dict(hub.objects), hub.repos["org/old"].files()) == before[1:]
    assert "org/new" not in hub.repos
    for path in sharded.glob("*.safetensors"):
        assert f"{path.stat().st_size:>15,}  {path.name}\n" in new.stdout
    assert "for org/new, branch main, a new private repo; its card:" in new.stdout
    assert "\n---\nlibrary_name: transformers\n" in new.stdout
    assert "vllm serve org/new\n" in new.stdout
    assert f"        deleted  {WEIGHTS_NAME}\n" in old.stdout
    assert "for org/old, branch main, the repo; its card:" in old.stdout
    assert "\nOf a person.\n" in old.stdout
    assert "for org/old, branch other, a new branch; its card:" in branch.stdout


def test_a_branch_that_is_new(hub: Hub, tacq: Tacq, sharded: Path) -> None:
    results = tacq(
        ["push", sharded, "org/branched", "--revision", "w3"],
        ["push", sharded, "org/branched", "--revision", "w3"],
        ["inspect", "org/branched", "--revision", "w3"],
    )

    assert [result.exit_code for result in results] == [0, 0, 0]
    repo = hub.repos["org/branched"]
    assert repo.files("main").keys() == {".gitattributes"}
    assert repo.files("w3").keys() >= {CARD_NAME, INDEX_NAME}


def test_weight_files_of_an_earlier_push_go(
    hub: Hub, tacq: Tacq, sharded: Path, tiny_checkpoint: Path
) -> None:
    results = tacq(
        ["push", sharded, "org/remade"],
        ["push", tiny_checkpoint, "org/remade"],
        ["verify", "org/remade"],
    )

    assert [result.exit_code for result in results] == [0, 0, 0]
    names = hub.repos["org/remade"].files().keys()
    assert [name for name in names if "safetensors" in name] == [WEIGHTS_NAME]


def test_other_weight_files_are_not_kept_beside_ours(
    hub: Hub, tacq: Tacq, sharded: Path
) -> None:
    before = hub.add("org/mixed", {"consolidated.safetensors": b"other"}).files()

    (outcome,) = tacq(["push", sharded, "org/mixed"])

    assert_one_line(outcome, "org/mixed: consolidated.safetensors there is a weight")
    assert hub.repos["org/mixed"].files() == before


def test_what_is_hidden_stays_here(hub: Hub, tacq: Tacq, copy: Path) -> None:
    (copy / ".cache").mkdir()
    (copy / ".cache" / "notes").write_text("private")
    (copy / ".env").write_text("private")
    (copy / "extra").mkdir()
    (copy / "extra" / "plot.txt").write_text("public")

    tacq(["push", copy, "org/hidden"])

    names = hub.repos["org/hidden"].files().keys()
    assert "extra/plot.txt" in names
    assert {name for name in names if name.startswith(".")} == {".gitattributes"}


def test_a_hub_without_xet(hub: Hub, tacq: Tacq, sharded: Path) -> None:
    pytest.importorskip("hf_xet", reason="uploads go by LFS")

    (outcome,) = tacq(["push", sharded, "org/plain"], HF_HUB_DISABLE_XET="0")

    *_, line = outcome.stderr.splitlines()
    assert outcome.exit_code == 2
    assert line.startswith("tacq: org/plain: ")
    assert line.endswith("; a Hub without Xet takes uploads with HF_HUB_DISABLE_XET=1")
    assert hub.repos["org/plain"].files().keys() == {".gitattributes"}


def test_a_card_that_is_edited_meanwhile(
    run_python: RunPython, hub: Hub, environment: dict[str, str], sharded: Path
) -> None:
    hub.add("org/raced", {CARD_NAME: b"Of a person."})

    result = run_python(RACE, environment, str(sharded))

    assert result.stdout.startswith("org/raced: ")
    assert "412" in result.stdout
    assert hub.repos["org/raced"].files()[CARD_NAME] == b"New."


@pytest.mark.parametrize("private", [True, False])
def test_visibility(hub: Hub, tacq: Tacq, sharded: Path, private: bool) -> None:
    repo_id = f"org/visible-{private}"

    tacq(["push", sharded, repo_id, *(["--private"] if private else [])])

    assert hub.repos[repo_id].private is private


def test_quantizing_a_model_of_the_hub(
    hub: Hub, tacq: Tacq, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    card = (
        b"---\nlicense: other\nlicense_name: river\nlicense_link: LICENSE\n---\nBase.\n"
    )
    hub.add("org/base", folder_files(tiny_model) | {CARD_NAME: card})
    command = ["quantize", "org/base", "--output", tmp_path / "out", "--device", "cpu"]
    options = "--method gptq --group-size 32 --num-samples 2 --seq-len 32".split()

    made, pushed = tacq(
        [*command, "--calibration", text_file, *options],
        ["push", tmp_path / "out", "org/base-TaCQ-w3"],
    )

    assert made.exit_code == pushed.exit_code == 0, made.stderr + pushed.stderr
    data = card_of(hub, "org/base-TaCQ-w3").data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "other"
    assert data["license_name"] == "river"
    assert data["license_link"] == f"{hub.url}/org/base/resolve/main/LICENSE"
    local = ModelCard.load(tmp_path / "out" / CARD_NAME).data.to_dict()
    assert local == data
    text = json.dumps(data) + card_of(hub, "org/base-TaCQ-w3").text
    assert str(tmp_path) not in text
