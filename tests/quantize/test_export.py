import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tacq_vllm.config import Recipe, override_recipe
from tacq_vllm.format.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointReader,
    read_schema,
)
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.validation import find_faults, load_linear
from tacq_vllm.kernels.reference import dequantize
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.export import REPORT_NAME
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir
from tests.builders import rewrite_tensors
from tests.conftest import (
    TinyLlama,
    is_equal,
    open_model,
    quick,
    run_pipeline,
    save_model,
)


def test_the_checkpoint_is_the_base_model_but_for_its_linears(
    tiny_model: Path, tiny_checkpoint: Path
) -> None:
    original = load_file(tiny_model / WEIGHTS_NAME)
    schema = read_schema(tiny_checkpoint)

    with CheckpointReader(tiny_checkpoint) as reader:
        for name, tensor in original.items():
            linear = name.removesuffix(".weight")
            if linear not in schema.linears:
                assert torch.equal(reader.load(name), tensor)
                continue
            W = tensor.float()
            weight = dequantize(load_linear(reader, schema, linear))
            # Three bits of a normal distribution.
            assert (weight - W).norm() < 0.35 * W.norm()


def test_report_and_recipe(
    tiny_base: BaseModel, tiny_checkpoint: Path, tiny_recipe: Recipe, text_file: Path
) -> None:
    schema = read_schema(tiny_checkpoint)
    lines = (tiny_checkpoint / REPORT_NAME).read_text().splitlines()
    reports = [json.loads(line) for line in lines]

    assert [report["name"] for report in reports] == list(tiny_base.linears())
    for report in reports:
        assert report["bits"] == 3
        assert report["group_size"] == 32
        assert report["outliers"] == schema.num_outliers(report["name"])
        assert 0 < report["error"] < 0.1
        assert report["damp_percent"] == 0.01
    assert not {"squeezellm", "spqr", "slim_llm"} & set(schema.recipe)
    stored = Recipe.model_validate(schema.recipe)
    assert stored.calibration.sources == (text_file.name,)
    assert stored.gptq == tiny_recipe.gptq
    assert str(text_file.parent) not in (tiny_checkpoint / "README.md").read_text()


def test_the_sizes_it_can_be_cut_for_follow_from_heads_and_groups(
    tiny_llama: TinyLlama, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    base = open_model(tiny_llama(head_dim=32), tmp_path / "work")

    run_pipeline(base, quick(tiny_recipe), tmp_path / "out", tmp_path / "work")

    # Four heads, two of k and v; groups of 32 in rows of 128 columns.
    assert read_schema(tmp_path / "out").tensor_parallel_sizes == (1, 2, 4)


def test_several_shards(
    tiny_base: BaseModel, tiny_checkpoint: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = override_recipe(tiny_recipe, {"export.max_shard_bytes": 20_000})

    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    assert (tmp_path / "out" / INDEX_NAME).is_file()
    whole = load_file(tiny_checkpoint / WEIGHTS_NAME)
    parts: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        parts |= load_file(path)
    assert is_equal(parts, whole)


def test_tied_embeddings_are_stored_once(
    tiny_llama: TinyLlama, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    model = tiny_llama(torch.float16, tie_word_embeddings=True)
    base = open_model(model, tmp_path / "work")
    recipe = quick(tiny_recipe, **{"method": "gptq", "export.dtype": "float16"})

    run_pipeline(base, recipe, tmp_path / "out", tmp_path / "work")

    stored = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    assert {t.dtype for t in stored.values()} == {torch.int32, torch.float16}


def test_a_value_that_the_stored_type_cannot_hold(
    model_copy: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    rewrite_tensors(model_copy, lambda tensors: tensors["lm_head.weight"].fill_(1e5))
    base = open_model(model_copy, tmp_path / "work")
    recipe = quick(tiny_recipe, **{"method": "gptq", "export.dtype": "float16"})

    with pytest.raises(
        QuantizeError, match=r"lm_head\.weight: .* not finite in float16"
    ):
        run_pipeline(base, recipe, tmp_path / "out", tmp_path / "work")

    assert {path.name for path in tmp_path.iterdir()} == {"model", "work"}


def test_an_output_that_exists_is_refused(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")

    with pytest.raises(QuantizeError, match="exists already"):
        run_pipeline(tiny_base, tiny_recipe, tmp_path / "out", tmp_path / "work")

    assert (tmp_path / "out" / "precious").read_text() == "data"
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_is_used(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()

    recipe = quick(tiny_recipe, method="gptq")
    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []


def test_a_failing_card_leaves_no_folder(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    def fail(folder: Path, schema: QuantizationSchema) -> None:
        # All weights are there, but nothing takes the folder for a checkpoint yet.
        assert schema.linears
        assert find_faults(folder) == [f"{folder / 'config.json'}: the file is missing"]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        quantize_model(
            tiny_base,
            quick(tiny_recipe, method="gptq"),
            tmp_path / "out",
            WorkDir(tmp_path / "work"),
            Progress(),
            fail,
        )

    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_leftovers_of_a_killed_run_are_replaced(
    tiny_base: BaseModel, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"old")

    recipe = quick(tiny_recipe, method="gptq")
    run_pipeline(tiny_base, recipe, tmp_path / "out", tmp_path / "work")

    assert find_faults(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert not leftover.exists()


def test_a_generation_config_stays_as_it_was_published(
    model_copy: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Transformers itself would not save this one."""
    published = '{"temperature": 0.6, "top_p": 0.9}'
    (model_copy / "generation_config.json").write_text(published)
    base = open_model(model_copy, tmp_path / "work")

    run_pipeline(
        base, quick(tiny_recipe, method="gptq"), tmp_path / "out", tmp_path / "work"
    )

    assert (tmp_path / "out" / "generation_config.json").read_text() == published


def test_names_of_the_modules_where_the_linears_were_published_otherwise(
    tiny_llama: TinyLlama, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """As a decoder without its head is saved."""
    whole = LlamaForCausalLM.from_pretrained(
        tiny_llama(torch.bfloat16, tie_word_embeddings=True), dtype=torch.bfloat16
    )
    base = open_model(save_model(whole.model, tmp_path / "model"), tmp_path / "work")

    run_pipeline(
        base, quick(tiny_recipe, method="gptq"), tmp_path / "out", tmp_path / "work"
    )

    stored = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert find_faults(tmp_path / "out") == []
    assert all(name.startswith("model.") for name in stored)
    assert not any(name.endswith("q_proj.weight") for name in stored)
