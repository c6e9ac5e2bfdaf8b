"""Where vLLM's plugin looks for the files of a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tacq_vllm.hub.errors import HubError
from tacq_vllm.integrations.vllm import files
from tacq_vllm.integrations.vllm.files import weights_folder

pytestmark = pytest.mark.vllm

Load = Callable[..., None]


@pytest.fixture
def load_with(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Say how vLLM is to load."""

    def use(
        load_format: str, download_dir: str | None = None, revision: str | None = None
    ) -> None:
        config = SimpleNamespace(
            load_config=SimpleNamespace(
                load_format=load_format, download_dir=download_dir
            ),
            model_config=SimpleNamespace(revision=revision),
        )
        monkeypatch.setattr(files, "config_in_the_making", lambda: config)

    return use


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_pickles_are_refused(load_with: Load, tmp_path: Path, load_format: str) -> None:
    load_with(load_format)

    with pytest.raises(
        ValueError, match=f"tacq: --load-format {load_format} reads pic"
    ):
        weights_folder(str(tmp_path), None)


@pytest.mark.parametrize(
    "load_format", ["auto", "safetensors", "dummy", "runai_streamer"]
)
def test_a_folder(load_with: Load, tmp_path: Path, load_format: str) -> None:
    """None where vLLM reads no files of it."""
    load_with(load_format)
    is_read = load_format in ("auto", "safetensors")

    assert weights_folder(str(tmp_path), None) == (tmp_path if is_read else None)


def test_a_repo(
    monkeypatch: pytest.MonkeyPatch, load_with: Load, tmp_path: Path
) -> None:
    asked = []

    def download(*arguments: object) -> Path:
        asked.append(arguments)
        if arguments[0] == "org/gone":
            raise HubError("org/gone: no such repo")
        return tmp_path

    monkeypatch.setattr(files, "checkpoint_folder", download)
    load_with("auto", "/downloads", revision="v2")

    assert weights_folder("org/name", "v1") == tmp_path
    with pytest.raises(ValueError, match="tacq: org/gone: no such repo"):
        weights_folder("org/gone", None)
    assert weights_folder("/no/folder", None) is None
    monkeypatch.setattr(files.envs, "VLLM_USE_MODELSCOPE", True)
    assert weights_folder("org/name", "v1") is None

    note = files._note
    assert asked == [
        ("org/name", "v1", note, "/downloads"),
        # Not every vLLM tells the revision that it is going to load.
        ("org/gone", "v2", note, "/downloads"),
    ]
