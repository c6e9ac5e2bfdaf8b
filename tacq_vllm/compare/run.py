"""Quantizes and measures every model of a matrix; what is finished is not repeated."""

import os
import platform
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from tacq_vllm.compare.matrix import Cell
from tacq_vllm.compare.rows import Row, read_row, with_baselines, write_row
from tacq_vllm.config import Recipe
from tacq_vllm.evaluate.backends import Backend, open_runner
from tacq_vllm.evaluate.errors import EvaluateError
from tacq_vllm.evaluate.evaluation import evaluate_model
from tacq_vllm.evaluate.samples import SampleLog
from tacq_vllm.evaluate.tasks import Measure, Protocol
from tacq_vllm.format.inspection import inspect_checkpoint
from tacq_vllm.format.plot import plot_outliers
from tacq_vllm.format.staging import nearest_existing, passing_folder
from tacq_vllm.quantize.calibration import check_sources
from tacq_vllm.quantize.model import BaseModel
from tacq_vllm.quantize.passes import check_linears
from tacq_vllm.quantize.pipeline import quantize_model
from tacq_vllm.quantize.progress import Progress
from tacq_vllm.quantize.workdir import WorkDir, fingerprint
from tacq_vllm.scores import Scores

ROWS_FOLDER = "rows"
WORK_FOLDER = "work"
MAPS_FOLDER = "outliers"
MODELS_FOLDER = "models"


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something other than a comparison, or cannot be one.

    Raises:
        EvaluateError: saying so.
    """
    if folder.exists() and not folder.is_dir():
        raise EvaluateError(f"{folder}: a file; choose another --output")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names and not names & {ROWS_FOLDER, WORK_FOLDER}:
        raise EvaluateError(
            f"{folder}: not empty, and no comparison; choose another --output"
        )
    above = nearest_existing(folder)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise EvaluateError(
            f"{folder}: nothing can be written there; choose another --output"
        )


@dataclass(frozen=True)
class Comparison:
    """Everything that the rows of a comparison share."""

    model: str
    """What the base model is loaded by."""
    base: BaseModel
    recipe: Recipe
    """Of which a cell changes some fields."""
    tasks: Mapping[str, Sequence[Measure]]
    protocol: Protocol
    backend: Backend
    folder: Path
    """Gets the rows and the maps of kept weights."""
    workdir: WorkDir
    """Gets what the models share: gradients, plain passes."""

    @property
    def settings(self) -> dict[str, str]:
        """What all scores depend on."""
        sampled = self.recipe.calibration
        return {
            **self.backend.settings,
            **self.protocol.settings,
            "limit": str(self.protocol.limit or "all"),
            "calibration": f"{sampled.num_samples} x {sampled.seq_len}",
            "recipe": fingerprint(self.recipe.model_dump(mode="json"))[:8],
        }

    def run(self, cells: Sequence[Cell], progress: Progress) -> list[Row]:
        """Measure the 16-bit model, then every cell.

        Returns:
            All rows in the folder that can be compared with these, earlier ones too.

        Raises:
            QuantizeError: a cell cannot be quantized.
            EvaluateError: a task does not fit the model.
        """
        self._check(cells)
        base = self._row(None, progress)
        for cell in cells:
            self._row(cell, progress)
        rows = list(self._rows().values())
        like = [row for row in rows if self._is_like(row)]
        others = len(rows) - len(like)
        if others:
            progress.note(
                f"{self.folder / ROWS_FOLDER}: {others} rows of another model, or "
                "measured in another way, are not in this table"
            )
        return with_baselines(like, base)

    def _rows(self) -> dict[Path, Row]:
        """All rows that are in the folder."""
        files = sorted((self.folder / ROWS_FOLDER).glob("*.json"))
        return {file: row for file in files if (row := read_row(file)) is not None}

    def _is_like(self, row: Row) -> bool:
        """Whether a row can stand beside those of this comparison."""
        return (row.model, row.settings) == (self.base.name, self.settings)

    def _check(self, cells: Sequence[Cell]) -> None:
        """Refuse, before the first hour of work, what would fail after it."""
        earlier = {
            row.cell: path for path, row in self._rows().items() if self._is_like(row)
        }
        for cell in cells:
            check_linears(self.base, cell.group_size)
            path = earlier.get(_shown(cell))
            if path is not None and path.stem != self._name(cell):
                raise EvaluateError(
                    f"{cell.calibration}: {path} is of another source of that name: "
                    "give the same path as then, rename the source, or choose another "
                    "--output"
                )
        recipes = [cell.recipe(self.recipe) for cell in cells]
        readers = [recipe for recipe in recipes if recipe.reads_calibration]
        by_sources = {recipe.calibration.sources: recipe for recipe in readers}
        for recipe in by_sources.values():
            check_sources(self.base, recipe.calibration, self.protocol.data_root)

    def _row(self, cell: Cell | None, progress: Progress) -> Row:
        """A row with all tasks, of which earlier runs may have measured some."""
        path = self.folder / ROWS_FOLDER / f"{self._name(cell)}.json"
        row = read_row(path)
        missing = [name for name in self.tasks if row is None or name not in row.tasks]
        if row is not None and not missing:
            progress.note(f"{path.stem}: measured before")
            return row
        tasks = {name: self.tasks[name] for name in missing}
        if cell is None:
            new = self._row_of(self._score(self.model, tasks, progress), tasks)
        else:
            new = self._measure(cell, tasks, path.stem, progress)
        if row is not None:
            new = row.extended(new)
        write_row(path, new)
        return new

    def _measure(
        self,
        cell: Cell,
        tasks: Mapping[str, Sequence[Measure]],
        name: str,
        progress: Progress,
    ) -> Row:
        """Make a cell's checkpoint, look at it, and let it go."""
        own = Progress(progress.listener)
        output = self.workdir.folder / MODELS_FOLDER / name
        with passing_folder(output):
            quantize_model(
                self.base,
                cell.recipe(self.recipe),
                output,
                self.workdir,
                own,
                lambda staged, schema: None,
                self.protocol.data_root,
            )
            figures = inspect_checkpoint(output)
            is_packed = figures.simulated is None
            if is_packed and figures.outliers and find_spec("matplotlib"):
                maps = self.folder / MAPS_FOLDER
                maps.mkdir(parents=True, exist_ok=True)
                plot_outliers(output, figures, maps / f"{name}.png")
            scores = self._score(str(output), tasks, progress)
        return self._row_of(scores, tasks).model_copy(
            update={
                "cell": _shown(cell),
                "effective_bits": figures.effective_bits,
                "seconds": own.seconds,
            }
        )

    def _score(
        self, model: str, tasks: Mapping[str, Sequence[Measure]], progress: Progress
    ) -> Scores:
        with open_runner(model, self.backend) as runner:
            return evaluate_model(
                runner, tasks, self.settings, SampleLog(None), progress
            )

    def _row_of(self, scores: Scores, tasks: Iterable[str]) -> Row:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Row(
            model=self.base.name,
            scores=scores.scores,
            tasks=tuple(tasks),
            settings=self.settings,
            versions=scores.versions,
            machine={
                "device": self.backend.device.type,
                "threads": str(torch.get_num_threads()),
                "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%d"),
            },
            peak_bytes=peak,
        )

    def _name(self, cell: Cell | None) -> str:
        """A row's name: readable, and of its own for all that it depends on."""
        recipe = None
        words = "16-bit"
        if cell is not None:
            recipe = cell.recipe(self.recipe).model_dump(mode="json")
            size = "row" if cell.group_size == -1 else f"g{cell.group_size}"
            source = Path(cell.calibration).name
            words = f"{cell.method}-w{cell.bits}-{size}-{source}-s{cell.seed}"
        depends = {
            "model": self.base.name,
            "settings": self.settings,
            "recipe": recipe,
        }
        return f"{words}-{fingerprint(depends)[:8]}"


def _shown(cell: Cell) -> Cell:
    """Without the folders of this machine."""
    return cell.model_copy(update={"calibration": Path(cell.calibration).name})
