"""A real `vllm serve`: what it refuses, and what it keeps in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import put, replace, rewrite_tensors, truncate
from tests.serving import ENVIRONMENT, refusal

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("openai", reason="the openai client is not installed")

from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.validation import find_faults

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

RESIDENT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM

SUFFIXES = ("qweight", "qweight_high", "scales", "qzeros", "qzeros_high", "outliers")

def count(model):
    packed = dense = 0
    for name, parameter in model.named_parameters():
        if name.endswith(SUFFIXES):
            packed += parameter.nbytes
        elif "_proj" in name:
            dense += parameter.nbytes
    return packed, dense

if __name__ == "__main__":
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, dtype="bfloat16")
    print(json.dumps(llm.apply_model(count)[0]))
"""


def test_resident_weights_stay_packed(smollm2, tmp_path):
    script = tmp_path / "resident.py"
    script.write_text(RESIDENT)
    result = subprocess.run(
        [sys.executable, str(script), str(smollm2)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    packed, dense = json.loads(result.stdout.splitlines()[-1])
    stored = inspect_checkpoint(smollm2).linear_bytes
    assert dense == 0
    assert packed == pytest.approx(stored, rel=0.1)


def test_the_demo_script_answers(smollm2):
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples/serve_and_ask.py"), str(smollm2)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    answer = json.loads(result.stdout.splitlines()[-1])
    figures = inspect_checkpoint(smollm2)
    assert "Beijing" in answer["answer"]
    assert answer["tokens_per_second"] > 3
    assert answer["effective_bits"] == round(figures.effective_bits, 4)
    assert answer["checkpoint_bytes"] == figures.checkpoint_bytes


def assert_refused(folder: Path, reason: str, *options: str) -> None:
    code, lines = refusal(folder, *options)
    assert code != 0
    assert len(lines) == 1
    assert reason in lines[0]


def test_wrong_flag(tiny_checkpoint):
    reason = "this is a TaCQ checkpoint, not 'gptq'"
    assert_refused(tiny_checkpoint, reason, "--quantization", "gptq")


def test_truncated_shard(checkpoint_copy):
    truncate(checkpoint_copy / "model.safetensors", 100)
    assert_refused(checkpoint_copy, "model.safetensors: truncated")


def test_values_that_a_kernel_must_not_see(family_checkpoint, tmp_path):
    folder = Path(shutil.copytree(family_checkpoint("llama"), tmp_path / "broken"))
    table = "model.layers.1.mlp.up_proj.outliers"
    rewrite_tensors(folder, replace(table, put(-1, 64)))

    (fault,) = find_faults(folder)

    assert f"{table}: column 64 is outside 64" in fault
    assert_refused(folder, fault, "--max-model-len", "64")


def test_more_ranks_than_the_linears_can_be_cut_for(tiny_checkpoint):
    # Its four heads could be; vLLM itself refuses a number that does not divide them.
    code, lines = refusal(tiny_checkpoint, "--tensor-parallel-size", "2")
    assert code != 0
    assert len(lines) == 1
    assert "--tensor-parallel-size 2: the linears of this checkpoint" in lines[0]
    assert "can be cut for 1;" in lines[0]
    # In the process that serves: no other has been started.
    assert lines[0].startswith("(APIServer")
