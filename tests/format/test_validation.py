import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tacq_vllm.format.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_schema
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import check_headers, find_faults
from tests.builders import (
    Change,
    put,
    remove,
    replace,
    rewrite_schema,
    rewrite_tensors,
    truncate,
)

LINEAR = "model.layers.1.self_attn.o_proj"
OTHER = "model.layers.0.mlp.down_proj"


def add_dense(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


HEADER_FAULTS = [
    (remove(f"{LINEAR}.qweight_high"), "qweight_high: the tensor is missing"),
    (remove(f"{LINEAR}.outliers"), "outliers: the tensor is missing"),
    (
        replace(f"{LINEAR}.scales", lambda t: t.to(torch.float16)),
        "scales is F16 [64, 2], not torch.bfloat16 [64, 2]",
    ),
    (
        replace(f"{LINEAR}.qweight", lambda t: t.to(torch.int64)),
        "qweight is I64 [64, 4], not torch.int32 [64, 4]",
    ),
    (
        replace(f"{LINEAR}.qzeros", lambda t: t[:, :1].contiguous()),
        "qzeros is I32 [4, 1], not torch.int32 [4, 2]",
    ),
    (replace(f"{LINEAR}.outliers", lambda t: t[:-1].clone()), "outliers is I32 ["),
    (add_dense, "weight: a 3-bit linear has no such tensor"),
]

CONTENT_FAULTS = [
    (replace(f"{LINEAR}.scales", put(5, float("nan"))), "scales: a value is not"),
    (replace(f"{LINEAR}.scales", put(0, float("inf"))), "scales: a value is not"),
    (replace(f"{LINEAR}.outliers", put(-1, 64)), "outliers: column 64 is outside 64"),
    (replace(f"{LINEAR}.outliers", put(0, 1)), "outliers: row offsets run from 1"),
    (replace(f"{LINEAR}.outliers", put(1, -7)), "outliers: row offsets run backwards"),
    (
        replace(f"{LINEAR}.outliers", put(-1, 0x7FC0_0000)),
        "outliers: a kept value is not finite",
    ),
]


def test_a_whole_checkpoint_has_no_faults(tiny_checkpoint: Path) -> None:
    assert find_faults(tiny_checkpoint) == []


@pytest.mark.parametrize(("change", "fault"), HEADER_FAULTS + CONTENT_FAULTS)
def test_each_fault_names_its_tensor(
    checkpoint_copy: Path, change: Change, fault: str
) -> None:
    rewrite_tensors(checkpoint_copy, change)

    (line,) = find_faults(checkpoint_copy)

    assert f"{LINEAR}.{fault}" in line
    assert "\n" not in line


@pytest.mark.parametrize(("change", "fault"), HEADER_FAULTS)
def test_headers_are_refused_before_a_weight_is_read(
    checkpoint_copy: Path, change: Change, fault: str
) -> None:
    rewrite_tensors(checkpoint_copy, change)

    with pytest.raises(FormatError, match=LINEAR):
        check_headers(checkpoint_copy, read_schema(checkpoint_copy))


def test_the_layer_that_gives_logits_cannot_be_quantized(checkpoint_copy: Path) -> None:
    path = checkpoint_copy / CONFIG_NAME
    config = json.loads(path.read_text())
    block = config["quantization_config"]
    block["linears"]["lm_head"] = [64, 64]
    block["circuits"]["default"]["lm_head"] = 0
    path.write_text(json.dumps(config))

    fault = "lm_head: stored as [64, 64], but the model has no such linear"
    assert any(fault in line for line in find_faults(checkpoint_copy))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_is_not_fetched(checkpoint_copy: Path, key: str) -> None:
    path = checkpoint_copy / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "some/kernel"}))

    (line,) = find_faults(checkpoint_copy)

    assert f"{key} names code to fetch: 'some/kernel'" in line


@pytest.mark.parametrize("changes", [HEADER_FAULTS, CONTENT_FAULTS])
def test_every_linear_at_fault_has_a_line(
    checkpoint_copy: Path,
    changes: list[tuple[Change, str]],
) -> None:
    change, fault = changes[0]
    rewrite_tensors(checkpoint_copy, change)
    rewrite_tensors(
        checkpoint_copy,
        lambda tensors: tensors.update(
            {f"{OTHER}.scales": tensors[f"{OTHER}.scales"] * float("nan")}
            if changes is CONTENT_FAULTS
            else {f"{OTHER}.scales": torch.zeros(1)}
        ),
    )

    lines = find_faults(checkpoint_copy)

    assert len(lines) == 2
    assert f"{OTHER}.scales" in lines[0]
    assert f"{LINEAR}.{fault}" in lines[1]


def test_missing_folder(tmp_path: Path) -> None:
    (line,) = find_faults(tmp_path / "nowhere")

    assert line.endswith("there is no such folder")


def test_truncated_weights(checkpoint_copy: Path) -> None:
    truncate(checkpoint_copy / WEIGHTS_NAME)

    (line,) = find_faults(checkpoint_copy)

    assert line.startswith(f"{WEIGHTS_NAME}: truncated")


def test_later_format_version(checkpoint_copy: Path) -> None:
    rewrite_schema(checkpoint_copy, format_version=3)

    (line,) = find_faults(checkpoint_copy)

    assert "format_version 3 is not known" in line


def test_bits_that_leave_planes_over(checkpoint_copy: Path) -> None:
    rewrite_schema(checkpoint_copy, bits=2)

    lines = find_faults(checkpoint_copy)

    assert len(lines) == 28
    assert all("_high: a 2-bit linear has no such tensor" in line for line in lines)


def test_counts_that_differ_from_the_tables(checkpoint_copy: Path) -> None:
    counts = read_schema(checkpoint_copy).circuits["default"]
    counts[LINEAR] += 1
    rewrite_schema(checkpoint_copy, circuits={"default": counts})

    (line,) = find_faults(checkpoint_copy)

    assert f"{LINEAR}.outliers is I32 [{64 + counts[LINEAR]}]" in line
