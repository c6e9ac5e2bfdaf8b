"""The text of a model card, from the facts of its checkpoint."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tacq_vllm.config import CalibrationConfig
from tacq_vllm.format.inspection import Inspection
from tacq_vllm.format.simulated import AnySchema
from tacq_vllm.scores import Score, Scores

_METHODS = {
    "tacq": ("TaCQ", "[TaCQ](https://arxiv.org/abs/2504.07389)"),
    "gptq": ("GPTQ", "[GPTQ](https://arxiv.org/abs/2210.17323)"),
    "rtn": ("RTN", "rounding to nearest"),
    "squeezellm": ("SqueezeLLM", "[SqueezeLLM](https://arxiv.org/abs/2306.07629)"),
    "spqr": ("SpQR", "[SpQR](https://arxiv.org/abs/2306.03078)"),
    "slim-llm": ("SliM-LLM", "[SliM-LLM](https://arxiv.org/abs/2405.14917)"),
    "fineq": ("FineQ", "[FineQ](https://arxiv.org/abs/2504.19746)'s clusters"),
}
"""What a recipe's method is called, and where it comes from."""


class Origin(BaseModel):
    """What only the one who quantized knows; the card keeps it for the next push."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = "A 16-bit model"
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class CardFacts:
    """All that a card tells."""

    address: str
    """What to give to vLLM and Transformers."""
    schema: AnySchema
    figures: Inspection
    scores: Scores | None
    origin: Origin
    base_id: Any
    """The base model's id on the Hub, or ids; None: it did not come from there."""
    license: dict[str, Any]
    """The licence keys of the base model's card."""


def card_text(facts: CardFacts) -> str:
    """The generated part of a card."""
    figures, base = facts.figures, facts.origin.base_model
    name, method = _METHODS.get(
        str(facts.schema.recipe.get("method")), _METHODS["tacq"]
    )
    title = f"{base}, {name} {figures.code_bits:.3g} bits"
    if figures.simulated:
        title += ", simulated"
    return f"""\
# {title}

{base}, quantized with {method} by tacq-vllm.
Of the attention and MLP linears' {figures.weights:,} weights, {figures.outliers:,} are
kept in 16 bits, the others in {figures.code_bits:.3g} bits.

{_table(facts)}
{_score_table(facts.scores)}
{_simulated(facts) if figures.simulated else use_text(facts.address)}
## Recipe

```json
{json.dumps(facts.schema.recipe, indent=2)}
```
"""


def use_text(address: str) -> str:
    """How to serve a packed checkpoint, and to load it with Transformers.

    Args:
        address: what to give to them, a folder or a repo.
    """
    return f"""\
## Serve

With tacq-vllm installed beside vLLM:

```
vllm serve {address}
```

On a CPU add `--enforce-eager`.

## Use from Transformers

Without the first import Transformers only warns about an unknown quantization, and the
weights that it then makes up are nonsense.

```python
import tacq_vllm.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{address}")
```
"""


def _simulated(facts: CardFacts) -> str:
    return f"""\
## Simulated

For comparisons of quality only. The format of tacq-vllm cannot hold what
{facts.schema.recipe["method"]} makes of a weight, so the values that it stands for are
stored in 16 bits, as in any model of Transformers and vLLM: it takes the memory of one,
and is as fast. The effective bits are what it would take.
"""


def _table(facts: CardFacts) -> str:
    figures = facts.figures
    rows = {
        "effective bits (codes, scales, zero-points, kept weights and indices)": (
            f"{figures.effective_bits:.3f}"
        ),
        "bits by the paper's formula": (
            "" if figures.paper_bits is None else f"{figures.paper_bits:.3f}"
        ),
        "weight files": f"{figures.checkpoint_bytes / 1e6:.1f} MB",
        "calibration data": _calibration(facts.schema.recipe),
        "trained (DL-QAT) on": _calibration(facts.schema.recipe.get("recover")),
        "made with": _versions(facts.origin.versions),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _calibration(recipe: Any) -> str:
    # Loaders ignore the recipe, which may be that of another version or tool.
    if not isinstance(recipe, dict):
        return ""
    plain = {"rounding": "nearest", "keep_outliers": False}
    if recipe.get("method") == "rtn" or recipe.get("fineq") == plain:
        return "none"
    try:
        calibration = CalibrationConfig.model_validate(recipe.get("calibration"))
    except ValidationError:
        return ""
    return (
        f"{', '.join(calibration.sources)}: {calibration.num_samples} x "
        f"{calibration.seq_len} tokens at most, seed {calibration.seed}"
    )


def _score_table(scores: Scores | None) -> str:
    if scores is None:
        return ""
    rows = "\n".join(map(_score_row, scores.scores))
    return f"""
## Scores

| task | metric | this model | in 16 bits |
| --- | --- | --- | --- |
{rows}

Both measured by `tacq evaluate`, with {_versions(scores.versions)}.
"""


def _score_row(score: Score) -> str:
    task = score.task if score.limit is None else f"{score.task}, limit {score.limit}"
    error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    baseline = "" if score.baseline is None else f"{score.baseline:.4g}"
    return f"| {task} | {score.metric} | {score.value:.4g}{error} | {baseline} |"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
