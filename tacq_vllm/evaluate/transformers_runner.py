"""A model that Transformers runs: in 16 bits, packed, or from a GGUF file."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    StoppingCriteria,
)

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format
from tacq_vllm import __version__
from tacq_vllm.evaluate.loading import model_identity, opened
from tacq_vllm.evaluate.runner import Continuation, Likelihood, Prompt, cut_at_stop
from tacq_vllm.evaluate.stem import Stem
from tacq_vllm.kernels.ops import kernel_name
from tacq_vllm.layers import TacqLinear
from tacq_vllm.quantize.source import model_name

_BATCH = 8
"""Prompts that are continued together."""

_PADDING = 0
"""Any token: the mask hides it, or the text ends before."""


class TransformersRunner:
    """A loaded model; see `open_transformers`.

    Args:
        model: a causal language model, its weights in memory.
        tokenizer: its own.
        name: what people call it.
        identity: changes with its files.
        max_length: tokens of a prompt and its answer together.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, identity: str, max_length: int
    ) -> None:
        self._model = model.eval()
        # Not the model's own, which may sample or punish repetitions: Transformers
        # takes from here whatever a call leaves open.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=_PADDING,
        )
        self.tokenizer = tokenizer
        self.name = name
        positions = getattr(model.config, "max_position_embeddings", None)
        self.max_length = min(max_length, positions or max_length)
        self.dtype = str(model.dtype).removeprefix("torch.")
        # Empty where nothing is packed.
        kernels = {
            kernel_name(module.held, model.dtype)
            for module in model.modules()
            if isinstance(module, TacqLinear)
        }
        arithmetic = (self.dtype, model.device.type, *sorted(kernels))
        self.identity = f"{identity} hf {' '.join(arithmetic)}"
        self.versions = {"tacq-vllm": __version__} | {
            package: version(package) for package in ("torch", "transformers")
        }

    @torch.no_grad()
    def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
        """How likely each continuation is, one sequence at a time, without padding."""
        stem = Stem(self._model)
        # The answers to choose from differ in their last tokens, which are not read.
        groups = [(read, tuple(group)) for read, group in groupby(asked, _read)]
        sequences = [read for read, _ in groups]
        for number, (read, group) in enumerate(groups, start=1):
            count = max(len(one.tokens) for one in group)
            logits = stem.logits(read, count, sequences[number:])
            for one in group:
                yield _likelihood(one.tokens, logits[-len(one.tokens) :])

    @torch.no_grad()
    def texts(self, asked: Sequence[Prompt]) -> Iterator[str]:
        """The greedy text after each prompt; some are continued together."""
        for (max_tokens, stops), group in groupby(
            asked, key=lambda prompt: (prompt.max_tokens, prompt.stops)
        ):
            prompts = [prompt.tokens for prompt in group]
            for start in range(0, len(prompts), _BATCH):
                batch = prompts[start : start + _BATCH]
                yield from self._continue(batch, max_tokens, stops)

    def _continue(
        self, prompts: list[tuple[int, ...]], max_tokens: int, stops: tuple[str, ...]
    ) -> list[str]:
        length = max(map(len, prompts))
        tokens = torch.full((len(prompts), length), _PADDING)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        ends = self._model.generation_config.eos_token_id
        out = self._model.generate(
            tokens.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            max_new_tokens=max_tokens,
            stopping_criteria=[_Stops(self.tokenizer, stops, length)],
        )
        ids = {ends} if isinstance(ends, int) else set(ends or ())
        # What follows the end is padding.
        new = [
            list(takewhile(lambda token: token not in ids, row))
            for row in out[:, length:].tolist()
        ]
        decoded = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [cut_at_stop(text, stops) for text in decoded]


def _read(one: Continuation) -> tuple[int, ...]:
    """What goes into the model to score a continuation."""
    return one.context + one.tokens[:-1]


def _likelihood(tokens: tuple[int, ...], logits: Tensor) -> Likelihood:
    """Of tokens whose places have these logits [tokens, vocabulary]."""
    target = torch.tensor(tokens, device=logits.device)
    chosen = logits.gather(-1, target[:, None])[:, 0]
    total = (chosen - logits.logsumexp(-1)).double().sum()
    greedy = bool((chosen == logits.max(-1).values).all())
    return Likelihood(float(total), greedy)


class _Stops(StoppingCriteria):  # type: ignore[misc]
    """Ends a sequence whose new text has one of the stops in it."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...], start: int) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which sequences are done: bool [batch]."""
        texts = self._tokenizer.batch_decode(
            input_ids[:, self._start :], skip_special_tokens=True
        )
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def open_transformers(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    *,
    dequantize: bool,
) -> TransformersRunner:
    """Load a Hub id, a folder or a .gguf file; a packed one stays packed.

    Args:
        model: what to load.
        dtype: of weights and activations.
        device: where to compute.
        max_length: tokens of a prompt and its answer together.
        dequantize: unpack a packed model, which then takes a 16-bit one's memory.

    Raises:
        EvaluateError: it cannot be loaded.
        FormatError: a TaCQ checkpoint is not whole.
    """
    with opened(model) as source:
        gguf = {"quantization_config": GgufConfig(dequantize=True)}
        loaded = AutoModelForCausalLM.from_pretrained(
            **source.arguments, dtype=dtype, **(gguf if source.gguf else {})
        )
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
    if dequantize and getattr(loaded, "is_quantized", False):
        loaded = loaded.dequantize()
    return TransformersRunner(
        loaded.to(device),
        tokenizer,
        model_name(model),
        model_identity(source),
        max_length,
    )
