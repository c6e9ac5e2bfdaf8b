"""What the README and the recipes' page say can be done."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from tacq_vllm.cli import app
from tacq_vllm.config import load_recipe, recipe_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRANSFORMERS = (ROOT / "docs" / "transformers.md").read_text()
EVALUATE = (ROOT / "docs" / "evaluate.md").read_text()
RECOVER = (ROOT / "docs" / "recover.md").read_text()


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def tacq_commands() -> list[str]:
    pages = (README, TRANSFORMERS, EVALUATE, RECOVER)
    blocks = itertools.chain.from_iterable(code_blocks("", page) for page in pages)
    joined = (block.replace("\\\n", " ") for block in blocks)
    lines = (line for block in joined for line in block.splitlines())
    return [line.split("#")[0] for line in lines if line.startswith("tacq ")]


@pytest.mark.parametrize("line", tacq_commands())
def test_commands_and_options_exist(line):
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]
    options = {option for p in command.params for option in p.opts}
    used = {argument for argument in arguments if argument.startswith("--")}
    assert used <= options
    for before, argument in itertools.pairwise(arguments):
        if before == "--recipe":
            load_recipe(argument)


def test_python_runs(tiny_checkpoint):
    blocks = code_blocks("python")
    assert blocks
    for block in blocks:
        code = block.replace('"model-TaCQ-w3"', repr(str(tiny_checkpoint)))
        names: dict[str, object] = {}
        exec(code, names)
        assert names["model"].is_quantized


def test_the_page_on_transformers_runs(tiny_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "model-TaCQ-w3").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)

    names: dict[str, object] = {}
    for block in code_blocks("python", TRANSFORMERS):
        exec(block, names)

    assert names["model"].get_base_model().is_quantized
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_recipe_is_in_the_table():
    table = (recipe_folder() / "README.md").read_text()
    for path in recipe_folder().rglob("*.yaml"):
        name = path.relative_to(recipe_folder()).with_suffix("").as_posix()
        assert f"`{name}`" in table, name
