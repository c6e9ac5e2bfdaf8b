"""What can be wrong with config.json."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.builders import remove, rewrite_tensors
from tests.hostile.good import (
    GATE,
    NORM,
    UP,
    Json,
    edit_block,
    edit_config,
    replace_text,
    set_block,
    set_config,
    write,
)
from tests.hostile.kind import BOTH, Kind

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

Damage = Callable[[Path], None]


def _shape(shape: list[object]) -> Damage:
    return edit_block(lambda block: block["linears"].update({UP: shape}))


def _count(count: int) -> Damage:
    return edit_block(lambda block: block["circuits"]["default"].update({UP: count}))


def _rename(name: str) -> Damage:
    def change(block: Json) -> None:
        for names in (block["linears"], block["circuits"]["default"]):
            names[name] = names.pop(UP)

    return edit_block(change)


def _without_norm(change: Callable[[Json], object]) -> Damage:
    """A change of config.json that must not hide that a tensor is missing."""

    def damage(folder: Path) -> None:
        rewrite_tensors(folder, remove(NORM))
        edit_config(lambda config: change(config) and None)(folder)

    return damage


def _keep_whole(name: str) -> Damage:
    """A linear that is not quantized."""

    def damage(folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for tensor in [t for t in tensors if t.startswith(f"{name}.")]:
                del tensors[tensor]
            tensors[f"{name}.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)

        rewrite_tensors(folder, change)
        edit_block(_forget)(folder)

    return damage


def _move(name: str) -> Damage:
    """A linear's tensors in the place of a weight, in config.json too."""

    def damage(folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for tensor in [t for t in tensors if t.startswith(f"{UP}.")]:
                tensors[tensor.replace(UP, name)] = tensors.pop(tensor)
            del tensors[f"{name}.weight"]

        rewrite_tensors(folder, change)
        _rename(name)(folder)

    return damage


def _forget(block: Json) -> None:
    del block["linears"][UP]
    del block["circuits"]["default"][UP]


KINDS = [
    # What is not even JSON; readers parse config.json before they know that it is ours.
    Kind("no config", lambda f: (f / CONFIG).unlink(), (CONFIG, "missing"), BOTH),
    Kind("cut config", replace_text(CONFIG, "}", ""), (CONFIG, "not JSON"), BOTH),
    Kind("a list", write(CONFIG, "[]"), (CONFIG, "not a JSON object"), BOTH),
    Kind("deep config", write(CONFIG, "[" * 100_000), (CONFIG, "not JSON"), BOTH),
    Kind(
        "endless integer",
        replace_text(CONFIG, '"bits": 3', f'"bits": {"9" * 5000}'),
        (CONFIG, "not JSON"),
        BOTH,
    ),
    Kind("bytes", write(CONFIG, b"\xff\xfe{}"), (CONFIG, "not JSON"), BOTH),
    Kind(
        "a field twice",
        replace_text(CONFIG, '"bits": 3', '"bits": 3, "bits": 3'),
        (CONFIG, "'bits' is there twice"),
    ),
    Kind(
        "a linear twice",
        replace_text(CONFIG, f'"{UP}": [', f'"{UP}": [64, 64], "{UP}": ['),
        (CONFIG, f"'{UP}' is there twice"),
    ),
    # The block against the specification.
    Kind("version", set_block(format_version=3), ("format_version 3 is not known",)),
    Kind("version as text", set_block(format_version="1"), ("format_version '1' is",)),
    Kind("version true", set_block(format_version=True), ("format_version True is",)),
    Kind("new field", set_block(surprise=1), ("surprise: Extra inputs",)),
    Kind("five bits", set_block(bits=5), ("bits: Input should be 2, 3 or 4",)),
    Kind("bits as text", set_block(bits="3"), ("bits: ",)),
    Kind("no group", set_block(group_size=0), ("group_size 0",)),
    Kind("odd group", set_block(group_size=24), ("group_size 24",)),
    Kind("large group", set_block(group_size=64), ("group_size 64 does not divide",)),
    Kind("32-bit values", set_block(dtype="float32"), ("dtype: ",)),
    Kind("no linears", set_block(linears={}), ("linears: ",)),
    Kind("no circuits", set_block(circuits={}), ("exactly one table",)),
    Kind(
        "two circuits",
        edit_block(lambda block: block["circuits"].update(sql={})),
        ("exactly one table",),
    ),
    Kind(
        "uncounted",
        edit_block(lambda block: block["circuits"]["default"].pop(UP)),
        ("circuits and linears name different modules",),
    ),
    Kind("negative shape", _shape([-96, 64]), (UP, "shape [-96, 64]")),
    Kind("half a shape", _shape([96]), (UP, "required")),
    Kind("a shape in fractions", _shape([96.5, 64]), (UP, "valid integer")),
    Kind("endless rows", _shape([2**62, 64]), (UP, f"shape [{2**62}, 64]")),
    Kind("many columns", _shape([96, 2**17]), (UP, "more than 65536")),
    Kind("negative count", _count(-1), (UP, "-1 kept weights")),
    Kind("more kept than there are", _count(96 * 64 + 1), (UP, "6145 kept weights")),
    # The block against the files.
    Kind("fewer bits", set_block(bits=2), (WEIGHTS, "_high", "a 2-bit linear has no")),
    Kind("more bits", set_block(bits=4), (WEIGHTS, "qweight is I32 [64, 6], not")),
    Kind(
        "smaller group", set_block(group_size=16), (WEIGHTS, "scales is BF16 [64, 3]")
    ),
    Kind("other values", set_block(dtype="float16"), (WEIGHTS, "scales is BF16")),
    Kind("one kept more", _count(60), (WEIGHTS, f"{UP}.outliers is I32 [156], not")),
    Kind("all kept", _count(96 * 64), (WEIGHTS, f"{UP}.outliers is I32 [156], not")),
    Kind("many rows", _shape([2**30, 64]), (WEIGHTS, f"{UP}.scales is BF16 [96, 2]")),
    Kind("fewer columns", _shape([96, 32]), (WEIGHTS, f"{UP}.scales is BF16 [96, 2]")),
    Kind(
        "renamed linear", _rename("model.up"), (WEIGHTS, "model.up.scales", "missing")
    ),
    Kind(
        "a name that ends the line",
        _rename("\n\x1b[31mtacq: fine\x1b[0m"),
        (WEIGHTS, r"\n\x1b[31mtacq: fine\x1b[0m.scales", "missing"),
    ),
    Kind("half a surrogate", _rename("\ud800"), ("Invalid JSON",)),
    # The model against the block and the files.
    Kind("forgotten linear", edit_block(_forget), (WEIGHTS, f"{UP}.weight", "missing")),
    Kind(
        "wider model",
        set_config(intermediate_size=128),
        (CONFIG, "stored as [64, 96], but the model has [64, 128]"),
    ),
    Kind(
        "another vocabulary",
        set_config(vocab_size=65),
        (WEIGHTS, "model.embed_tokens.weight is BF16 [64, 64], not"),
    ),
    Kind(
        "a block more",
        set_config(num_hidden_layers=2),
        (WEIGHTS, "model.layers.1.", "missing"),
    ),
    Kind(
        "biases",
        set_config(mlp_bias=True),
        (WEIGHTS, f"{GATE}.bias", "missing"),
    ),
    Kind(
        "a head of its own",
        set_config(tie_word_embeddings=False),
        (WEIGHTS, "lm_head.weight", "missing"),
    ),
    Kind(
        "code of its own, which is not asked for",
        _without_norm(lambda config: config.update(auto_map={"AutoConfig": "c.C"})),
        (WEIGHTS, f"{NORM}: the tensor is missing"),
    ),
    Kind(
        "no architecture",
        _without_norm(lambda config: config.pop("architectures")),
        (WEIGHTS, f"{NORM}: the tensor is missing"),
    ),
    Kind(
        "two architectures",
        _without_norm(lambda config: config["architectures"].append("Other")),
        (WEIGHTS, f"{NORM}: the tensor is missing"),
    ),
    Kind(
        "blocks of another part",
        set_config(vision_config={"num_hidden_layers": 10**9}),
        (CONFIG, "1000000000 blocks, but the files hold"),
    ),
    Kind(
        "blocks by another name, deeper down",
        set_config(vision_config={"text_config": {"n_layer": 10**9}}),
        (CONFIG, "1000000000 blocks, but the files hold"),
    ),
    Kind(
        "half of what is fused",
        _keep_whole(UP),
        (CONFIG, f"{UP}: not quantized, but {GATE}"),
    ),
    Kind(
        "quantized embeddings",
        _move("model.embed_tokens"),
        (CONFIG, "model.embed_tokens: stored as [96, 64], but", "no such linear"),
    ),
    Kind(
        "other weight files",
        edit_config(lambda config: config.update(transformers_weights=WEIGHTS)),
        (CONFIG, "transformers_weights names other weight files"),
    ),
    Kind(
        "attention to be fetched",
        set_config(attn_implementation="someone/kernel"),
        (CONFIG, "attn_implementation names code to fetch: 'someone/kernel'"),
        ("transformers",),
    ),
    Kind(
        "a list for a name",
        set_config(model_type=["llama"]),
        (CONFIG, "model_type ['llama'] is not a name"),
        BOTH,
    ),
    Kind(
        "sizes of no model",
        set_config(num_attention_heads="many"),
        (CONFIG, "no model can be made"),
        BOTH,
    ),
]
