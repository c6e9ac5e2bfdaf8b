import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.repocard_data import eval_results_to_model_index

from tacq_vllm.format.checkpoint import read_schema
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.hub import card as hub_card
from tacq_vllm.hub import write_model_card
from tacq_vllm.hub.card import update_model_card
from tacq_vllm.hub.license import base_license
from tacq_vllm.hub.merge import CARD_NAME, NO_CARD, Card, parse_card
from tacq_vllm.scores import SCORES_NAME, Score, Scores
from tests.builders import rewrite_schema

SCORES = Scores(
    scores=(
        Score(task="wikitext2", metric="perplexity", value=31.084, baseline=23.35),
        Score(
            task="gsm8k",
            metric="exact_match",
            value=0.25,
            stderr=0.04,
            baseline=0.31,
            limit=100,
        ),
    ),
    versions={"tacq-vllm": "0.1.0", "torch": "2.13.0"},
)


def update(folder: Path, published: Card = NO_CARD) -> ModelCard:
    local = parse_card((folder / CARD_NAME).read_text(), CARD_NAME)
    schema = read_schema(folder)
    return ModelCard(update_model_card(folder, schema, "org/x", local, published))


def put_scores(folder: Path, scores: Scores = SCORES) -> None:
    (folder / SCORES_NAME).write_text(scores.model_dump_json())


def data_of(card: ModelCard) -> dict[str, Any]:
    data: dict[str, Any] = card.data.to_dict()
    return data


def test_figures_calibration_recipe_and_versions(tiny_checkpoint: Path) -> None:
    figures = inspect_checkpoint(tiny_checkpoint)

    card = update(tiny_checkpoint)

    assert "# tiny-llama, TaCQ 3 bits\n" in card.text
    assert f"indices) | {figures.effective_bits:.3f} |\n" in card.text
    assert f"formula | {figures.paper_bits:.3f} |\n" in card.text
    assert f"files | {figures.checkpoint_bytes / 1e6:.1f} MB |\n" in card.text
    assert "| calibration data | calibration.txt: 8 x 32 tokens at most" in card.text
    assert '"group_size": 32' in card.text
    assert "| made with | tacq-vllm " in card.text
    assert "THIS_FOLDER_OR_REPO" not in card.text
    assert "Scores" not in card.text
    data = data_of(card)
    assert data["tags"] == ["tacq", "vllm", "3-bit"]
    assert data["library_name"] == "transformers"
    assert "base_model" not in data
    assert "license" not in data


def test_a_recipe_of_another_tool(checkpoint_copy: Path) -> None:
    rewrite_schema(checkpoint_copy, recipe={"made": "by hand"})

    card = update(checkpoint_copy)

    assert '"made": "by hand"' in card.text
    assert "calibration data" not in card.text


def test_a_folder_without_a_card(checkpoint_copy: Path) -> None:
    schema = read_schema(checkpoint_copy)

    card = ModelCard(
        update_model_card(checkpoint_copy, schema, "org/x", NO_CARD, NO_CARD)
    )

    assert "# A 16-bit model, TaCQ 3 bits\n" in card.text
    assert "made with" not in card.text


def test_scores_beside_those_in_16_bits(checkpoint_copy: Path) -> None:
    put_scores(checkpoint_copy)

    card = update(checkpoint_copy)

    assert "| wikitext2 | perplexity | 31.08 | 23.35 |\n" in card.text
    assert "| gsm8k, limit 100 | exact_match | 0.25 ± 0.04 | 0.31 |\n" in card.text
    assert "with tacq-vllm 0.1.0, torch 2.13.0." in card.text
    first, second = card.data.eval_results
    assert (first.dataset_type, first.metric_type) == ("wikitext2", "perplexity")
    assert first.metric_value == 31.084
    assert first.metric_args["unquantized"] == 23.35
    assert second.metric_args["limit"] == 100
    assert card.data.model_name == "x"


def test_metadata_survives_the_round_trip(checkpoint_copy: Path) -> None:
    put_scores(checkpoint_copy)
    theirs = EvalResult("text-generation", "gsm8k", "GSM8K", "accuracy", 0.5)
    own = ModelCardData(
        model_name="mine", eval_results=[theirs], language="en", datasets=["a/b"]
    )
    published = parse_card(f"---\n{own.to_yaml()}\n---\n\nMine.\n", CARD_NAME)

    card = update(checkpoint_copy, published)

    again = ModelCard(str(card))
    assert str(again) == str(card)
    assert ModelCardData(**data_of(card)).to_dict() == data_of(card)
    assert again.data.language == "en"
    assert again.data.datasets == ["a/b"]
    assert again.data.model_name == "mine"
    values = {(r.dataset_type, r.metric_type): r for r in again.data.eval_results}
    assert values["gsm8k", "accuracy"].metric_value == 0.5
    assert values["gsm8k", "exact_match"].metric_value == 0.25
    assert values["wikitext2", "perplexity"].metric_value == 31.084


def test_new_scores_replace_ours_alone(checkpoint_copy: Path) -> None:
    put_scores(checkpoint_copy)
    theirs = EvalResult("text-generation", "gsm8k", "GSM8K", "accuracy", 0.5)
    first = update(checkpoint_copy)
    first.data.eval_results.append(theirs)
    # The client puts both under one result.
    published = parse_card(str(first), CARD_NAME)
    put_scores(checkpoint_copy, SCORES.model_copy(update={"scores": SCORES.scores[:1]}))

    fewer = update(checkpoint_copy, published)
    (checkpoint_copy / SCORES_NAME).unlink()
    none = update(checkpoint_copy, published)

    assert [r.metric_type for r in fewer.data.eval_results] == [
        "accuracy",
        "perplexity",
    ]
    assert [r.metric_type for r in none.data.eval_results] == ["accuracy"]
    assert "| wikitext2 |" in fewer.text
    assert "## Scores" not in none.text


def test_results_of_both_cards_are_there_once(checkpoint_copy: Path) -> None:
    """A folder that was downloaded has those that the repo has."""
    theirs = EvalResult("text-generation", "gsm8k", "GSM8K", "accuracy", 0.5)
    index = [
        *eval_results_to_model_index("first", [theirs]),
        *eval_results_to_model_index("second", [theirs]),
    ]
    text = f"---\n{yaml.safe_dump({'model-index': index})}---\n"
    (checkpoint_copy / CARD_NAME).write_text(text)
    put_scores(checkpoint_copy)

    card = parse_card(text, CARD_NAME)
    schema = read_schema(checkpoint_copy)
    text = update_model_card(checkpoint_copy, schema, "org/x", card, card)

    first, last = parse_card(text, CARD_NAME).data["model-index"]
    assert [entry["name"] for entry in (first, last)] == ["first", "second"]
    assert [len(entry["results"]) for entry in (first, last)] == [3, 1]


def test_scores_that_are_gone_leave_no_index(checkpoint_copy: Path) -> None:
    put_scores(checkpoint_copy)
    published = parse_card(str(update(checkpoint_copy)), CARD_NAME)
    (checkpoint_copy / SCORES_NAME).unlink()

    assert "model-index" not in data_of(update(checkpoint_copy, published))


def test_what_a_person_chose_wins(tiny_checkpoint: Path) -> None:
    block = "license: mit\npipeline_tag: text2text-generation\ntags: [rivers, 2-bit]"
    published = parse_card(f"---\n{block}\n---\n", CARD_NAME)

    data = data_of(update(tiny_checkpoint, published))

    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text2text-generation"
    # Of an earlier checkpoint of ours: 2 bits.
    assert data["tags"] == ["tacq", "vllm", "3-bit", "rivers"]


def test_base_model_of_a_local_folder(checkpoint_copy: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / CARD_NAME).write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")

    write_model_card(
        checkpoint_copy, read_schema(checkpoint_copy), "my base", base_folder=base
    )

    data = data_of(update(checkpoint_copy))
    assert data["license"] == "apache-2.0"
    assert "language" not in data
    assert "base_model" not in data
    assert "# my base, TaCQ 3 bits" in update(checkpoint_copy).text


def test_base_model_of_either_card(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's is the one that it was made from."""
    asked = []

    def ask(folder: Path | None, hub_id: str | None) -> dict[str, str]:
        asked.append(hub_id)
        return {"license": "other", "license_name": "river"}

    monkeypatch.setattr(hub_card, "base_license", ask)
    published = parse_card("---\nbase_model: org/theirs\n---\n", CARD_NAME)
    chosen = parse_card("---\nbase_model: a/b\nlicense: mit\n---\n", CARD_NAME)

    first = data_of(update(checkpoint_copy, published))
    second = data_of(update(checkpoint_copy, chosen))
    (checkpoint_copy / CARD_NAME).write_text("---\nbase_model: org/mine\n---\n")
    third = data_of(update(checkpoint_copy, published))

    assert first["base_model"] == "org/theirs"
    assert first["base_model_relation"] == "quantized"
    assert first["license_name"] == "river"
    # Not the name of one licence beside another.
    assert second["license"] == "mit"
    assert "license_name" not in second
    assert third["base_model"] == "org/mine"
    assert asked == ["org/theirs", "org/mine"]


@pytest.mark.parametrize("link", ["https://river.org/licence", "LICENSE"])
def test_the_link_of_a_licence(tmp_path: Path, link: str) -> None:
    """A name is that of a file in the base model's repo."""
    (tmp_path / CARD_NAME).write_text(
        f"---\nlicense: other\nlicense_link: {link}\n---\n"
    )

    found = base_license(tmp_path, "org/base")["license_link"]

    assert found == (link if "://" in link else hf_hub_url("org/base", link))


@pytest.mark.parametrize("text", [None, "no metadata", "---\ntags: [\n---\n", "\udcff"])
def test_no_licence_is_guessed(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / CARD_NAME).write_text(text, errors="surrogateescape")

    assert base_license(tmp_path, None) == {}
    assert base_license(None, None) == {}


def test_a_copied_folder_keeps_its_origin(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "renamed"))
    first = parse_card(str(update(folder)), CARD_NAME)
    (folder / CARD_NAME).write_text("---\ntacq: spoilt\n---\n\nMine.\n")

    card = update(folder, first)

    assert "# tiny-llama, TaCQ 3 bits" in card.text
    assert "Mine." in card.text
