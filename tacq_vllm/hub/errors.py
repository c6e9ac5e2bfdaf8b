"""What the Hub and its client refuse, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The base class of the HTTP library that this huggingface_hub is built on.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


_GOES_ON = "the same command goes on where this one stopped"


class HubError(ValueError):
    """The Hub does not give or take something; the message says what to do."""


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Tell in one line what the client raises within the body.

    Raises:
        HubError: naming the repo and the remedy.
    """
    try:
        yield
    except HubError:
        raise
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id}: gated; ask for access on its page, then log in with "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: no revision {revision!r} on the Hub") from error
    except HfHubHTTPError as error:
        # The Hub answers so, too, to those who may not know whether a repo exists.
        if error.response.status_code == 401:
            raise HubError(
                f"{repo_id}: private, or not on the Hub; log in with `hf auth login` "
                "or set HF_TOKEN"
            ) from error
        if isinstance(error, RepositoryNotFoundError):
            raise HubError(
                f"{repo_id}: neither a folder here nor a repo on the Hub that you see"
            ) from error
        advice = f"; {_GOES_ON}" if error.response.status_code >= 500 else ""
        raise HubError(f"{repo_id}: {one_line(error)}{advice}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{repo_id}: not whole in the cache, and the Hub is out of reach; run this "
            "again with a connection, HF_HUB_OFFLINE unset"
        ) from error
    except (ConnectionError, HTTP_ERROR) as error:
        reason, advice = f"no connection to the Hub: {one_line(error)}", _GOES_ON
        # hf_xet first asks for what a Hub without Xet does not have.
        if "xet-write-token" in str(error):
            reason = one_line(error)
            advice = "a Hub without Xet takes uploads with HF_HUB_DISABLE_XET=1"
        raise HubError(f"{repo_id}: {reason}; {advice}") from error
    except RuntimeError as error:
        # What the client makes of a transfer that broke.
        chain = [part for part in (error, error.__cause__) if part is not None]
        reason = ": ".join(one_line(part).rstrip(".") for part in chain)
        raise HubError(f"{repo_id}: {reason}; {_GOES_ON}") from error
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise HubError(f"{repo_id}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error, its lines joined."""
    return " ".join(str(error).split()) or type(error).__name__
