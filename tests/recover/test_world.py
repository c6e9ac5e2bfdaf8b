"""Training in several processes, on this machine's loopback."""

from pathlib import Path

import pytest

from tacq_vllm.format.validation import find_faults
from tacq_vllm.quantize.errors import QuantizeError
from tacq_vllm.quantize.world import World
from tacq_vllm.recover.config import RecoverConfig
from tests.builders import stored_weights
from tests.quantize.test_world import RECORDED_RUN, torchrun
from tests.recover.conftest import train
from tests.recover.test_pipeline import held_out


def test_two_processes_train_as_one(
    tiny_checkpoint: Path,
    tiny_model: Path,
    tiny_training: RecoverConfig,
    text_file: Path,
    tmp_path: Path,
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_training.model_dump_json())  # JSON is YAML
    arguments = ["recover", tiny_checkpoint, "--output", tmp_path / "two"]
    arguments += ["--base", tiny_model, "--recipe", recipe, "--device", "cpu"]

    result = torchrun(2, RECORDED_RUN, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    alone = train(
        tiny_checkpoint, tiny_model, tiny_training, tmp_path / "one", tmp_path / "work"
    )

    leader, follower = (
        (tmp_path / f"renamed-{rank}.txt").read_text().split() for rank in (0, 1)
    )
    # Each has made files of its own; what they found together is the leader's to write.
    assert not set(leader) & set(follower)
    kinds = {Path(path).name.split("-")[0] for path in follower}
    assert kinds == {"hidden", "states"}
    # One process tells what both do.
    assert result.stderr.count("training 6/6") == 1
    assert find_faults(tmp_path / "two") == []
    assert held_out(tmp_path / "two") == pytest.approx(held_out(alone), rel=1e-3)
    found, expected, start = map(
        stored_weights, (tmp_path / "two", alone, tiny_checkpoint)
    )
    for name, weight in expected.items():
        # A code that is at the edge may fall to either side.
        noise = float((found[name] - weight).norm())
        assert noise < 0.1 * float((weight - start[name]).norm()), name


def test_a_step_without_a_sample_for_each_process_is_refused(
    tiny_checkpoint: Path,
    tiny_model: Path,
    tiny_training: RecoverConfig,
    tmp_path: Path,
    monkeypatch,
):
    from tacq_vllm.recover import trainer

    class Alone(trainer.Trainer):
        """As if there were another process, for which it does not wait."""

        def _step(self, *arguments: object):
            self._world = World(0, 2)
            return super()._step(*arguments)

    monkeypatch.setattr("tacq_vllm.recover.pipeline.Trainer", Alone)

    with pytest.raises(QuantizeError, match="2 processes share a step of 1 samples"):
        train(
            tiny_checkpoint,
            tiny_model,
            tiny_training,
            tmp_path / "out",
            tmp_path / "work",
            batch_tokens=32,
        )
