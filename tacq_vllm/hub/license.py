"""The licence of a base model, which its quantized checkpoint carries on."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, hf_hub_url

from tacq_vllm.hub.errors import HubError, hub_errors
from tacq_vllm.hub.merge import CARD_NAME, parse_card

_KEYS = ("license", "license_name", "license_link")

logger = logging.getLogger(__name__)


def base_license(folder: Path | None, hub_id: str | None) -> dict[str, Any]:
    """The licence keys of a base model's card; none where no card can be read.

    Args:
        folder: where the model's files are.
        hub_id: its id on the Hub, which is asked where the folder has no card.
    """
    path = folder / CARD_NAME if folder is not None else None
    try:
        if path is None or not path.is_file():
            if hub_id is None:
                return {}
            with hub_errors(hub_id):
                path = Path(hf_hub_download(hub_id, CARD_NAME))
        data = parse_card(path.read_text(encoding="utf-8"), str(path)).data
    except (HubError, OSError, UnicodeDecodeError) as error:
        logger.info("no licence from the base model's card: %s", error)
        return {}
    found = {key: data[key] for key in _KEYS if key in data}
    link = found.get("license_link")
    if hub_id is not None and isinstance(link, str) and "://" not in link:
        # It means a file of the base model's own repo.
        found["license_link"] = hf_hub_url(hub_id, link)
    return found
