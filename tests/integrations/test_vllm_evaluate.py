"""`tacq evaluate` with vLLM gives what it gives with Transformers."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.cli import app
from tacq_vllm.scores import read_scores_file
from tests.evaluate.conftest import make_data
from tests.integrations.asking import Worker
from tests.integrations.conftest import FamilyCheckpoint

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("packed", [True, False])
def test_both_backends_agree(
    serve: Worker, family_checkpoint: FamilyCheckpoint, tmp_path: Path, packed: bool
) -> None:
    checkpoint = family_checkpoint("llama")
    model = checkpoint if packed else checkpoint.with_name("model")
    options = {
        "tasks": "wikitext2,mmlu-loss,spider",
        "data-root": str(make_data(tmp_path / "data")),
        "window": 64,
        "limit": 6,
        # Less than the 128 of the model, of which vLLM wants one more for itself.
        "max-length": 120,
    }

    answer = serve.ask("evaluate", model, options)

    assert answer.code == 0, answer.log[-4000:]
    of_vllm = read_scores_file(answer.file)
    given = [f"--{name}={value}" for name, value in options.items()]
    file = tmp_path / "hf.json"
    result = CliRunner().invoke(app, ["evaluate", str(model), *given, f"--json={file}"])
    assert result.exit_code == 0, result.output
    assert of_vllm.settings["backend"] == "vllm"
    assert "vllm" in of_vllm.versions
    for mine, theirs in zip(read_scores_file(file).scores, of_vllm.scores, strict=True):
        assert (mine.task, mine.metric) == (theirs.task, theirs.metric)
        assert theirs.value == pytest.approx(mine.value, rel=0.005)
        assert theirs.stderr == pytest.approx(mine.stderr, rel=0.005, abs=1e-6)
