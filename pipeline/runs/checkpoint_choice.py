"""Which checkpoint of a run is meant: the best, the last, or that of a step."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.runs.checkpoint import Checkpoints
from pipeline.runs.run_folder import read_config, read_values
from pipeline.storage import Folder


def choose_checkpoint(run: Folder, name: str | None = None) -> tuple[str, int]:
    """Kind ("checkpoints" or "best") and step of a checkpoint.

    Args:
        run: The run's folder.
        name: "best", "last", or a step; None: the run's `evaluation.checkpoint`.

    Raises:
        UserError: There is no such checkpoint.
    """
    name = name or _configured(run)
    checkpoints = Checkpoints(run)
    steps, best = checkpoints.steps(), checkpoints.steps("best")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{run} has no checkpoint yet")
    if name == "best":
        if latest.best_step not in best:
            raise UserError(
                f"{run} has no best checkpoint: nothing was validated yet (--checkpoint last takes the newest one)"
            )
        return "best", latest.best_step
    if name == "last":
        return "checkpoints", steps[-1]
    if not name.isdigit() or int(name) not in {*steps, *best}:
        raise UserError(f"--checkpoint {name}: expected best, last or one of the steps {sorted({*steps, *best})}")
    return ("checkpoints" if int(name) in steps else "best"), int(name)


def checkpoint_title(kind: str, step: int) -> str:
    """A checkpoint in words."""
    return f"{'best checkpoint' if kind == 'best' else 'checkpoint'} of step {step:,}"


def _configured(run: Folder) -> str:
    """The run's `evaluation.checkpoint`, read without the rest of the configuration, which imports what only trains."""
    name = read_values(run)["evaluation"].get("checkpoint")
    return str(name or read_config(run).evaluation.checkpoint)
