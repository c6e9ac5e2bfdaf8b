"""A checkpoint by its name on the Hub, in vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="the openai client is not installed")

from openai import OpenAI

from tacq_vllm.format.validation import find_faults
from tests.builders import save_sharded
from tests.hostile.kinds import KINDS
from tests.hub_server import Hub
from tests.integrations.asking import make_prompts, transformers_tokens, vllm_worker
from tests.integrations.conftest import FamilyCheckpoint
from tests.integrations.vllm_worker import NEW_TOKENS
from tests.serving import ENVIRONMENT, server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TACQ = Path(sys.executable).with_name("tacq")
REPO = "someone/llama-TaCQ-w3"
BROKEN = "someone/broken"


def test_what_is_pushed_is_served(
    hub: Hub, family_checkpoint: FamilyCheckpoint, tmp_path: Path
) -> None:
    folder = save_sharded(family_checkpoint("llama"), tmp_path / "sharded")
    environment = hub.environment(tmp_path / "home")
    subprocess.run(
        [TACQ, "push", folder, REPO, "--private"],
        env=os.environ | environment,
        check=True,
    )
    assert hub.repos[REPO].private
    options = ["--dtype", "float32", "--max-model-len", "64"]
    log = tmp_path / "log"

    with server(REPO, log, *options, environment=ENVIRONMENT | environment) as base_url:
        completion = OpenAI(base_url=base_url, api_key="none").completions.create(
            model=REPO,
            prompt=make_prompts(),
            temperature=0,
            max_tokens=NEW_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )

    tokens = [choice.token_ids for choice in completion.choices]
    assert tokens == transformers_tokens(folder)
    # The first says that the repo is downloaded.
    _, line = [line for line in log.read_text().splitlines() if "] tacq: " in line]
    assert f"tacq: {REPO}: 3 bits" in line
    assert len(hub.served("safetensors$")) > 2


def test_what_is_broken_or_not_there_is_named(
    hub: Hub, family_checkpoint: FamilyCheckpoint, tmp_path: Path
) -> None:
    """What is not there by vLLM itself, which cannot know that it should be TaCQ's."""
    broken = KINDS["no norm"].make(tmp_path / "broken")
    hub.add(BROKEN, {path.name: path.read_bytes() for path in broken.iterdir()})
    files = {
        path.name: path.read_bytes() for path in family_checkpoint("llama").iterdir()
    }
    hub.add("org/open", files)
    hub.add("org/secret", files, private=True)
    environment = ENVIRONMENT | hub.environment(tmp_path / "home", token=None)

    with vllm_worker(tmp_path, environment) as worker:
        secret = worker(Path("org/secret"))
        missing = worker(Path("org/nowhere"))
        revision = worker(Path("org/open"), revision="v9")
        refused = worker(Path(BROKEN))

    unseen = "is not a local folder and is not a valid model identifier"
    for answer, line in (
        (secret, f"OSError: org/secret {unseen}"),
        (missing, f"OSError: org/nowhere {unseen}"),
        (revision, "OSError: v9 is not a valid git identifier"),
    ):
        assert answer.code != 0
        assert line in answer.log
    assert "make sure to pass a token" in secret.log
    # Before a worker starts, as of a folder.
    assert refused.code != 0
    assert find_faults(broken)[0] in refused.log_lines[-1]
