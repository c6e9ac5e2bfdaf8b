"""SliM-LLM (arXiv 2405.14917): more bits for the groups of columns that matter more.

All rows of a linear share the bits of a group of input columns: N-1, N or N+1, as many
groups above as below, so that N is the average (section 3.2). How many is searched by
the divergence of the outputs; grids are searched by their elements' salience (section
3.3). GPTQ does the rounding.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, softmax

from tacq_vllm.config import GptqConfig
from tacq_vllm.config_methods import SlimLlmConfig
from tacq_vllm.quantize.columns import lazy_block, round_columns
from tacq_vllm.quantize.gptq import inverse_factor
from tacq_vllm.quantize.methods.simulated import SimulatedRounder
from tacq_vllm.quantize.methods.slim_grid import (
    RoundValues,
    fit_group,
    fit_simply,
)
from tacq_vllm.quantize.passes import Passes, check_linears
from tacq_vllm.quantize.quantized import QuantizedBlocks
from tacq_vllm.quantize.result import SimulatedResult
from tacq_vllm.quantize.rounder import GroupInputs
from tacq_vllm.quantize.world import World

_TOKENS = 1024
"""Tokens whose outputs are compared at a time."""

_LEAST_PROBABILITY = 1e-6
"""Below which outputs count as equally improbable (reference code)."""

_LABEL_BITS = 2
"""To say which of three widths a group has."""


def quantize(passes: Passes) -> QuantizedBlocks:
    """Every linear by itself, on what those before it produce."""
    recipe = passes.recipe
    config = recipe.slim_llm
    check_linears(passes.base, recipe.group_size)

    def quantize_linear(
        name: str, W: Tensor, inputs: GroupInputs | None
    ) -> SimulatedResult:
        assert inputs is not None
        return quantize_matrix(
            W,
            inputs,
            bits=recipe.bits,
            group_size=recipe.group_size,
            dtype=passes.dtype,
            config=config,
            gptq=recipe.gptq,
            world=passes.world,
        )

    rounder = SimulatedRounder(
        quantize_linear,
        recipe.bits,
        recipe.group_size,
        passes.dtype,
        sample_tokens=config.search_tokens,
    )
    depends = {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "dtype": passes.dtype_name,
        "slim_llm": config.model_dump(mode="json"),
        "gptq": recipe.gptq.model_dump(
            mode="json", include={"damp_percent", "block_size", "grid_norm"}
        ),
    }
    return passes.blocks("slim-llm", "quantization", rounder, depends)


def quantize_matrix(
    W: Tensor,
    inputs: GroupInputs,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    config: SlimLlmConfig,
    gptq: GptqConfig,
    world: World,
) -> SimulatedResult:
    """Quantize one linear; every process does all of it.

    Args:
        W: float32 [out, in].
        inputs: the Hessian, and tokens to compare outputs on.
        bits: bits of a code on average.
        group_size: columns of a group.
        dtype: the 16-bit type of scales.
        config: search of bits and grids.
        gptq: damping, block size and norm of the error.
        world: adds up what the processes have compared.

    Raises:
        QuantizeError: the Hessian stays singular, or is not finite.
    """
    U, damp_percent = inverse_factor(inputs.H, gptq.damp_percent)
    salience = (W / U.diagonal()).square().double().sum(0)
    ranking = salience.view(-1, group_size).sum(1).argsort()
    losses = divergences(W, inputs.sample, ranking, bits)
    world.add_up(losses)
    group_bits = choose_bits(ranking, losses, bits)

    values: RoundValues | None = None

    def round_column(step: int, rest: Tensor) -> Tensor:
        nonlocal values
        group, first = divmod(step, group_size)
        if first == 0:
            columns = slice(step, step + group_size)
            values = fit_group(
                rest[columns].T,
                U.diagonal()[columns],
                group_bits[group],
                dtype,
                config,
                gptq.grid_norm,
            )
        assert values is not None
        return values(rest[step].unsqueeze(1)).squeeze(1)

    order = torch.arange(W.shape[1], device=W.device)
    block_size = lazy_block(gptq.block_size, group_size, W.shape[1])
    return SimulatedResult(
        weight=round_columns(W, U, order, block_size, round_column),
        outliers=0,
        stored_bits=stored_bits(W.shape[0], group_size, group_bits),
        damp_percent=damp_percent,
    )


def divergences(W: Tensor, x: Tensor, ranking: Tensor, bits: int) -> Tensor:
    """What 1, 2, ... groups with a bit more, and as many with one less, do to outputs.

    Args:
        W: float32 [out, in].
        x: float32 [tokens, in].
        ranking: int64 [groups], the least salient first.
        bits: bits of a code on average.

    Returns:
        float64 [groups / 2 - 1]: the sum over tokens of the Kullback-Leibler divergence
        between the softmax of the outputs with simply rounded weights and without.
    """
    size = W.shape[1] // len(ranking)

    def rounded(width: int) -> Tensor:
        groups = W.split(size, dim=1)
        return torch.cat([fit_simply(group, width)(group) for group in groups], 1)

    middle = rounded(bits)
    changes = {width: rounded(width) - middle for width in (bits - 1, bits + 1)}
    count = max(0, len(ranking) // 2 - 1)
    losses = torch.zeros(count, dtype=torch.float64, device=W.device)
    order = ranking.tolist()
    for part in x.split(_TOKENS):
        target = softmax(part @ W.T, dim=1).clamp(min=_LEAST_PROBABILITY).log()
        outputs = part @ middle.T
        for index in range(count):
            # One candidate differs from the one before in two groups.
            for width, group in ((bits - 1, order[index]), (bits + 1, order[~index])):
                columns = slice(group * size, (group + 1) * size)
                outputs += part[:, columns] @ changes[width][:, columns].T
            found = softmax(outputs, dim=1).clamp(min=_LEAST_PROBABILITY)
            losses[index] += kl_div(target, found, reduction="sum")
    return losses


def choose_bits(ranking: Tensor, losses: Tensor, bits: int) -> list[int]:
    """Choose the bits of each group, by the number of raised ones that lost least.

    With fewer than four groups there is no choice, and all have the same.

    Args:
        ranking: int64 [groups], the least salient first.
        losses: float64, from `divergences`, of all processes together.
        bits: bits of a code on average.
    """
    group_bits = [bits] * len(ranking)
    if losses.numel() == 0:
        return group_bits
    order = ranking.tolist()
    for index in range(int(losses.argmin()) + 1):
        group_bits[order[index]] = bits - 1
        group_bits[order[~index]] = bits + 1
    return group_bits


def stored_bits(out_features: int, group_size: int, group_bits: list[int]) -> int:
    """Bits of codes, scales, zero-points (of one bit: means), and groups' widths."""
    total = _LABEL_BITS * len(group_bits)
    for bits in group_bits:
        zero = 16 if bits == 1 else bits
        total += out_features * (bits * group_size + 16 + zero)
    return total
