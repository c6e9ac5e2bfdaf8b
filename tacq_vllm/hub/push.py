"""Uploading a checkpoint folder, its card made anew, as one commit."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tacq_vllm.format.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_schema
from tacq_vllm.format.validation import find_faults
from tacq_vllm.hub.card import update_model_card
from tacq_vllm.hub.errors import HubError, hub_errors
from tacq_vllm.hub.merge import CARD_NAME, NO_CARD, read_card

_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors")
_MAIN = "main"


@dataclass(frozen=True)
class Push:
    """What an upload would do."""

    repo_id: str
    branch: str
    files: dict[str, Path]
    """Files of the folder by their names in the repo; the card is not among them."""
    card: str
    deleted: tuple[str, ...]
    """Weight files of the repo that the checkpoint no longer has."""
    parent: str | None
    """The commit that the card was made for; None: there is none yet."""
    makes_repo: bool
    makes_branch: bool
    private: bool
    """Of a repo that is made."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name in the repo."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted((sizes | {CARD_NAME: len(self.card.encode())}).items()))


def plan_push(folder: Path, repo_id: str, private: bool, revision: str | None) -> Push:
    """Find out what an upload would do; writes nothing, here or there.

    Raises:
        HubError: the folder is not whole, or the repo cannot take it.
        ScoresError: its scores cannot be read.
    """
    if "/" not in repo_id:
        raise HubError(f"{repo_id}: whose? give it as `user/{repo_id}`")
    faults = find_faults(folder)
    if faults:
        more = f", and {len(faults) - 1} more faults" if faults[1:] else ""
        raise HubError(f"{folder}: not whole: {faults[0]}{more}; see `tacq verify`")
    branch = revision or _MAIN
    with hub_errors(repo_id, revision):
        info, makes_branch = _published(repo_id, branch)
        if private and info is not None and not info.private:
            raise HubError(
                f"{repo_id}: is public already; make it private on its page, or leave "
                "--private out"
            )
        names = [sibling.rfilename for sibling in info.siblings or ()] if info else []
        published = NO_CARD
        if info is not None and CARD_NAME in names:
            path = hf_hub_download(repo_id, CARD_NAME, revision=info.sha)
            published = read_card(Path(path), f"{repo_id}/{CARD_NAME}")
    files = _files(folder)
    # An index that stayed behind would name shards that are not of this checkpoint.
    others = [name for name in names if name not in files]
    deleted = tuple(n for n in others if any(fnmatch(n, part) for part in _WEIGHTS))
    for name in others:
        if name not in deleted and fnmatch(name, "*.safetensors") and "/" not in name:
            raise HubError(
                f"{repo_id}: {name} there is a weight file that no reader would take "
                "beside this checkpoint's; delete it, or push to another repo"
            )
    local = NO_CARD
    if (folder / CARD_NAME).is_file():
        local = read_card(folder / CARD_NAME, str(folder / CARD_NAME))
    return Push(
        repo_id=repo_id,
        branch=branch,
        files=files,
        card=update_model_card(folder, read_schema(folder), repo_id, local, published),
        deleted=deleted,
        parent=info.sha if info else None,
        makes_repo=info is None,
        makes_branch=makes_branch,
        private=private,
    )


def upload(plan: Push) -> str:
    """Upload what was planned; give the address of the commit.

    Raises:
        HubError: the Hub does not take it, or the connection broke.
    """
    api = HfApi()
    with hub_errors(plan.repo_id):
        if plan.makes_repo:
            api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
        if plan.makes_branch:
            api.create_branch(plan.repo_id, branch=plan.branch, exist_ok=True)
        # One commit, so that nobody pulls half a checkpoint; `upload_folder` makes
        # several, and `upload_large_folder`, which newer clients lack, knows no
        # revision. Resumable all the same: what the Hub has of an earlier attempt,
        # whole files by LFS and chunks by Xet, is not sent again.
        commit = api.create_commit(
            plan.repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in plan.files.items()),
                CommitOperationAdd(CARD_NAME, plan.card.encode()),
                *(CommitOperationDelete(name) for name in plan.deleted),
            ],
            commit_message="Upload a TaCQ checkpoint",
            revision=plan.branch,
            # Refused where the card has been edited since it was read.
            parent_commit=plan.parent,
        )
    return str(commit.commit_url)


def _published(repo_id: str, branch: str) -> tuple[ModelInfo | None, bool]:
    """What the repo holds, if it exists, and whether the branch has to be made."""
    api = HfApi()
    try:
        return api.model_info(repo_id, revision=branch), False
    except GatedRepoError:
        raise
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{repo_id}: pushing needs the Hub, and offline mode is on: unset "
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)"
        ) from error
    except RevisionNotFoundError:
        # A new branch starts as a copy of the main one.
        return api.model_info(repo_id), True
    except RepositoryNotFoundError:
        return None, branch != _MAIN


def _files(folder: Path) -> dict[str, Path]:
    """The folder's files by their names in the repo, hidden ones left out."""
    relative = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    return {
        path.as_posix(): folder / path
        for path in relative
        if (folder / path).is_file()
        and path != Path(CARD_NAME)
        and not any(part.startswith(".") for part in path.parts)
    }
