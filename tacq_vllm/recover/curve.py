"""How a training went: a line of JSON per step, and a picture."""

from pathlib import Path

from tacq_vllm.recover.state import History

LOSSES_NAME = "loss.jsonl"
PICTURE_NAME = "loss.png"


def write_losses(history: History, folder: Path) -> None:
    """Write what every step was, as `Record` describes it."""
    (folder / LOSSES_NAME).write_text("".join(history.lines()))


def draw_losses(history: History, folder: Path) -> None:
    """Draw the losses over the steps.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plots`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [record for record in history.records if record.step > 0]
    numbers = [record.step for record in steps]
    axes.plot(numbers, [r.loss for r in steps], color="tab:gray", lw=0.8, label="loss")
    axes.plot(
        numbers,
        [record.text_loss for record in steps],
        color="tab:blue",
        lw=0.8,
        label="cross-entropy of the text",
    )
    axes.plot(
        [record.step for record in history.looks],
        [record.held_out for record in history.looks],
        color="tab:red",
        marker="o",
        label="held out",
    )
    best = history.best
    axes.axvline(best.step, color="tab:red", ls=":", label=f"taken: step {best.step}")
    axes.set(xlabel="step", ylabel="loss per token")
    axes.legend(fontsize="small")
    figure.savefig(folder / PICTURE_NAME, dpi=120)
