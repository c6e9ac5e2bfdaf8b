"""Where a training stands: what is kept on disk, so that a killed run goes on."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from tacq_vllm.quantize.workdir import PhaseFolder

_STATE = "state"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Record:
    """One step, in means over its scored tokens; step 0 is the checkpoint as it was."""

    step: int
    seconds: float
    """Since the run began, the 16-bit model's pass included."""
    tokens: int = 0
    """Seen so far."""
    loss: float = math.nan
    """What is trained on."""
    text_loss: float = math.nan
    """Cross-entropy of the text alone."""
    held_out: float = math.nan
    """Cross-entropy of the held-out samples; not a number where it was not measured."""


RECORD_FIELDS = [field.name for field in fields(Record)]
"""Part of the training's fingerprint: a state stored with other fields is not read."""


@dataclass(frozen=True)
class History:
    """All steps so far."""

    records: tuple[Record, ...] = ()
    finished: bool = False

    @property
    def last(self) -> Record:
        """The step that was made last."""
        return self.records[-1]

    @property
    def looks(self) -> list[Record]:
        """The steps with a held-out loss."""
        return [record for record in self.records if not math.isnan(record.held_out)]

    @property
    def best(self) -> Record:
        """The first step with the least held-out loss."""
        return min(self.looks, key=lambda record: record.held_out)

    @property
    def looks_since_best(self) -> int:
        """Looks at the held-out loss that found it no better."""
        return len(self.looks) - 1 - self.looks.index(self.best)

    def add(self, record: Record) -> "History":
        """The history with one step more."""
        return replace(self, records=(*self.records, record))

    def lines(self) -> Iterable[str]:
        """A line of JSON for each step."""
        for record in self.records:
            fields = asdict(record).items()
            content = {k: v for k, v in fields if not math.isnan(v)}
            yield json.dumps(content) + "\n"


class StateFolder:
    """Trained values, the optimizer's moments and the history of a run."""

    def __init__(self, folder: PhaseFolder) -> None:
        self._folder = folder

    def save(
        self,
        trained: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        history: History,
    ) -> None:
        """Store where training stands; its best values too, if these are they.

        Those that were the best before go when the stored history does not need them.
        """
        if history.best == history.last:
            self._folder.save(_best(history.last), trained)
        tensors = dict(trained)
        for name, parameter in trained.items():
            for moment in _MOMENTS:
                if moment in optimizer.state[parameter]:
                    stored = optimizer.state[parameter][moment]
                    tensors[f"{name}/{moment}"] = stored
        notes = {
            "records": json.dumps([asdict(record) for record in history.records]),
            "finished": json.dumps(history.finished),
        }
        self._folder.save(_STATE, tensors, notes)
        for record in history.looks:
            if record != history.best:
                self._folder.remove(_best(record))

    def load(
        self, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> History:
        """Restore values and moments in place; gives the history, at first empty."""
        if _STATE not in self._folder:
            return History()
        tensors = self._folder.load(_STATE)
        notes = self._folder.notes(_STATE)
        records = tuple(Record(**fields) for fields in json.loads(notes["records"]))
        history = History(records, json.loads(notes["finished"]))
        for name, parameter in trained.items():
            parameter.data.copy_(tensors[name])
            moments = {
                moment: tensors[f"{name}/{moment}"].to(parameter.device, copy=True)
                for moment in _MOMENTS
                if f"{name}/{moment}" in tensors
            }
            if moments:
                step = torch.tensor(float(history.last.step))
                optimizer.state[parameter] = {"step": step, **moments}
        return history

    def best(self, history: History) -> dict[str, Tensor]:
        """The trained values with the least held-out loss, mapped from their file."""
        return self._folder.load(_best(history.best))


def _best(record: Record) -> str:
    return f"best-{record.step:06d}"
