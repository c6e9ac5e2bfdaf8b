"""`tacq evaluate` with vLLM gives what it gives with Transformers."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.cli import app
from tacq_vllm.scores import read_scores_file
from tests.builders import write_lines
from tests.conftest import make_text
from tests.data.conftest import query
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
    data = make_data(tmp_path / "data")
    # Words that the model knows, so that it says something.
    questions = [query("dogs", make_text(sentences)) for sentences in (1, 2, 3)]
    write_lines(data / "spider/dev.jsonl", questions)
    options = {
        "tasks": "wikitext2,mmlu-loss,spider",
        "data-root": str(data),
        "window": 64,
        "limit": 6,
        # Less than the 128 of the model, of which vLLM wants one more for itself.
        "max-length": 120,
    }
    logs = {engine: tmp_path / f"{engine}.jsonl" for engine in ("vllm", "hf")}

    answer = serve.ask("evaluate", model, options | {"samples": str(logs["vllm"])})

    assert answer.code == 0, answer.log[-4000:]
    of_vllm = read_scores_file(answer.file)
    given = [f"--{name}={value}" for name, value in options.items()]
    file = tmp_path / "hf.json"
    given += [f"--json={file}", f"--samples={logs['hf']}"]
    result = CliRunner().invoke(app, ["evaluate", str(model), *given])
    assert result.exit_code == 0, result.output
    assert of_vllm.settings["backend"] == "vllm"
    assert "vllm" in of_vllm.versions
    for mine, theirs in zip(read_scores_file(file).scores, of_vllm.scores, strict=True):
        assert (mine.task, mine.metric) == (theirs.task, theirs.metric)
        assert theirs.value == pytest.approx(mine.value, rel=0.005)
        assert theirs.stderr == pytest.approx(mine.stderr, rel=0.005, abs=1e-6)
    texts = written(logs["hf"])
    assert len(set(texts)) == 3
    assert all(texts)
    assert written(logs["vllm"]) == texts


def written(log: Path) -> list[str]:
    """The answers that a sample log has the text of.

    vLLM decodes one together with its prompt, and keeps the space between them.
    """
    lines = map(json.loads, log.read_text().splitlines())
    return [line["text"].strip() for line in lines if "text" in line]
