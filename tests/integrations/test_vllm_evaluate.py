"""`tacq evaluate` with vLLM gives what it gives with Transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.scores import read_scores_file
from tests.evaluate.conftest import make_data
from tests.integrations.conftest import FamilyCheckpoint
from tests.serving import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TACQ = Path(sys.executable).with_name("tacq")


def test_both_backends_agree(
    family_checkpoint: FamilyCheckpoint, tmp_path: Path
) -> None:
    checkpoint = family_checkpoint("llama")
    # Texts of the two differ where the likeliest two tokens are equally likely.
    tasks = "wikitext2,mmlu-loss,spider"
    options = ["--data-root", make_data(tmp_path / "data"), "--window", "64"]
    options += ["--limit", "6", "--baseline", checkpoint.with_name("model")]
    scores = {}
    for backend in ("hf", "vllm"):
        file = tmp_path / f"{backend}.json"
        command = [TACQ, "evaluate", checkpoint, "--tasks", tasks, *options]
        result = subprocess.run(
            [*command, "--backend", backend, "--json", file],
            env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert result.stdout.startswith("| task |"), result.stdout
        scores[backend] = read_scores_file(file)

    assert scores["vllm"].settings["backend"] == "vllm"
    assert "vllm" in scores["vllm"].versions
    for hf, vllm in zip(scores["hf"].scores, scores["vllm"].scores, strict=True):
        assert (hf.task, hf.metric) == (vllm.task, vllm.metric)
        assert vllm.value == pytest.approx(hf.value, rel=0.005)
        assert vllm.baseline == pytest.approx(hf.baseline, rel=0.005)
        if hf.metric == "perplexity":
            assert hf.value != hf.baseline
