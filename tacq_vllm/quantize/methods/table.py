"""Which code runs for which `method` of a recipe."""

from collections.abc import Callable, Mapping

from tacq_vllm.config import Method
from tacq_vllm.quantize.methods import (
    fineq,
    gptq,
    rtn,
    slim_llm,
    spqr,
    squeezellm,
    tacq,
)
from tacq_vllm.quantize.passes import Passes
from tacq_vllm.quantize.quantized import QuantizedBlocks

METHODS: Mapping[Method, Callable[[Passes], QuantizedBlocks]] = {
    "tacq": tacq.quantize,
    "gptq": gptq.quantize,
    "rtn": rtn.quantize,
    "squeezellm": squeezellm.quantize,
    "spqr": spqr.quantize,
    "slim-llm": slim_llm.quantize,
    "fineq": fineq.quantize,
}
