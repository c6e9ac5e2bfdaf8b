"""Decoding speed of a whole model in vLLM, TaCQ beside the unquantized one.

    python benchmarks/serving.py [--models smollm2,llama-1b] [--bits 3]

Weights are not loaded but made up (`load_format="dummy"`): only shapes matter for time.
One request at a time in bfloat16: eagerly on a CPU, in a CUDA graph on a GPU, with
attention in Triton. A token's time is that of a long answer less that of a short one,
by their difference in tokens; the models take turns. Writes a JSON list and prints it.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from apart import report, run_apart
from machine import device_name
from transformers import AutoModelForCausalLM, LlamaConfig

from tacq_vllm.format.schema import QuantizationSchema

RESULTS = Path(__file__).parent / "results" / "serving.json"
OUTLIER_RATIO = 0.0035
PROMPT, SHORT, LONG = 32, 8, 72
MODELS = {
    "smollm2": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "llama3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


def main() -> None:
    """Run every model in processes of their own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2,llama-1b")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        report(time_tokens(arguments.run))
        return

    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            plain, packed = Path(folder) / "plain", Path(folder) / "packed"
            write_configs(MODELS[name], arguments.bits, arguments.group_size, folder)
            seconds: dict[Path, list[float]] = {plain: [], packed: []}
            for _ in range(arguments.turns):
                for path, times in seconds.items():
                    times += run_apart(__file__, path, cache_gib=1)
        medians = {path: statistics.median(times) for path, times in seconds.items()}
        row: dict[str, Any] = {
            "model": name,
            "bits": arguments.bits,
            "group_size": arguments.group_size,
            "device": device_name(device, torch.get_num_threads()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "bf16_ms_per_token": round(medians[plain] * 1e3, 2),
            "tacq_ms_per_token": round(medians[packed] * 1e3, 2),
            "ratio": round(medians[plain] / medians[packed], 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def write_configs(config: LlamaConfig, bits: int, group_size: int, folder: str) -> None:
    """Write config.json of the model, and of the same model quantized."""
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(Path(folder) / "plain")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    }
    kept = {
        name: int(OUTLIER_RATIO * out * in_) for name, (out, in_) in linears.items()
    }
    schema = QuantizationSchema(
        bits=bits,
        group_size=group_size,
        dtype="bfloat16",
        linears=linears,
        circuits={"default": kept},
    )
    config.quantization_config = json.loads(schema.model_dump_json())
    config.save_pretrained(Path(folder) / "packed")


def engine_options() -> dict[str, Any]:
    """How vLLM runs the model here."""
    if not torch.cuda.is_available():
        return {"enforce_eager": True}
    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1]}
    return {
        "compilation_config": graphs,
        "attention_backend": "TRITON_ATTN",
        "max_num_seqs": 1,
    }


def time_tokens(folder: Path) -> list[float]:
    """Seconds per generated token, five times."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        **engine_options(),
    )

    def answer(tokens: int) -> float:
        sampling = SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False
        )
        prompt = {"prompt_token_ids": list(range(100, 100 + PROMPT))}
        start = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - start

    answer(SHORT)
    return [(answer(LONG) - answer(SHORT)) / (LONG - SHORT) for _ in range(5)]


if __name__ == "__main__":
    main()
