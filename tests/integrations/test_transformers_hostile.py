"""Each kind of broken checkpoint in Transformers: `tacq verify`'s reason."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tacq_vllm.integrations.transformers  # noqa: F401
from tacq_vllm.format.schema import FormatError
from tacq_vllm.format.validation import find_faults
from tests.hostile.good import CLUSTERED, GOOD
from tests.hostile.kind import HOSTS_OWN, Kind, own_words
from tests.hostile.kinds import KINDS


def load(folder: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("folder", [GOOD, CLUSTERED], ids=["planes", "clusters"])
def test_the_good_checkpoint_is_loaded(folder: Path) -> None:
    load(folder)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_reason_is_that_of_verify(kind: Kind, tmp_path: Path) -> None:
    folder = kind.make(tmp_path / "broken")

    if "transformers" in kind.host_first:
        with pytest.raises(HOSTS_OWN):
            load(folder)
        return
    with pytest.raises(FormatError) as caught:
        load(folder)
    assert own_words(str(caught.value)) == own_words(find_faults(folder)[0])
