"""What drafts from a model's hidden states: a head, a further layer; random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.integrations.conftest import HEADS


def save_eagle(method: str, folder: Path) -> Path:
    """Save a head of EAGLE or EAGLE-3 for the tiny Llama; give its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(**HEADS, architectures=["LlamaForCausalLM"])
    config.num_hidden_layers = 1
    layer = dict(LlamaDecoderLayer(config, 0).state_dict())
    size = config.hidden_size
    if method == "eagle":
        del layer["input_layernorm.weight"]
        tensors = {f"layers.0.{name}": weight for name, weight in layer.items()}
        read = 2
    else:
        # Those of vLLM's choice are three layers of a deeper model alone.
        config.eagle_aux_hidden_state_layer_ids = [0, 1, 2]
        for part in "qkv":
            name = f"self_attn.{part}_proj.weight"
            layer[name] = torch.cat((layer[name], layer[name]), 1)
        layer["hidden_norm.weight"] = torch.ones(size)
        tensors = {f"midlayer.{name}": weight for name, weight in layer.items()}
        tensors["norm.weight"] = torch.ones(size)
        tensors["lm_head.weight"] = torch.randn(config.vocab_size, size) / 10
        read = 3
    tensors["fc.weight"] = torch.randn(size, read * size) / 10
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def add_mtp_layer(model: Path) -> None:
    """Give a GLM-4-MoE model a further layer, which says the token after the next."""
    config_file, weights_file = model / "config.json", model / "model.safetensors"
    config = json.loads(config_file.read_text())
    tensors = load_file(weights_file)
    count, size = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{count - 1}.", f"model.layers.{count}."
    added = {
        name.replace(last, new): weight.clone()
        for name, weight in tensors.items()
        if name.startswith(last)
    }
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{new}{norm}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    both = torch.eye(size, dtype=torch.bfloat16).repeat(1, 2)
    added[f"{new}eh_proj.weight"] = both
    save_file(tensors | added, weights_file, {"format": "pt"})
    config["num_nextn_predict_layers"] = 1
    config_file.write_text(json.dumps(config))
