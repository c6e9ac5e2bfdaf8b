import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.config import Recipe
from tacq_vllm.convert.dequantized import export_dequantized
from tacq_vllm.convert.folder import copy_companions
from tacq_vllm.format.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_schema
from tacq_vllm.format.schema import FormatError
from tacq_vllm.layers import TacqLinear
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tests.builders import put, replace, rewrite_tensors
from tests.conftest import Recorder, save_random
from tests.quantize.test_families import DENSE, EXPERTS, quantize

pytestmark = pytest.mark.usefixtures("no_kernels")

LOAD_WITHOUT_TACQ = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, tokens, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
assert model.dtype == torch.bfloat16
with torch.no_grad():
    out = model(load_file(tokens)["tokens"]).logits
assert "tacq_vllm" not in sys.modules
save_file({"logits": out}, logits)
"""


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def export(source: Path, output: Path, **options: int) -> Path:
    export_dequantized(source, output, Progress(), **options)
    return output


@pytest.fixture(params=["llama, biased", "phi3", "mixtral"])
def checkpoint(
    request: pytest.FixtureRequest, tiny_recipe: Recipe, tmp_path: Path
) -> Path:
    model = save_random((DENSE | EXPERTS)[request.param], tmp_path / "base")
    return quantize(model, tiny_recipe, tmp_path)


@torch.no_grad()
def test_logits_are_those_of_the_dequantized_model(
    checkpoint: Path, tmp_path: Path, tokens: Tensor
) -> None:
    expected = load(checkpoint).dequantize()

    exported = load(export(checkpoint, tmp_path / "exported"))

    assert not any(isinstance(module, TacqLinear) for module in exported.modules())
    assert torch.equal(exported(tokens).logits, expected(tokens).logits)
    weights, others = exported.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@torch.no_grad()
def test_transformers_alone_loads_it(
    tiny_checkpoint: Path, tmp_path: Path, tokens: Tensor
) -> None:
    exported = export(tiny_checkpoint, tmp_path / "exported")
    save_file({"tokens": tokens}, tmp_path / "tokens")

    subprocess.run(
        [
            *(sys.executable, "-c", LOAD_WITHOUT_TACQ),
            *(exported, tmp_path / "tokens", tmp_path / "logits"),
        ],
        check=True,
    )

    expected = load(tiny_checkpoint).dequantize()(tokens).logits
    assert torch.equal(load_file(tmp_path / "logits")["logits"], expected)


def test_the_folder_says_what_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recorder = Recorder()

    export_dequantized(tiny_checkpoint, tmp_path / "out", Progress(recorder))

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((tiny_checkpoint / "config.json").read_text())
    assert "quantization_config" not in config
    assert original == config | {"quantization_config": original["quantization_config"]}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert text == (tiny_checkpoint / name).read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the old river").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny, dequantized" in card
    assert "TaCQ checkpoint tiny (3 bits)" in card
    assert recorder.phases == {"export": len(read_schema(tiny_checkpoint).linears)}
    assert not (tmp_path / "out" / "report.jsonl").exists()


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    names = ["chat_template.jinja", "LICENSE.txt", "merges.txt", "vocab.json"]
    names += ["added_tokens.json", "special_tokens_map.json", "tokenizer.model"]
    names += ["generation_config.json"]
    source, output = tmp_path / "source", tmp_path / "output"
    output.mkdir()
    for name in (*names, "modeling.py", "README.md", "a.safetensors"):
        source.mkdir(exist_ok=True)
        (source / name).write_text(name)

    copy_companions(source, output)

    assert {path.name: path.read_text() for path in output.iterdir()} == {
        name: name for name in names
    }


def test_the_type_under_its_older_name(checkpoint_copy: Path, tmp_path: Path) -> None:
    config = checkpoint_copy / "config.json"
    text = config.read_text()
    config.write_text(
        text.replace('"dtype": "bfloat16"', '"torch_dtype": "float16"', 1)
    )

    exported = load_file(export(checkpoint_copy, tmp_path / "out") / WEIGHTS_NAME)

    weight = exported["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float16


def test_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = export(tiny_checkpoint, tmp_path / "whole")
    cut = export(tiny_checkpoint, tmp_path / "cut", max_shard_bytes=30_000)

    assert len(list(cut.glob("model-*.safetensors"))) > 3
    assert (cut / INDEX_NAME).is_file()
    shards = [load_file(path) for path in cut.glob("*.safetensors")]
    merged = {name: tensor for shard in shards for name, tensor in shard.items()}
    expected = load_file(whole / WEIGHTS_NAME)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_what_verify_refuses_is_refused(checkpoint_copy: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{index}.mlp.up_proj.scales" for index in (0, 1)]
    for name in names:
        rewrite_tensors(checkpoint_copy, replace(name, put(0, float("nan"))))

    with pytest.raises(FormatError) as caught:
        export(checkpoint_copy, tmp_path / "out")

    assert f"{names[0]}: a value is not finite" in str(caught.value)
    assert "`tacq verify` names 1 more" in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_weight_that_16_bits_cannot_hold(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj"
    rewrite_tensors(checkpoint_copy, replace(f"{name}.scales", lambda t: t * 0 + 6e4))
    config = checkpoint_copy / "config.json"
    text = config.read_text()
    # The type of the model, not that of the scales, which comes after it.
    config.write_text(text.replace('"dtype": "bfloat16"', '"dtype": "float16"', 1))

    with pytest.raises(QuantizeError, match=f"{name}: a weight is not finite"):
        export(checkpoint_copy, tmp_path / "out")

    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_an_output_that_exists(tiny_checkpoint: Path) -> None:
    with pytest.raises(QuantizeError, match="exists already"):
        export(tiny_checkpoint, tiny_checkpoint)
