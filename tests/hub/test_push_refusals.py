"""What `tacq push` refuses, before anything is uploaded."""

import shutil
from pathlib import Path

import pytest

from tacq_vllm.hub.merge import CARD_NAME
from tests.builders import truncate
from tests.hub.conftest import Tacq, assert_one_line
from tests.hub_server import Hub


def test_what_is_refused(hub: Hub, tacq: Tacq, copy: Path, tmp_path: Path) -> None:
    hub.add("org/public", {})
    damaged = Path(shutil.copytree(copy, tmp_path / "damaged"))
    truncate(next(damaged.glob("*.safetensors")))
    scored = Path(shutil.copytree(copy, tmp_path / "scored"))
    (scored / "scores.json").write_text("{}")
    headed = Path(shutil.copytree(copy, tmp_path / "headed"))
    (headed / CARD_NAME).write_text("---\ntags: [\n---\n")

    outcomes = tacq(
        ["push", damaged, "org/x"],
        ["push", tmp_path / "nowhere", "org/x"],
        ["push", scored, "org/x"],
        ["push", headed, "org/x"],
        ["push", copy, "org/public", "--private"],
        ["push", copy, "tiny"],
        ["push", copy, "org/a--b"],
    )

    reasons = [
        "safetensors: truncated or not safetensors",
        "nowhere: there is no such folder; see `tacq verify`",
        "scores.json: no file of scores: scores: Field required",
        "README.md: its metadata is not valid, mend it first: ",
        "org/public: is public already; make it private on its page",
        "tiny: whose? give it as `user/tiny`",
        "org/a--b: ",
    ]
    for outcome, reason in zip(outcomes, reasons, strict=True):
        assert_one_line(outcome, reason)
    assert "org/x" not in hub.repos
    assert hub.repos["org/public"].files() == {}


def test_without_a_token(hub: Hub, tacq: Tacq, sharded: Path) -> None:
    (outcome,) = tacq(["push", sharded, "org/nobody"], HF_TOKEN="")

    assert_one_line(outcome, "org/nobody: private, or not on the Hub; log in with")
    assert "org/nobody" not in hub.repos


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode(hub: Hub, tacq: Tacq, sharded: Path, variable: str) -> None:
    earlier = len(hub.requests)

    outcomes = tacq(
        ["push", sharded, "org/offline"],
        ["push", sharded, "org/offline", "--dry-run"],
        **({"HF_HUB_OFFLINE": ""} | {variable: "1"}),
    )

    for outcome in outcomes:
        assert_one_line(outcome, "org/offline: pushing needs the Hub, and offline mode")
        assert variable in outcome.stderr
    assert len(hub.requests) == earlier
