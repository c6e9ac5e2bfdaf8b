"""Carry a checkpoint to a machine without a network, and use it there.

    python examples/air_gapped.py fetch org/model-TaCQ-w3 FOLDER
    python examples/air_gapped.py ask FOLDER PROMPT

The first where the Hub is in reach; the second anywhere, FOLDER carried there: it holds
all that Transformers and vLLM read. vLLM serves it likewise:

    HF_HUB_OFFLINE=1 vllm serve FOLDER

The packages come along as files: `pip download --dest wheels 'tacq-vllm[cuda]'` there,
`pip install --no-index --find-links wheels 'tacq-vllm[cuda]'` here.
"""

import argparse
import os
import sys
from pathlib import Path

from tacq_vllm.format.validation import find_faults


def main() -> None:
    """Fetch, or ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    fetcher = commands.add_parser("fetch")
    fetcher.add_argument("repo_id")
    fetcher.add_argument("folder", type=Path)
    fetcher.set_defaults(run=lambda given: fetch(given.repo_id, given.folder))
    asker = commands.add_parser("ask")
    asker.add_argument("folder", type=Path)
    asker.add_argument("prompt")
    asker.set_defaults(run=lambda given: ask(given.folder, given.prompt))
    arguments = parser.parse_args()
    arguments.run(arguments)


def fetch(repo_id: str, folder: Path) -> None:
    """Download a whole checkpoint into a folder."""
    from huggingface_hub import snapshot_download

    snapshot_download(repo_id, local_dir=folder)
    check(folder)


def ask(folder: Path, prompt: str) -> None:
    """Let Transformers write on, without a question to the Hub."""
    check(folder)
    # Read when the client is imported, and so before.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from use_from_transformers import write_on

    print(write_on(str(folder), prompt))


def check(folder: Path) -> None:
    """Stop at a checkpoint that lost something on its way."""
    faults = find_faults(folder)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
