"""Let Transformers write on from a prompt; needs no vLLM.

    python examples/use_from_transformers.py CHECKPOINT PROMPT

CHECKPOINT is a folder or a Hub id. Prints the prompt and what follows it.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import tacq_vllm.integrations.transformers  # noqa: F401 - registers the format


def main() -> None:
    """Write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    print(write_on(arguments.checkpoint, arguments.prompt))


def write_on(checkpoint: str, prompt: str, max_new_tokens: int = 64) -> str:
    """The prompt and its likeliest continuation."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return written["generated_text"]


if __name__ == "__main__":
    main()
