"""A checkpoint by its name on the Hub, in vLLM."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.hub_server import hub_server
from tests.integrations.asking import transformers_tokens, vllm_worker
from tests.integrations.conftest import FamilyCheckpoint
from tests.serving import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPO = "someone/llama-TaCQ-w3"


def test_a_private_repo_is_served(
    family_checkpoint: FamilyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = family_checkpoint("llama")
    with hub_server() as hub:
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        hub.add(REPO, files, private=True)
        environment = ENVIRONMENT | hub.environment(tmp_path / "home")
        with vllm_worker(tmp_path, environment) as worker:
            answer = worker(Path(REPO))

    assert answer.tokens == transformers_tokens(checkpoint)
    (line,) = answer.log_lines
    assert f"tacq: {REPO}: 3 bits" in line
