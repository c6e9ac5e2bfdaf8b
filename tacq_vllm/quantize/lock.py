"""One command at a time in a folder."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tacq_vllm.quantize.errors import QuantizeError

logger = logging.getLogger(__name__)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other commands out of it while the body runs.

    The folder itself is locked: no file is left in it, and the lock goes with the
    process, however that ends. On a network file system it may hold on this machine
    alone; one without locks is named in the log.

    Raises:
        QuantizeError: another process holds the lock.
        OSError: there is no such folder, and none can be made.
    """
    # Of a file, opening it as a folder says what is wrong.
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizeError(
                f"{folder}: another process is at work there; wait until it ends, or "
                "choose another folder"
            ) from error
        except OSError as error:
            logger.warning(
                "%s: cannot be locked (%s): start no second command that works there",
                folder,
                error.strerror,
            )
        yield
    finally:
        os.close(handle)
