"""Measure a checkpoint beside its 16-bit model, and share it on the Hub.

    python examples/evaluate_and_push.py CHECKPOINT BASE_MODEL REPO_ID [OPTIONS]

OPTIONS are those of `tacq evaluate`, such as `--tasks` and `--data-root`. The scores go
into the checkpoint's folder, and from there into the model card that the push writes.
Log in first: `hf auth login`.
"""

import argparse
import subprocess
from pathlib import Path

from serve_and_ask import find_command

from tacq_vllm.scores import SCORES_NAME


def main() -> None:
    """Evaluate, push."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base_model")
    parser.add_argument("repo_id", help="`user/name`; made private if it is new")
    parser.add_argument("--tasks", default="wikitext2")
    arguments, options = parser.parse_known_args()

    tacq(
        *("evaluate", arguments.checkpoint, "--tasks", arguments.tasks),
        *("--baseline", arguments.base_model, *options),
        *("--json", arguments.checkpoint / SCORES_NAME),
    )
    tacq("push", arguments.checkpoint, arguments.repo_id, "--private")


def tacq(*arguments: str | Path) -> None:
    """Run a command; stop where it fails."""
    subprocess.run([find_command("tacq"), *arguments], check=True)


if __name__ == "__main__":
    main()
