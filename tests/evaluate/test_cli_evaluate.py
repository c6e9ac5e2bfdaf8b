"""`tacq evaluate`, on the tiny model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner, Result

from tacq_vllm.cli import app
from tacq_vllm.cli_evaluate import print_scores
from tacq_vllm.evaluate.tasks import figures
from tacq_vllm.format.checkpoint import WEIGHTS_NAME
from tacq_vllm.scores import SCORES_NAME, Score, Scores, read_scores
from tests.builders import replace, rewrite_tensors, truncate
from tests.test_cli import assert_one_line

TASKS = ("wikitext2", "c4", "mmlu", "gsm8k", "spider")


def evaluate(model: Path, tasks: str, root: Path | None, *options: object) -> Result:
    data = [] if root is None else ["--data-root", root]
    arguments = ["evaluate", model, "--tasks", tasks, *data, *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def scored(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "scored"))


def test_every_task_beside_the_16_bit_model(
    tiny_model: Path, scored: Path, root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the harness needs the extra `eval`")
    log = tmp_path / "log.jsonl"
    options = ["--window", 64, "--limit", 3, "--device", "cpu", "--dequantize"]
    options += ["--samples", log, "--baseline", tiny_model]
    options += ["--json", scored / SCORES_NAME]

    result = evaluate(scored, ",".join(TASKS), root, *options)

    assert result.exit_code == 0, result.output
    written = read_scores(scored)
    assert written is not None
    found = {(score.task, score.metric): score for score in written.scores}
    assert list(found) == [
        ("wikitext2", "perplexity"),
        ("c4", "perplexity"),
        ("mmlu", "accuracy"),
        ("mmlu", "loss"),
        ("gsm8k", "loss"),
        ("gsm8k", "exact_match"),
        ("spider", "loss"),
        ("spider", "execution_accuracy"),
    ]
    assert set(figures(TASKS)) == found.keys()
    assert all(score.limit == 3 for score in written.scores)
    assert all(score.baseline is not None for score in written.scores)
    assert found["mmlu", "accuracy"].chance == 0.25
    assert found["gsm8k", "exact_match"].chance is None
    assert found["gsm8k", "loss"].stderr is not None
    assert written.settings == {
        "model": "scored",
        "backend": "hf",
        "dtype": "float32",
        "max_length": "4096",
        "data": "folder",
        "window": "64",
        "dequantize": "yes",
    }
    assert {"lm-eval", "tacq-vllm", "torch"} <= written.versions.keys()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["model"] for line in lines} == {"scored", "tiny-llama"}
    judged = [line for line in lines if line.get("metric") == "execution_accuracy"]
    assert len(judged) == 4
    assert all(line["detail"].startswith("fails: ") for line in judged)
    assert "| wikitext2, limit 3 | perplexity |" in result.stdout
    assert "| 0.25 |" in result.stdout

    again = evaluate(scored, ",".join(TASKS), root, *options)

    assert again.stdout == result.stdout
    assert len(log.read_text().splitlines()) == len(lines)
    assert "scored spider: taken from the sample log" in again.stderr


def test_a_file_of_scores_is_a_baseline(
    tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "base.json"
    first = evaluate(tiny_model, "wikitext2", root, "--window", 64, "--json", file)
    assert first.exit_code == 0, first.output

    second = evaluate(tiny_model, "wikitext2", root, "--window", 64, "--baseline", file)

    assert second.exit_code == 0, second.output
    assert "| 100.0 % |" in second.stdout
    assert_one_line(
        evaluate(tiny_model, "wikitext2", root, "--window", 32, "--baseline", file),
        "the baseline was measured with window 64, this model is to be with 32",
    )
    assert_one_line(
        evaluate(
            *(tiny_model, "wikitext2,spider-loss", root),
            *("--window", 64, "--baseline", file),
        ),
        "the baseline has no loss of spider",
    )


def test_every_figure_has_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = Score(
        task="mmlu",
        metric="exact_match",
        value=0.3,
        stderr=0.0125,
        baseline=0.4,
        chance=0.25,
        limit=8,
    )
    perplexity = Score(task="c4", metric="perplexity", value=12.34567)

    print_scores(Scores(scores=(accuracy, perplexity), versions={}))

    assert capsys.readouterr().out.splitlines() == [
        "| task | metric | value | ± | 16-bit | recovery | by chance |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| mmlu, limit 8 | exact match | 0.3 | 0.0125 | 0.4 | 75.0 % | 0.25 |",
        "| c4 | perplexity | 12.35 |  |  |  |  |",
    ]


def test_a_model_that_is_unpacked_first_is_asked_anew(
    tiny_checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    options = ["--window", 64, "--limit", 1, "--device", "cpu", "--samples", log]

    packed = evaluate(tiny_checkpoint, "wikitext2", root, *options)
    unpacked = evaluate(tiny_checkpoint, "wikitext2", root, *options, "--dequantize")

    assert (packed.exit_code, unpacked.exit_code) == (0, 0), unpacked.output
    assert "taken from the sample log" not in unpacked.stderr
    answers = [line for line in log.read_text().splitlines() if '"total"' in line]
    assert len(answers) == 2


def test_the_loss_alone_needs_no_harness_and_no_database(
    tiny_model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    monkeypatch.delitem(sys.modules, "tacq_vllm.evaluate.harness.tasks", raising=False)
    shutil.copytree(root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/spider/database")

    result = evaluate(
        tiny_model, "gsm8k-loss,spider-loss", tmp_path / "data", "--limit", 2
    )

    assert result.exit_code == 0, result.output
    assert_one_line(
        evaluate(tiny_model, "gsm8k", root),
        "pip install 'tacq-vllm[eval]', or take the tasks mmlu-loss and gsm8k-loss",
    )
    assert_one_line(
        evaluate(tiny_model, "spider", tmp_path / "data"),
        "dogs.sqlite: no such file",
    )


@pytest.mark.parametrize(
    ("tasks", "options", "reason"),
    [
        ("sudoku", [], "sudoku: no such task; there are wikitext2, c4, mmlu"),
        (",", [], "no task is given"),
        ("wikitext2", ["--window", 4096], "more than the 128 that there is room for"),
        ("wikitext2", ["--window", 90, "--max-length", 80], "more than the 80"),
        ("wikitext2", ["--data-root", "nowhere"], "nowhere/wikitext2/test.txt: no"),
        ("wikitext2", ["--json", "nowhere/x.json"], "there is no such folder"),
        ("wikitext2", ["--json", "."], "--json .: a folder; give a file in it"),
        ("wikitext2", ["--json", "/dev/null"], "--json /dev/null: no plain file"),
        ("wikitext2", ["--samples", "nowhere/x.jsonl"], "there is no such folder"),
        ("wikitext2", ["--samples", "."], "--samples .: a folder; give a file in it"),
        (
            "wikitext2",
            ["--backend", "vllm", "--dequantize"],
            "each is for --backend hf",
        ),
        (
            "wikitext2",
            ["--backend", "vllm", "--device", "cpu"],
            "each is for --backend hf",
        ),
        ("wikitext2", ["--baseline", "nowhere.json"], "tacq: nowhere.json: No such"),
        (
            "wikitext2",
            ["--baseline", "nowhere/x"],
            "nowhere/x: no such folder here, and",
        ),
    ],
)
def test_bad_options(
    tiny_model: Path, root: Path, tasks: str, options: list[object], reason: str
) -> None:
    result = evaluate(tiny_model, tasks, root, *options)

    assert_one_line(result, reason)


@pytest.mark.parametrize(
    ("option", "content"), [("--json", "of an earlier run"), ("--samples", "")]
)
def test_files_stay_where_the_disk_is_full(
    tiny_model: Path, root: Path, mount: Callable[..., Path], option: str, content: str
) -> None:
    file = mount("size=8k") / "file"
    file.write_text(content)
    filling = file.with_name("filling")
    with pytest.raises(OSError, match="No space left"):
        filling.write_bytes(b"x" * 10_000)

    result = evaluate(
        tiny_model, "wikitext2", root, "--window", 64, "--limit", 1, option, file
    )

    assert result.exit_code == 2
    failure = result.stderr.splitlines()[-1]
    assert failure == f"tacq: {file}: No space left on device"
    assert file.read_text() == content
    assert sorted(file.parent.iterdir()) == [file, filling]


@pytest.mark.parametrize("option", ["--json", "--samples"])
def test_a_folder_that_is_read_only_is_told_before_measuring(
    tiny_model: Path, root: Path, mount: Callable[..., Path], option: str
) -> None:
    file = mount("ro") / "file"

    result = evaluate(tiny_model, "wikitext2", root, option, file)

    assert_one_line(result, f"{option} {file}: nothing can be written there")


def test_a_model_that_is_none(root: Path, tmp_path: Path) -> None:
    assert_one_line(evaluate(tmp_path, "wikitext2", root), "has no config.json")
    assert_one_line(
        evaluate(tmp_path / "no.gguf", "wikitext2", root), "no.gguf: no such file"
    )


@pytest.mark.parametrize(
    ("module", "reason"),
    [(None, "import of vllm halted"), (ModuleType("vllm"), "cannot import name 'LLM'")],
)
def test_a_vllm_that_cannot_be_imported(
    tiny_model: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType | None,
    reason: str,
) -> None:
    """It is not there, or does not go with another package."""
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delitem(sys.modules, "tacq_vllm.evaluate.vllm_runner", raising=False)

    result = evaluate(tiny_model, "wikitext2", root, "--backend", "vllm")

    assert_one_line(result, f"--backend vllm: {reason}")
    assert "pip install 'tacq-vllm[cuda]'" in result.stderr


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": "64"}, "'hidden_size' expected int"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"vocab_size": -1}, "RuntimeError: "),
    ],
)
def test_a_model_whose_configuration_is_malformed(
    model_copy: Path, root: Path, fields: dict[str, object], reason: str
) -> None:
    config = model_copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))

    result = evaluate(model_copy, "wikitext2", root)

    assert_one_line(result, f"{model_copy}: cannot be loaded: ")
    assert reason in result.stderr


def test_a_model_whose_weights_are_not_whole_is_named(
    model_copy: Path, root: Path
) -> None:
    truncate(model_copy / WEIGHTS_NAME)

    assert_one_line(
        evaluate(model_copy, "wikitext2", root), f"{model_copy}: cannot be loaded: "
    )


def test_a_model_of_a_kind_that_nobody_knows(model_copy: Path, root: Path) -> None:
    (model_copy / "config.json").write_text('{"model_type": "nonsense"}')

    assert_one_line(
        evaluate(model_copy, "wikitext2", root), f"{model_copy}: cannot be loaded: "
    )


def test_a_checkpoint_that_is_damaged(checkpoint_copy: Path, root: Path) -> None:
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    assert_one_line(evaluate(checkpoint_copy, "wikitext2", root), "model.safetensors")


def test_a_loss_that_overflows(model_copy: Path, root: Path, tmp_path: Path) -> None:
    rewrite_tensors(model_copy, replace("model.norm.weight", lambda w: 1e6 * w))
    log = tmp_path / "log.jsonl"

    result = evaluate(
        *(model_copy, "wikitext2", root, "--window", 64, "--limit", 2),
        *("--samples", log, "--dtype", "float16", "--device", "cpu"),
    )

    reason = "model wikitext2, item 0: its loss is not finite in float16: use --dtype"
    assert result.exit_code == 2
    assert reason in result.stderr.splitlines()[-1]
    assert not log.exists()


def test_spider_from_the_hub_has_no_databases(
    tiny_model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tacq_vllm.data.sets import load_named_set

    monkeypatch.setattr(
        "tacq_vllm.evaluate.tasks.load_named_set",
        lambda name, split, data_root: load_named_set(name, split, root),
    )

    assert_one_line(
        evaluate(tiny_model, "spider", None), "the Hub has no databases to run queries"
    )


def test_evaluating_needs_no_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import tacq_vllm.evaluate.backends, tacq_vllm.evaluate.evaluation\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_vllm_that_is_not_installed(
    tiny_model: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "tacq_vllm.evaluate.vllm_runner", raising=False)

    assert_one_line(
        evaluate(tiny_model, "wikitext2", root, "--backend", "vllm"),
        "pip install 'tacq-vllm[cuda]'",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tiny_model: Path, root: Path) -> None:
    assert_one_line(
        evaluate(tiny_model, "wikitext2", root, "--device", "cuda"), "no CUDA device"
    )
