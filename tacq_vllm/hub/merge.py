"""Making a model card anew without losing what a person wrote in it.

Ours is the text between two marks, and the metadata keys that are given; all else in a
README.md stays as it is, to the comments in its metadata.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from tacq_vllm.hub.errors import HubError, one_line

CARD_NAME = "README.md"
BEGIN = "<!-- tacq-vllm: made by `tacq push`, which replaces all up to the end mark -->"
END = "<!-- tacq-vllm: end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """A README.md, taken apart."""

    metadata: str
    """The YAML at its head, as it is written."""
    data: dict[str, Any]
    """What the YAML says."""
    body: str

    @property
    def own_text(self) -> str:
        """The text that a person wrote."""
        return _SECTION.sub("", self.body)


NO_CARD = Card("", {}, "")


def parse_card(text: str, where: str) -> Card:
    """Take a card apart; `where` is named in the error.

    Raises:
        HubError: its metadata is not what the Hub takes.
    """
    match = REGEX_YAML_BLOCK.match(text)
    if match is None:
        return Card("", {}, text)
    try:
        data = yaml.safe_load(match[2]) or {}
        tags = ModelCardData(**data).tags or ()
        if any(isinstance(tag, dict | list) for tag in tags):
            raise ValueError("tags: one is not a word")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise HubError(
            f"{where}: its metadata is not valid, mend it first: {one_line(error)}"
        ) from error
    return Card(match[2], data, text[match.end() :])


def read_card(path: Path, where: str) -> Card:
    """Read a card and take it apart; `where` is named in the error.

    Raises:
        HubError: it is not UTF-8, or its metadata is not what the Hub takes.
    """
    try:
        # With the line ends that it has.
        with path.open(encoding="utf-8", newline="") as file:
            return parse_card(file.read(), where)
    except UnicodeDecodeError as error:
        raise HubError(f"{where}: not UTF-8: {error}") from error


def merge_cards(
    published: Card, local: Card, metadata: dict[str, Any], section: str
) -> str:
    """Write a card that has all that people wrote in two, and what is new.

    Args:
        published: the card of the repo; its text comes first.
        local: the card of the folder; paragraphs and keys that the other lacks are
            added.
        metadata: values that replace those of both; None removes a key.
        section: the generated text.
    """
    base = local if published == NO_CARD else published
    added = {key: local.data[key] for key in local.data if key not in base.data}
    block = _replace_keys(base, added | metadata)
    marked = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    if _SECTION.search(base.body):
        body = _SECTION.sub(lambda _: marked, base.body, count=1)
    else:
        body = f"{base.body.rstrip()}\n\n{marked}"
    body = "\n\n".join([body.strip(), *_new_paragraphs(base, local)])
    return f"---\n{block.strip()}\n---\n\n{body}\n"


def _new_paragraphs(base: Card, local: Card) -> list[str]:
    """What a person wrote in one card and is not in the other."""
    paragraphs = re.split(r"\r?\n\s*\r?\n", local.own_text)
    return [p.strip() for p in paragraphs if p.strip() not in base.own_text]


def _replace_keys(card: Card, updates: dict[str, Any]) -> str:
    """Give keys of a card's metadata other values, and leave the rest of its text."""
    removed = [key for key, value in updates.items() if value is None]
    wanted = {k: v for k, v in (card.data | updates).items() if k not in removed}
    changed = {k: v for k, v in updates.items() if card.data.get(k) != v}
    root = yaml.compose(card.metadata, Loader=yaml.SafeLoader)
    pieces, position = [], 0
    for key, value in root.value if root else ():
        if key.value in changed:
            pieces.append(card.metadata[position : key.start_mark.index])
            new = changed.pop(key.value)
            pieces.append("" if new is None else _dump({key.value: new}))
            position = _end(card.metadata, value)
    pieces.append(card.metadata[position:].rstrip())
    if changed:
        pieces.append("\n" + _dump(changed))
    text = "".join(pieces)
    try:
        is_right = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        is_right = False
    # Values in braces, or used again by an alias, cannot be replaced line by line.
    return text if is_right else _dump(wanted)


def _end(text: str, node: yaml.Node) -> int:
    """Where the last value of a node ends, the comments after it left out."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(node, yaml.MappingNode) else last
    return len(text[: node.end_mark.index].rstrip())


def _dump(data: dict[str, Any]) -> str:
    # Long values stay on one line, as the Hub's client writes them.
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    return text.rstrip()
