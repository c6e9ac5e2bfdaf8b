import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tacq_vllm.format.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from tacq_vllm.quantize.errors import QuantizeError
from tests.builders import remove, rewrite_tensors, truncate
from tests.conftest import (
    VOCAB_SIZE,
    TinyLlama,
    assert_released,
    is_equal,
    open_model,
    save_model,
    save_random,
)
from tests.interruptions import interrupted_at_file


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def test_the_name_is_the_whole_name_of_the_folder(model_copy: Path, work: Path) -> None:
    model = model_copy.rename(model_copy.with_name("tiny-1.7B"))

    assert open_model(model, work).name == "tiny-1.7B"


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A model that Transformers stores expert by expert, and holds in one tensor."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return save_random(config, tmp_path / "mixtral")


def test_a_model_that_is_stored_by_other_names(mixtral: Path, work: Path) -> None:
    base = open_model(mixtral, work)

    experts = "model.layers.0.mlp.experts"
    assert f"{experts}.gate_up_proj" in base.weights
    assert f"{experts}.gate_up_proj" not in base.published
    assert base.unquantized_modules() == {experts: 3 * 2 * 32 * 32}
    whole = MixtralForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    with base.resident() as model:
        assert is_equal(model.state_dict(), whole.state_dict())
    assert_released(base)


def test_other_names_are_stored_once(mixtral: Path, work: Path) -> None:
    base = open_model(mixtral, work)
    (converted,) = work.iterdir()
    times = {path: path.stat().st_mtime_ns for path in converted.iterdir()}

    again = open_model(mixtral, work)

    assert list(work.iterdir()) == [converted]
    assert {path: path.stat().st_mtime_ns for path in converted.iterdir()} == times
    assert again.fingerprint() == base.fingerprint()


@pytest.mark.parametrize("count", [1, 2])
def test_other_names_that_were_not_stored_whole_are_read_again(
    mixtral: Path, work: Path, count: int
) -> None:
    with interrupted_at_file(count):
        open_model(mixtral, work)

    base = open_model(mixtral, work)

    whole = MixtralForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    with base.resident() as model:
        assert is_equal(model.state_dict(), whole.state_dict())
    assert [path.name[:8] for path in work.iterdir()] == ["weights-"]


def test_another_configuration_has_other_names_read_again(
    mixtral: Path, work: Path
) -> None:
    """Which tensors there are, and their type, depend on it."""
    open_model(mixtral, work)
    path = mixtral / CONFIG_NAME
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 2}))

    with pytest.raises(QuantizeError, match="are missing"):
        open_model(mixtral, work)


def test_another_transformers_has_other_names_read_again(
    mixtral: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model(mixtral, work)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "5.0.0")

    open_model(mixtral, work)

    assert len(list(work.iterdir())) == 2


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Save a Llama as llama.cpp does: each head's queries and keys interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    tokens += [f"t{number}" for number in range(len(tokens), config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers
    ).mapping
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads}.get(name.split(".")[-2])
        heads = config.num_key_value_heads if "k_proj" in name else heads
        if heads:
            halves = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2)
            tensor = halves.reshape(tensor.shape)
        _, stored = names[name.removesuffix(".weight")]
        writer.add_tensor(f"{stored}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(plain_model: LlamaForCausalLM, work: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", plain_model)

    base = open_model(tmp_path / "tiny.gguf", work)

    assert base.name == "tiny"
    assert base.published is base.weights
    with base.resident() as model:
        assert is_equal(model.state_dict(), plain_model.state_dict())


def test_another_gguf_file_of_the_same_name(
    plain_model: LlamaForCausalLM, work: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, plain_model)
    open_model(path, work)
    torch.nn.init.zeros_(plain_model.lm_head.weight)
    write_gguf(path, plain_model)

    base = open_model(path, work)

    with base.resident() as model:
        assert not model.lm_head.weight.any()


def test_missing_gguf(tmp_path: Path, work: Path) -> None:
    with pytest.raises(QuantizeError, match=r"model\.gguf: no such file"):
        open_model(tmp_path / "model.gguf", work)


def test_file_that_is_not_gguf(tmp_path: Path, work: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no")

    with pytest.raises(QuantizeError, match=r"model\.gguf: cannot be loaded"):
        open_model(tmp_path / "model.gguf", work)


def test_file_that_is_no_model(text_file: Path, work: Path) -> None:
    with pytest.raises(QuantizeError, match=r"calibration\.txt: give a folder, a Hub"):
        open_model(text_file, work)


def test_folder_without_a_model(tmp_path: Path, work: Path) -> None:
    with pytest.raises(QuantizeError, match=r"the folder has no config\.json"):
        open_model(tmp_path, work)


def test_a_hub_that_fails_without_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Path
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError

    monkeypatch.setattr("tacq_vllm.quantize.source.snapshot_download", fail)

    with pytest.raises(QuantizeError, match=r"the Hub does not give it: OSError$"):
        open_model(tmp_path / "model", work)


def test_code_that_a_model_brings_is_not_run(
    model_copy: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    (model_copy / "code.py").write_text("raise SystemExit('run')")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(model_copy, model_type="of_nobody", auto_map=code)

    with pytest.raises(QuantizeError, match="cannot be loaded"):
        open_model(model_copy, work)
    assert not asked


def test_truncated_model(model_copy: Path, work: Path) -> None:
    truncate(model_copy / WEIGHTS_NAME)

    with pytest.raises(QuantizeError, match="cannot be loaded") as caught:
        open_model(model_copy, work)
    assert "\n" not in str(caught.value)


def test_model_without_a_tensor(model_copy: Path, work: Path) -> None:
    rewrite_tensors(model_copy, remove("lm_head.weight"))

    with pytest.raises(QuantizeError, match=r"lm_head\.weight is missing$"):
        open_model(model_copy, work)


def change_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": "64"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 7}, r"hidden size \(64\) is not a multiple"),
        ({"vocab_size": -1}, "negative dimension"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"rope_parameters": {"rope_type": "nope"}}, "KeyError: 'nope'"),
        ({"dtype": "float99"}, "no attribute 'float99'"),
    ],
)
def test_a_configuration_that_is_malformed(
    model_copy: Path, work: Path, fields: dict[str, object], reason: str
) -> None:
    change_config(model_copy, **fields)

    with pytest.raises(QuantizeError, match=f"model: cannot be loaded: .*{reason}"):
        open_model(model_copy, work)


def test_a_tokenizer_that_is_malformed(model_copy: Path, work: Path) -> None:
    (model_copy / "tokenizer.json").write_text('{"a": 1}')

    with pytest.raises(QuantizeError, match="model: cannot be loaded: KeyError: "):
        open_model(model_copy, work)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("vocab_size", 100, "embed_tokens.weight is [128, 64] in the files, and [100,"),
        ("intermediate_size", 96, "gate_proj.weight is [128, 64] in the files, and [9"),
        ("num_key_value_heads", 1, "k_proj.weight is [32, 64] in the files, and [16,"),
    ],
)
def test_a_configuration_of_other_sizes(
    model_copy: Path, work: Path, field: str, value: int, reason: str
) -> None:
    change_config(model_copy, **{field: value})

    with pytest.raises(QuantizeError, match=re.escape(reason)):
        open_model(model_copy, work)


def test_other_sizes_of_a_model_that_is_stored_by_other_names(
    mixtral: Path, work: Path
) -> None:
    change_config(mixtral, intermediate_size=48)

    with pytest.raises(QuantizeError, match=r"down_proj is \[2, 32, 32\] in the files"):
        open_model(mixtral, work)
    assert not work.exists()


def test_model_without_a_tokenizer(model_copy: Path, work: Path) -> None:
    for path in model_copy.glob("tokenizer*"):
        path.unlink()

    with pytest.raises(QuantizeError, match="cannot be loaded"):
        open_model(model_copy, work)


def test_quantized_model(tiny_checkpoint: Path, work: Path) -> None:
    with pytest.raises(QuantizeError, match="already quantized"):
        open_model(tiny_checkpoint, work)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_published_type_is_known(
    tiny_llama: TinyLlama, work: Path, dtype: torch.dtype
) -> None:
    assert open_model(tiny_llama(dtype), work).stored_dtype == dtype


def test_buffers_are_read_where_they_were_published(tmp_path: Path) -> None:
    """The router of DeepSeek-V3 has one."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = DeepseekV3ForCausalLM(config)
    bias = torch.randn(4)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(bias)

    base = open_model(save_model(model, tmp_path / "model"), tmp_path / "work")

    assert torch.equal(base.model.get_buffer(name), bias)
