"""The model card of a checkpoint: its text and its metadata."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index
from pydantic import ValidationError

from tacq_vllm import __version__
from tacq_vllm.format.inspection import inspect_weights
from tacq_vllm.format.schema import QuantizationSchema
from tacq_vllm.format.simulated import AnySchema
from tacq_vllm.hub.license import base_license
from tacq_vllm.hub.merge import CARD_NAME, NO_CARD, Card, merge_cards, read_card
from tacq_vllm.hub.text import CardFacts, Origin, card_text
from tacq_vllm.scores import Score, read_scores

ORIGIN_KEY = "tacq"
"""The metadata key under which a card says how its checkpoint came about."""

MEASURED_WITH = "tacq evaluate"
"""In the arguments of a metric: it is ours, and goes with the scores it came from."""

UNKNOWN_ADDRESS = "THIS_FOLDER_OR_REPO"
"""What to load, in a card that nobody has pushed."""

_BITS_TAG = re.compile("[234]-bit")


def write_model_card(
    folder: Path,
    schema: AnySchema,
    base_model: str,
    hub_id: str | None = None,
    base_folder: Path | None = None,
) -> None:
    """Write the card of a new checkpoint.

    Args:
        folder: where its weight files are.
        schema: its quantization block.
        base_model: name of the 16-bit model it was made from.
        hub_id: that model's id on the Hub, if it came from there.
        base_folder: where that model's own card may be.
    """
    versions = {name: version(name) for name in ("torch", "transformers")}
    facts = CardFacts(
        address=UNKNOWN_ADDRESS,
        schema=schema,
        figures=inspect_weights(folder, schema),
        scores=read_scores(folder),
        origin=Origin(
            base_model=base_model, versions={"tacq-vllm": __version__, **versions}
        ),
        base_id=hub_id,
        license=base_license(base_folder, hub_id),
    )
    card = make_card(facts, NO_CARD, NO_CARD)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def rewrite_model_card(folder: Path, schema: QuantizationSchema, source: Path) -> None:
    """Write the card of a checkpoint that was made from another one.

    Args:
        folder: where its weight files are.
        schema: its quantization block.
        source: the other checkpoint; what people wrote in its card stays.
    """
    path = source / CARD_NAME
    local = read_card(path, str(path)) if path.is_file() else NO_CARD
    card = update_model_card(folder, schema, UNKNOWN_ADDRESS, local, NO_CARD)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def update_model_card(
    folder: Path, schema: QuantizationSchema, repo_id: str, local: Card, published: Card
) -> str:
    """Write the card of a checkpoint for its repo, from those of folder and repo.

    Raises:
        FormatError: the folder is not a whole TaCQ checkpoint.
        ScoresError: its scores cannot be read.
    """
    # The folder knows better than an earlier push what it was made from.
    base_id = local.data.get("base_model", published.data.get("base_model"))
    facts = CardFacts(
        address=repo_id,
        schema=schema,
        figures=inspect_weights(folder, schema),
        scores=read_scores(folder),
        origin=read_origin(local, published),
        base_id=base_id,
        license={}
        if "license" in local.data | published.data or not isinstance(base_id, str)
        else base_license(None, base_id),
    )
    return make_card(facts, local, published)


def read_origin(*cards: Card) -> Origin:
    """How a checkpoint came about, by the first of its cards that says so."""
    for card in cards:
        try:
            return Origin.model_validate(card.data.get(ORIGIN_KEY))
        except ValidationError:
            continue
    return Origin()


def make_card(facts: CardFacts, local: Card, published: Card) -> str:
    """Write a card anew, with all that people wrote in two earlier ones."""
    given = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **facts.license,
    }
    theirs = local.data | published.data
    metadata = {key: value for key, value in given.items() if key not in theirs}
    if facts.base_id:
        metadata["base_model"] = facts.base_id
        metadata["base_model_relation"] = "quantized"
    kind = "simulated" if facts.figures.simulated else "vllm"
    tags = ["tacq", kind, f"{facts.figures.bits}-bit", *_tags(published, local)]
    metadata["tags"] = list(dict.fromkeys(tags))
    if facts.origin != Origin():
        metadata[ORIGIN_KEY] = facts.origin.model_dump()
    # None removes scores that the checkpoint no longer has.
    metadata["model-index"] = _model_index(facts, published, local) or None
    return merge_cards(published, local, metadata, card_text(facts))


def _tags(*cards: Card) -> list[str]:
    """The tags that people added."""
    tags = [t for c in cards for t in ModelCardData(tags=c.data.get("tags")).tags or ()]
    return [tag for tag in tags if not _BITS_TAG.fullmatch(str(tag))]


def _model_index(facts: CardFacts, *cards: Card) -> list[dict[str, Any]]:
    """The results that people added, and those of the score file."""
    entries: list[dict[str, Any]] = []
    for card in cards:
        for entry in card.data.get("model-index") or ():
            theirs = entry | {"results": _without_ours(entry["results"])}
            if theirs["results"] and theirs not in entries:
                entries.append(theirs)
    if facts.scores is None:
        return entries
    name = facts.address.rpartition("/")[2]
    results = [_eval_result(score) for score in facts.scores.scores]
    (ours,) = eval_results_to_model_index(name, results)
    if not entries:
        return [ours]
    first = entries[0]
    return [first | {"results": first["results"] + ours["results"]}, *entries[1:]]


def _without_ours(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results without the metrics that came from a score file."""
    theirs = []
    for result in results:
        metrics = [m for m in result["metrics"] if not _is_ours(m.get("args"))]
        if metrics:
            theirs.append(result | {"metrics": metrics})
    return theirs


def _is_ours(arguments: object) -> bool:
    return (
        isinstance(arguments, dict) and arguments.get("measured_with") == MEASURED_WITH
    )


def _eval_result(score: Score) -> EvalResult:
    details = {
        "measured_with": MEASURED_WITH,
        "stderr": score.stderr,
        "limit": score.limit,
        "unquantized": score.baseline,
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.task,
        dataset_name=score.task,
        metric_type=score.metric,
        metric_value=score.value,
        metric_args={key: value for key, value in details.items() if value is not None},
    )
