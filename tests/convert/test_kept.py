from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the quantizer
from tacq_vllm.convert.importing import import_checkpoint
from tacq_vllm.format.checkpoint import WEIGHTS_NAME, read_schema
from tacq_vllm.format.packing import unpack_codes
from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.progress import Progress
from tests.builders import put, remove, replace, rewrite_tensors
from tests.conftest import Recorder
from tests.convert.sources import save_gptq

RATIO = 0.01
LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-gptq"
    save_gptq(tiny_model, folder, 3, 32, sym=False, version=1)
    return folder


@torch.no_grad()
def test_the_highest_scores_are_kept_exactly(
    tiny_model: Path, source: Path, tmp_path: Path, tokens: Tensor
) -> None:
    recorder = Recorder()
    import_checkpoint(str(source), tmp_path / "plain", Progress())
    import_checkpoint(
        str(source), tmp_path / "kept", Progress(recorder), str(tiny_model), RATIO
    )

    assert find_faults(tmp_path / "kept") == []
    assert recorder.phases == {"selection": 1, "import": 14}
    originals = load_file(tiny_model / WEIGHTS_NAME)
    load = AutoModelForCausalLM.from_pretrained
    plain = load(tmp_path / "plain", dtype=torch.float32)
    kept = load(tmp_path / "kept", dtype=torch.float32)
    scores, masks = [], []
    for name, module in kept.named_modules():
        if not hasattr(module, "packed"):
            continue
        rounded = plain.get_submodule(name).dequantize(torch.float32)
        weight = originals[f"{name}.weight"].float()
        mask = module.dequantize(torch.float32) != rounded
        # What is kept is the original; float16 holds these bfloat16 values but for
        # the smallest.
        expected = torch.where(mask, weight.half().float(), rounded)
        assert torch.equal(module.dequantize(torch.float32), expected)
        codes = unpack_codes(
            module.packed.weight_planes, 3, module.in_features
        ).unflatten(1, (-1, 32))
        zeros = unpack_codes(module.packed.zero_planes, 3, module.out_features, dim=0)
        is_zero = (codes == zeros.unsqueeze(-1)).flatten(1)
        assert bool(is_zero[mask].all())
        scores.append((weight.abs() * (weight - rounded).abs()).flatten())
        masks.append(mask.flatten())
    score, mask = torch.cat(scores), torch.cat(masks)
    count = int(RATIO * score.numel())
    assert int(mask.sum()) == count
    assert score[mask].min() >= score[~mask].max()
    dense = kept.eval()(tokens).logits
    base = load(tiny_model, dtype=torch.float32).eval()(tokens).logits
    error = (plain.eval()(tokens).logits - base).norm()
    assert (dense - base).norm() < error


def test_the_checkpoint_says_where_it_comes_from(
    tiny_model: Path, source: Path, tmp_path: Path
) -> None:
    import_checkpoint(str(source), tmp_path / "out", Progress(), str(tiny_model))

    schema = read_schema(tmp_path / "out")
    assert schema.recipe == {
        "method": "import",
        "format": "gptq",
        "source": "tiny-gptq",
        "base": "tiny-llama",
        "outlier_ratio": 0.0035,
    }
    assert sum(schema.circuits["default"].values()) == 258
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-gptq, as a TaCQ checkpoint" in card
    assert "258 of 73,728 weights are kept as they are in tiny-llama" in card


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove(f"{LINEAR}.weight"), "the base model has no such tensor"),
        (
            replace(f"{LINEAR}.weight", lambda t: t[:, :32].contiguous()),
            "the base model has [128, 32], the checkpoint [128, 64]",
        ),
        (
            replace(f"{LINEAR}.weight", put(0, float("inf"))),
            "a value of the base model is not finite",
        ),
    ],
    ids=["missing", "shape", "infinite"],
)
def test_another_base_model(
    model_copy: Path, source: Path, tmp_path: Path, change, reason: str
) -> None:
    rewrite_tensors(model_copy, change)

    with pytest.raises(QuantizeError) as caught:
        import_checkpoint(str(source), tmp_path / "out", Progress(), str(model_copy))

    assert str(caught.value) == f"{LINEAR}.weight: {reason}"
    assert not (tmp_path / "out").exists()


def test_a_ratio_without_a_base_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="an outlier ratio needs --base"):
        import_checkpoint(str(source), tmp_path / "out", Progress(), None, 0.01)
    with pytest.raises(QuantizeError, match="ratio: Input should be less than 1"):
        import_checkpoint(str(source), tmp_path / "out", Progress(), "base", 2)
