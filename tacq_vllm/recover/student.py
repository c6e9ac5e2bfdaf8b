"""The model in training: quantized linears of a checkpoint, all else in 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from tacq_vllm.format.checkpoint import CheckpointReader
from tacq_vllm.format.linear import PackedLinear
from tacq_vllm.format.schema import QuantizationSchema, num_groups
from tacq_vllm.format.validation import load_linear
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.recover.batches import Batch
from tacq_vllm.recover.config import RecoverConfig
from tacq_vllm.recover.linear import FrozenLinear, TrainedLinear
from tacq_vllm.recover.loss import Losses, predict_losses


class Student(nn.Module):
    """A causal language model whose quantized linears are `TrainedLinear`s.

    Args:
        model: the model, in memory.
        config: loss, and what is trained.
    """

    def __init__(self, model: PreTrainedModel, config: RecoverConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(self, batch: Batch, distill: float) -> Losses:
        """Sums of the losses over the scored tokens of a batch.

        Args:
            batch: tokens, targets, and the 16-bit model's states if `distill` is not 0.
            distill: share of the divergence in the total loss.
        """
        decoder = self.model.get_decoder()
        states = decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state
        scored = batch.scored
        return predict_losses(
            states[:, :-1][scored],
            batch.targets[scored],
            None if batch.states is None else batch.states[:, :-1][scored],
            self._logits,
            distill,
            self._config.temperature,
        )

    def linears(self) -> dict[str, TrainedLinear]:
        """The quantized linears, by the names of the checkpoint."""
        return trained_linears(self.model)

    def trained_state(self) -> dict[str, Tensor]:
        """The trained values by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Replace the trained values, each by its name and of its shape."""
        for name, parameter in self.trained_state().items():
            parameter.copy_(state[name])

    def trained_share(self) -> float:
        """Trained values over all weights that the model has in 16 bits."""
        trained = sum(p.numel() for p in self.trained_state().values())
        return trained / count_weights(self.model)

    def _logits(self, states: Tensor) -> Tensor:
        """What the model predicts from its decoder's output [n, hidden]: [n, vocab]."""
        with _decoder_gives(self.model, states.unsqueeze(0)):
            tokens = torch.zeros(
                (1, states.shape[0]), dtype=torch.int64, device=states.device
            )
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[0].float()


def open_student(
    base: BaseModel,
    checkpoint: Path,
    schema: QuantizationSchema,
    config: RecoverConfig,
) -> Student:
    """Put a model of `base`'s kind together from a checkpoint, on base's device."""
    model = deepcopy(base.model)
    replace_linears(model, schema, config)
    generator = torch.Generator().manual_seed(config.seed)
    with CheckpointReader(checkpoint) as reader:
        for name, linear in trained_linears(model).items():
            linear.to_empty(device="cpu")
            packed = load_linear(reader, schema, name)
            assert isinstance(packed, PackedLinear)
            weight = base.weight(name).cpu()
            linear.load(packed, weight, config.margin, generator)
            linear.to(base.device)
        _fill(model, base, reader, schema)
    _compute_in_float32(model)
    if config.gradient_checkpointing:
        _checkpoint_blocks(model)
    return Student(model, config)


def replace_linears(
    model: PreTrainedModel, schema: QuantizationSchema, config: RecoverConfig
) -> None:
    """Swap a model's quantized linears for trained ones, without values."""
    for name, (out_features, in_features) in schema.linears.items():
        dense = model.get_submodule(name)
        with torch.device("meta"):
            linear = TrainedLinear(
                out_features,
                in_features,
                num_groups(in_features, schema.group_size),
                schema.num_outliers(name),
                schema.bits,
                schema.torch_dtype,
                dense.bias,
                config,
            )
        model.set_submodule(name, linear)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, FrozenLinear(module))


def count_weights(model: PreTrainedModel) -> int:
    """Weights of the 16-bit model that one in training stands for."""
    quantized = [m.latent.numel() for m in trained_linears(model).values()]
    others: list[int] = [p.numel() for p in model.parameters() if not p.requires_grad]
    return sum(quantized) + sum(others)


def trained_linears(model: PreTrainedModel) -> dict[str, TrainedLinear]:
    """The quantized linears of a model in training, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TrainedLinear)
    }


def _fill(
    model: PreTrainedModel,
    base: BaseModel,
    reader: CheckpointReader,
    schema: QuantizationSchema,
) -> None:
    """Give the other parameters their values, from the checkpoint, in 16 bits."""
    loaded: dict[str, nn.Parameter] = {}
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        if parameters[leaf].requires_grad:
            continue
        stored = base.stored_name(name)
        if stored not in loaded:
            # Experts are stored in other pieces than the modules have.
            files = reader if stored in reader else base.weights
            values = files.load(stored).to(base.device, schema.torch_dtype, copy=True)
            loaded[stored] = nn.Parameter(values, requires_grad=False)
        parameters[leaf] = loaded[stored]


def _compute_in_float32(model: PreTrainedModel) -> None:
    """Let what is in 16 bits work in float32: small tensors stay so, others for a call.

    Under autocast, products still are in its type.
    """
    for module in model.modules():
        if isinstance(module, TrainedLinear | FrozenLinear):
            continue
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, out: out.float())
            continue
        matrices = []
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data = parameter.data.float()
            else:
                matrices.append(name)
        if matrices:
            _upcast_in_calls(module, matrices)


def _upcast_in_calls(module: nn.Module, names: list[str]) -> None:
    stored = {name: module._parameters[name] for name in names}

    def before(module: nn.Module, args: Any) -> None:
        for name, parameter in stored.items():
            assert parameter is not None
            module._parameters[name] = nn.Parameter(parameter.float(), False)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        module._parameters.update(stored)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _checkpoint_blocks(model: PreTrainedModel) -> None:
    # Its name before Transformers 5.23 was another.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in model.get_decoder().layers:
        # Transformers does it in training only; dropout inside stays off.
        layer.training = True


@contextmanager
def _decoder_gives(model: PreTrainedModel, states: Tensor) -> Iterator[None]:
    decoder = model.get_decoder()
    # It has all fields that any decoder's output has.
    output = MoeModelOutputWithPast(last_hidden_state=states)
    decoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del decoder.forward
