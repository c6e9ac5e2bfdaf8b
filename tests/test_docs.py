"""What the README and the recipes' page say can be done."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tacq_vllm.cli import app
from tacq_vllm.config import load_recipe, recipe_folder

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"(torchrun .* --no-python )?tacq ")
README = (ROOT / "README.md").read_text()
TRANSFORMERS = (ROOT / "docs" / "transformers.md").read_text()
PAGES = {
    path: path.read_text()
    for folder in ("", "docs", "quant_config", "tacq_vllm/format")
    for path in (ROOT / folder).glob("*.md")
}


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def headings(page: str) -> set[str]:
    """What a link to a part of a page may name."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in words} | set(
        re.findall(r'<a id="([^"]+)">', page)
    )


def tacq_commands() -> list[str]:
    blocks = (block for page in PAGES.values() for block in code_blocks("", page))
    joined = (block.replace("\\\n", " ") for block in blocks)
    lines = (line.split("#")[0] for block in joined for line in block.splitlines())
    # Brackets say what may be left out; other programs start some of them.
    plain = (re.sub(r"[\[\]]|\.\.\.", "", line) for line in lines)
    return [line[line.index("tacq ") :] for line in plain if COMMAND.match(line)]


@pytest.mark.parametrize("line", tacq_commands())
def test_commands_and_options_exist(line):
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]
    options = {option for p in command.params for option in p.opts}
    used = {argument.split("=")[0] for argument in arguments if argument[:2] == "--"}
    assert used <= options
    for before, argument in itertools.pairwise(arguments):
        if before == "--recipe" and argument.islower():
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


def test_the_page_on_fineq_runs():
    names: dict[str, Any] = {}
    for block in code_blocks("python", (ROOT / "docs" / "fineq.md").read_text()):
        exec(block, names)

    assert names["words"].shape == (64, 42)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            assert heading in headings(path.read_text()), target


def test_every_recipe_is_in_the_table():
    table = (recipe_folder() / "README.md").read_text()
    for path in recipe_folder().rglob("*.yaml"):
        name = path.relative_to(recipe_folder()).with_suffix("").as_posix()
        assert f"`{name}`" in table, name
