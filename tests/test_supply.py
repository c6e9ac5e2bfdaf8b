"""What comes with a checkpoint is data: nothing of it runs, nothing is fetched."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tacq_vllm
from tests.hostile.good import set_config
from tests.hostile.kind import Kind
from tests.serving import ENVIRONMENT

PACKAGE = Path(tacq_vllm.__file__).parent
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "numpy.load", "np.load"}

GUARD = """
import ipaddress, pickle, socket, sys

def watch(event, values):
    if event == "socket.connect" and isinstance(values[1], tuple):
        host = values[1][0]
        if not ipaddress.ip_address(host).is_loopback:
            raise AssertionError(f"connects to {host}")
    if event == "socket.getaddrinfo":
        here = (None, "localhost", "127.0.0.1", "::1", socket.gethostname())
        if values[0] not in here:
            raise AssertionError(f"looks for {values[0]}")
    if event == "pickle.find_class":
        stack, frame = [], sys._getframe()
        while frame is not None:
            stack.append(frame.f_code.co_filename)
            frame = frame.f_back
        if any("tacq_vllm" in name or "safetensors" in name for name in stack):
            raise AssertionError(f"unpickles {values}")
"""

IMPORTS = """
import importlib, pkgutil
sys.addaudithook(watch)
import tacq_vllm
for module in pkgutil.walk_packages(tacq_vllm.__path__, "tacq_vllm."):
    if "vllm." in module.name.removeprefix("tacq_vllm.") or "triton_" in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
print("ok")
"""

TRANSFORMERS = """
import torch
sys.addaudithook(watch)
def refuse(*args, **kwargs):
    raise AssertionError("torch.load")
torch.load = refuse
import tacq_vllm.integrations.transformers
from transformers import AutoModelForCausalLM
from tacq_vllm.format.validation import find_faults
folder = sys.argv[1]
import pathlib
print(find_faults(pathlib.Path(folder)))
model = AutoModelForCausalLM.from_pretrained(folder)
print(type(model).__name__, type(model).__module__.partition(".")[0])
"""

VLLM = """
sys.addaudithook(watch)
import torch
def refuse(*args, **kwargs):
    raise AssertionError("torch.load")
torch.load = refuse
from vllm import LLM, SamplingParams
model = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=32,
    skip_tokenizer_init=True,
)
prompt = {"prompt_token_ids": [1, 5, 7]}
options = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
(output,) = model.generate([prompt], options, use_tqdm=False)
print(len(output.outputs[0].token_ids), "tokens")
"""

EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as EvilModel
"""


def run(code: str, *arguments: object, **variables: str) -> str:
    """Run code that may reach nothing but this machine, and unpickle nothing."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", GUARD + code, *map(str, arguments)],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture
def with_code(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint that brings code, and what that would write."""
    marker = tmp_path / "marker"
    auto_map = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
    }
    folder = Kind("code", set_config(auto_map=auto_map), ()).make(tmp_path / "model")
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return folder, marker


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_no_module_runs_or_unpickles_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text())

    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    called = {
        ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
    }

    assert not imported & LOADERS
    assert not called & CALLS
    assert "trust_remote_code=True" not in path.read_text()


def test_importing_reaches_for_nothing() -> None:
    assert run(IMPORTS) == "ok\n"


def test_transformers_from_a_folder_with_code(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code

    assert run(TRANSFORMERS, folder) == "[]\nLlamaForCausalLM transformers\n"
    assert not marker.exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_from_a_folder_with_code(with_code: tuple[Path, Path]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder, marker = with_code
    variables = ENVIRONMENT | {
        "HF_HUB_OFFLINE": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }

    assert "3 tokens" in run(VLLM, folder, **variables)
    assert not marker.exists()
