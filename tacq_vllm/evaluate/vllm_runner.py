"""A model that vLLM runs, in this process; the only module here that imports vLLM."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from tacq_vllm import __version__
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.loading import model_identity, opened
from tacq_vllm.evaluate.runner import Continuation, Likelihood, Prompt
from tacq_vllm.kernels.activations import activations
from tacq_vllm.quantize.source import model_name

_TOGETHER = 32
"""Requests that are handed to the engine at once; then the log is written."""

_STEP_TOKENS = 2048
"""Tokens a step, at most: the logits of all of them are in memory together."""

_CPU_CACHE_BYTES = 4 * 2**30
"""For keys and values, unless `VLLM_CPU_KVCACHE_SPACE` says how much: by itself vLLM
wants nearly all of the machine's memory, and refuses to start where others use some."""


class VllmRunner:
    """A loaded model; see `open_vllm`."""

    def __init__(
        self, engine: Any, name: str, identity: str, dtype: str, max_length: int
    ) -> None:
        self._engine = engine
        self.name = name
        self.tokenizer = engine.get_tokenizer()
        self.max_length = max_length
        self.dtype = dtype
        self.identity = identity
        self.versions = {"tacq-vllm": __version__} | {
            package: version(package) for package in ("torch", "transformers", "vllm")
        }

    def close(self) -> None:
        """Stop the engine, and give its memory back."""
        self._engine.llm_engine.engine_core.shutdown()

    def likelihoods(self, asked: Sequence[Continuation]) -> Iterator[Likelihood]:
        """How likely each continuation is.

        Raises:
            EvaluateError: the engine ends.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        for start in range(0, len(asked), _TOGETHER):
            chunk = asked[start : start + _TOGETHER]
            outputs = self._generate(
                [one.context + one.tokens for one in chunk], params
            )
            for one, output in zip(chunk, outputs, strict=True):
                told = output.prompt_logprobs[-len(one.tokens) :]
                found = [by[t] for by, t in zip(told, one.tokens, strict=True)]
                yield Likelihood(
                    total=sum(token.logprob for token in found),
                    greedy=all(token.rank == 1 for token in found),
                )

    def texts(self, asked: Sequence[Prompt]) -> Iterator[str]:
        """The greedy text after each prompt.

        Raises:
            EvaluateError: the engine ends.
        """
        for start in range(0, len(asked), _TOGETHER):
            chunk = asked[start : start + _TOGETHER]
            params = [
                SamplingParams(
                    temperature=0.0, max_tokens=one.max_tokens, stop=list(one.stops)
                )
                for one in chunk
            ]
            for output in self._generate([one.tokens for one in chunk], params):
                yield output.outputs[0].text

    def _generate(self, prompts: list[tuple[int, ...]], params: Any) -> Any:
        requests = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        try:
            return self._engine.generate(requests, params, use_tqdm=False)
        except EngineDeadError as error:
            raise EvaluateError(
                f"{self.name}: vLLM's engine has ended, and its log above says why; "
                "where nothing is said, memory was short"
            ) from error


def open_vllm(model: str, dtype: str, max_length: int) -> VllmRunner:
    """Load a Hub id or a folder, packed or not.

    Args:
        model: what to load.
        dtype: of weights and activations, as vLLM names it.
        max_length: tokens of a prompt and its answer together.

    Raises:
        EvaluateError: vLLM cannot load it.
    """
    with opened(model) as source:
        if source.gguf:
            raise EvaluateError(f"{model}: vLLM reads no GGUF: use --backend hf")
        arithmetic = [dtype, current_platform.device_type]
        on_cpu = current_platform.is_cpu()
        if on_cpu:
            arithmetic.append(activations())
        identity = f"{model_identity(source)} vllm {' '.join(arithmetic)}"
        config = AutoConfig.from_pretrained(**source.arguments)
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", max_length + 1)
        # Scoring a prompt takes a new token too, which nobody reads.
        length = min(max_length + 1, positions)
        engine = LLM(
            str(source.folder),
            dtype=dtype,
            max_model_len=length,
            max_num_batched_tokens=_STEP_TOKENS,
            enable_chunked_prefill=True,
            # Compiled, even an unquantized model gave wrong text on the CPU.
            enforce_eager=on_cpu,
            kv_cache_memory_bytes=_CPU_CACHE_BYTES if on_cpu else None,
        )
    return VllmRunner(engine, model_name(model), identity, dtype, length - 1)
