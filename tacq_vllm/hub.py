"""The model card of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tacq_vllm import __version__
from tacq_vllm.format.inspection import inspect_weights
from tacq_vllm.format.schema import QuantizationSchema

CARD_NAME = "README.md"


def write_model_card(folder: Path, schema: QuantizationSchema, base_model: str) -> None:
    """Write the card of a checkpoint.

    Args:
        folder: where its weight files are.
        schema: its quantization block.
        base_model: name of the 16-bit model it was made from.
    """
    figures = inspect_weights(folder, schema)
    recipe = json.dumps(schema.recipe, indent=2)
    data: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tacq", "vllm", f"{figures.bits}-bit"],
    }
    body = f"""\
# {base_model}, TaCQ {figures.bits} bits

{base_model}, quantized with [TaCQ](https://arxiv.org/abs/2504.07389) by
tacq-vllm {__version__}: {figures.outliers:,} of {figures.weights:,} weights of the
attention and MLP linears are kept in 16 bits, the others in {figures.bits} bits.

| | |
| --- | --- |
| effective bits (codes, scales, zero-points, kept weights and indices) | \
{figures.effective_bits:.3f} |
| bits by the paper's formula | {figures.paper_bits:.3f} |
| weight files | {figures.checkpoint_bytes / 1e6:.1f} MB |

## Serve

With tacq-vllm installed beside vLLM:

```
vllm serve THIS_FOLDER_OR_REPO
```

On a CPU add `--enforce-eager`.

## Use from Transformers

Without the first import Transformers only warns about an unknown quantization, and the
weights that it then makes up are nonsense.

```python
import tacq_vllm.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPO")
```

## Recipe

```json
{recipe}
```
"""
    card = ModelCard(f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}")
    card.save(folder / CARD_NAME)
