from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tacq_vllm.hub.errors import HubError
from tacq_vllm.hub.merge import (
    BEGIN,
    END,
    NO_CARD,
    Card,
    merge_cards,
    parse_card,
    read_card,
)

OWN = """\
---
# What the Hub's template says
license: mit  # checked by hand
tags:
# ours and mine
- tacq
- rivers   # mine
date: 2025-01-31
empty: null
note: |
  two
  lines

last: [1, 2]
---

# Rivers

A paragraph.
"""


def card(text: str) -> Card:
    return parse_card(text, "README.md")


def merged(published: str, local: str = "", **metadata: object) -> str:
    sources = [card(text) if text else NO_CARD for text in (published, local)]
    return merge_cards(*sources, metadata, "Made.")


def test_nothing_yet() -> None:
    assert (
        merged("", tags=["a"]) == f"---\ntags:\n- a\n---\n\n{BEGIN}\n\nMade.\n\n{END}\n"
    )


def test_all_but_the_given_keys_stays_as_it_is_written() -> None:
    text = merged(OWN, note="one", tags=["tacq", "rivers", "new"], bits=3)

    expected = OWN.replace(
        "tags:\n# ours and mine\n- tacq\n- rivers   # mine",
        "tags:\n- tacq\n- rivers\n- new   # mine",
    )
    expected = expected.replace("note: |\n  two\n  lines\n", "note: one\n")
    expected = expected.replace("last: [1, 2]\n", "last: [1, 2]\nbits: 3\n")
    assert text == f"{expected}\n{BEGIN}\n\nMade.\n\n{END}\n"


def test_keys_that_are_right_already_stay_as_they_are() -> None:
    text = merged(OWN, tags=["tacq", "rivers"], license="mit")

    assert text.startswith(OWN)


def test_a_second_time_changes_nothing() -> None:
    once = merged(OWN, bits=3)

    assert merged(once, bits=3) == once
    assert merged(once, OWN, bits=3) == once


def test_only_the_text_between_the_marks_is_replaced() -> None:
    text = merged(f"Before.\n\n{BEGIN}\n\nOld.\n\n{END}\n\nAfter.\n")

    assert text.endswith(f"Before.\n\n{BEGIN}\n\nMade.\n\n{END}\n\nAfter.\n")


def test_a_lost_mark_loses_no_text() -> None:
    text = merged(f"Before.\n\n{BEGIN}\n\nOld and mine.\n")

    assert f"Before.\n\n{BEGIN}\n\nOld and mine.\n\n{BEGIN}\n\nMade." in text


def test_paragraphs_and_keys_of_both_cards() -> None:
    published = "---\na: 1\nb: 1\n---\n\nShared.\n\nPublished.\n"
    local = f"---\nb: 2\nc: 2\n---\n\nShared.\n\n{BEGIN}\n\nOld.\n\n{END}\n\nLocal.\n"

    text = merged(published, local, b=3)

    assert text == (
        "---\na: 1\nb: 3\nc: 2\n---\n\n"
        f"Shared.\n\nPublished.\n\n{BEGIN}\n\nMade.\n\n{END}\n\nLocal.\n"
    )


def test_a_generated_text_is_taken_as_it_is() -> None:
    section = r"a\u00e9b \1 \g<0>"
    once = merge_cards(NO_CARD, NO_CARD, {}, section)

    assert merge_cards(card(once), NO_CARD, {}, section) == once
    assert section in once


def test_line_ends_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\r\na: 1\r\n---\r\nMine.\r\n")

    assert read_card(tmp_path / "README.md", "here").body == "Mine.\r\n"


def test_windows_line_ends() -> None:
    text = merged("---\r\na: 1\r\nb: 2\r\n---\r\n\r\nMine.\r\n\r\nToo.\r\n", a=3)

    assert "a: 3\r\nb: 2" in text
    assert "Mine.\r\n\r\nToo." in text
    assert ModelCard(text).data.to_dict() == {"a": 3, "b": 2}


@pytest.mark.parametrize(
    "block", ["{a: 1, b: 2}", "a: &x 1\nb: *x\nc: *x", "? a\n: 1\nb: 2", "a: 1\na: 4"]
)
def test_metadata_that_cannot_be_edited_line_by_line(block: str) -> None:
    wanted = yaml.safe_load(block) | {"a": [3]}

    text = merged(f"---\n{block}\n---\n", a=[3])

    assert ModelCard(text).data.to_dict() == wanted


def test_a_key_is_removed() -> None:
    assert ModelCard(merged("---\na: 1\nb: 2\n---\n", a=None)).data.to_dict() == {
        "b": 2
    }


@pytest.mark.parametrize(
    "block",
    [
        "tags: [",
        "tags:\n- a: b",
        "- a list",
        "model-index:\n- name: x",
        "1: a number",
        "a: !!python/object/apply:os.getcwd []",
    ],
)
def test_metadata_that_the_hub_would_refuse(block: str) -> None:
    with pytest.raises(HubError, match=r"^here: its metadata is not valid") as refusal:
        parse_card(f"---\n{block}\n---\n", "here")

    assert "\n" not in str(refusal.value)
