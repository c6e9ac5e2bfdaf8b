"""The files that vLLM will load, found before its workers start."""

from pathlib import Path

from vllm import envs

from tacq_vllm.hub.errors import HubError
from tacq_vllm.hub.pull import checkpoint_folder, is_hub_id
from tacq_vllm.integrations.vllm.building import config_in_the_making
from tacq_vllm.integrations.vllm.errors import logger, refuse

_SAFETENSORS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
_PICKLES = ("pt", "npcache")
_SAVED_BY_VLLM = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")
"""Of a model as it is in a worker's memory, or loaded without its last step."""


def weights_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint; a repo of the Hub is downloaded to its cache.

    Returns:
        None where vLLM will read no files of a folder: dummy weights, a stream, or
        another hub than Hugging Face's.

    Raises:
        ValueError: the repo cannot be had, or the load format cannot load a checkpoint.
    """
    config = config_in_the_making()
    load_format = str(config.load_config.load_format) if config else "auto"
    if load_format in _PICKLES:
        refuse(
            f"--load-format {load_format} reads pickled weights, which a TaCQ "
            "checkpoint does not have: leave it out"
        )
    if load_format in _SAVED_BY_VLLM:
        refuse(
            f"--load-format {load_format} is not supported: leave it out, each rank "
            "keeps its own part of an ordinary checkpoint"
        )
    if load_format not in _SAFETENSORS:
        return None
    if Path(model).is_dir():
        return Path(model)
    if envs.VLLM_USE_MODELSCOPE or not is_hub_id(model):
        return None
    cache = config.load_config.download_dir if config else None
    if revision is None and config:
        # vLLM 0.26 and 0.27 do not tell it.
        revision = config.model_config.revision
    try:
        return checkpoint_folder(model, revision, _note, cache)
    except HubError as error:
        refuse(error)


def _note(text: str) -> None:
    logger.info("tacq: %s", text)
