"""How often vLLM's greedy text depends on what else is asked at the same time.

    python benchmarks/batching.py CHECKPOINT [CHECKPOINT ...] --output RESULTS.json

Every prompt is answered alone, then among 4 and 16, in bfloat16, eagerly. A packed
checkpoint is best set beside the same weights in 16 bits (`tacq export --to
dequantized`), which shows what the rest of the model does. Counts answers that are the
same, token by token.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from apart import report, run_apart
from machine import device_name

TOKENS = 32
TOGETHER = (4, 16)
SUBJECTS = (
    *("the moon", "a river", "winter", "bread", "a train", "the sea", "honey", "iron"),
    *("a violin", "chess", "the heart", "rain", "a forest", "gold", "sleep", "a map"),
)
QUESTIONS = (
    "Explain to a child what {} is.",
    "Write two sentences of a story about {}.",
    "List three facts about {}.",
    "What would be missing in a world without {}?",
)


def main() -> None:
    """Run every checkpoint in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        (checkpoint,) = arguments.checkpoints
        report(count_same(checkpoint))
        return
    rows = []
    for checkpoint in arguments.checkpoints:
        row = {
            "checkpoint": checkpoint.name,
            "device": device_name("cpu", torch.get_num_threads()),
            "date": time.strftime("%Y-%m-%d"),
            "tokens": TOKENS,
            "answers": len(SUBJECTS) * len(QUESTIONS),
            **run_apart(__file__, checkpoint, cache_gib=2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


def count_same(checkpoint: Path) -> dict[str, int]:
    """How many answers are the same among others as alone."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=max(TOGETHER),
        # A prompt that was read once would not be read again.
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    prompts = [
        question.format(subject) for subject in SUBJECTS for question in QUESTIONS
    ]

    def answers(together: int) -> list[list[int]]:
        found = []
        for start in range(0, len(prompts), together):
            chats = [
                [{"role": "user", "content": prompt}]
                for prompt in prompts[start : start + together]
            ]
            for result in llm.chat(chats, sampling, use_tqdm=False):
                found.append(list(result.outputs[0].token_ids))
        return found

    alone = answers(1)
    return {
        f"same among {count}": sum(
            one == other for one, other in zip(alone, answers(count), strict=True)
        )
        for count in (1, *TOGETHER)
    }


if __name__ == "__main__":
    main()
