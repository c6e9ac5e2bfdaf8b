"""Checkpoints by what a user calls them: a folder, or a repo on the Hub."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from tacq_vllm.format.checkpoint import CONFIG_NAME, INDEX_NAME
from tacq_vllm.format.json_object import MAX_BYTES
from tacq_vllm.format.schema import FormatError
from tacq_vllm.hub.errors import HubError, hub_errors

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PARTS = (CONFIG_NAME, INDEX_NAME, "*.safetensors")


def is_hub_id(name: str) -> bool:
    """Whether a name is `user/name`, and nothing here is called so."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


@contextmanager
def checkpoint_headers(name: str, revision: str | None) -> Iterator[Path]:
    """Give a checkpoint's folder; of a repo, one with all but the weights' values.

    Raises:
        HubError: there is no such repo or revision, or the Hub is out of reach.
    """
    if not is_hub_id(name):
        yield _local_folder(name, revision)
        return
    with tempfile.TemporaryDirectory(prefix="tacq-") as temporary:
        with hub_errors(name, revision):
            try:
                folder = _fetch_headers(name, revision, Path(temporary))
            except OfflineModeIsEnabled:
                folder = _snapshot(name, revision)
        try:
            yield folder
        except FormatError as error:
            # The folder is gone when this is read.
            raise FormatError(str(error).replace(temporary, name)) from error


def checkpoint_folder(
    name: str,
    revision: str | None,
    note: Callable[[str], None],
    cache: str | None = None,
) -> Path:
    """Give a checkpoint's folder; a repo is downloaded to the cache, which is noted.

    Args:
        name: a folder, or a repo.
        revision: of a repo.
        note: is told that a repo is downloaded.
        cache: folder to download to; None: the Hub client's own.

    Raises:
        HubError: there is no such repo or revision, or the Hub is out of reach.
    """
    if not is_hub_id(name):
        return _local_folder(name, revision)
    note(f"{name}: its values are needed: taken from the cache, or downloaded to it")
    with hub_errors(name, revision):
        return _snapshot(name, revision, cache)


def _local_folder(name: str, revision: str | None) -> Path:
    if revision is not None:
        raise HubError(f"{name}: --revision is for repos of the Hub, `user/name`")
    return Path(name)


def _snapshot(repo_id: str, revision: str | None, cache: str | None = None) -> Path:
    # Only what is read here, so that offline a cache that has no more will do.
    return Path(
        snapshot_download(
            repo_id, revision=revision, cache_dir=cache, allow_patterns=list(_PARTS)
        )
    )


def _fetch_headers(repo_id: str, revision: str | None, folder: Path) -> Path:
    """Make weight files that have the headers and sizes of a repo's, and holes.

    So every check of a folder, safetensors' own among them, holds for a repo too.
    """
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    files = HfFileSystem()
    for sibling in info.siblings or ():
        name, size = sibling.rfilename, sibling.size or 0
        if "/" in name or not any(fnmatch(name, part) for part in _PARTS):
            continue
        # Of that commit, whatever is pushed meanwhile. Without its cache the client
        # asks for just the bytes that are read.
        address = f"{repo_id}@{info.sha}/{name}"
        with files.open(address, cache_type="none") as source:
            if not name.endswith(".safetensors"):
                # Of a larger one it will be said that it is.
                (folder / name).write_bytes(source.read(min(size, MAX_BYTES + 1)))
                continue
            start = source.read(min(8, size))
            length = min(int.from_bytes(start, "little"), MAX_BYTES)
            header = source.read(min(length, size - len(start)))
        (folder / name).write_bytes(start + header)
        os.truncate(folder / name, size)
    return folder
