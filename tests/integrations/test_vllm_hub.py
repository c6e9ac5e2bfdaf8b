"""A checkpoint by its name on the Hub, in vLLM."""

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.format.validation import find_faults
from tests.hostile.kinds import KINDS
from tests.hub_server import hub_server
from tests.integrations.asking import transformers_tokens, vllm_worker
from tests.integrations.conftest import FamilyCheckpoint
from tests.serving import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPO = "someone/llama-TaCQ-w3"
BROKEN = "someone/broken"


def test_a_private_repo_is_served(
    family_checkpoint: FamilyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = family_checkpoint("llama")
    broken = KINDS["no norm"].make(tmp_path / "broken")
    with hub_server() as hub:
        hub.add(BROKEN, {path.name: path.read_bytes() for path in broken.iterdir()})
        files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        hub.add(REPO, files, private=True)
        environment = ENVIRONMENT | hub.environment(tmp_path / "home")
        with vllm_worker(tmp_path, environment) as worker:
            answer = worker(Path(REPO))
            refused = worker(Path(BROKEN))

    assert answer.tokens == transformers_tokens(checkpoint)
    _, line = answer.log_lines
    assert f"tacq: {REPO}: 3 bits" in line
    # Before a worker starts, as of a folder.
    assert refused.code != 0
    assert find_faults(broken)[0] in refused.log_lines[-1]
