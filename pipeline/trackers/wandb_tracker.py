"""Weights & Biases. Each run is one of theirs, with the id that the run's folder keeps; the trials of a sweep are a group."""

from __future__ import annotations

import netrc
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.errors import UserError
from pipeline.trackers.tracker import Started, State, TrackedRun

ARGUMENTS = ("project", "entity", "group", "job_type", "notes", "tags", "mode")
PROJECT = "raydml"
OFFLINE = ("offline", "dryrun")
INIT_TIMEOUT_S = 60.0


class WandbTracker:
    """One run.

    Args:
        project, entity, group, job_type, notes, tags, mode: As in `wandb.init`; else those of W&B's own environment variables.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = {"project": os.environ.get("WANDB_PROJECT", PROJECT), **arguments}
        self.mode = str(arguments.get("mode") or os.environ.get("WANDB_MODE") or "online")
        self.run: Any = None
        self.earlier: list[Path] = []

    def check(self, local: bool) -> None:
        """Looks for credentials, or for a place of the files, without a connection.

        Args:
            local: Whether the run's folder is one of this machine.

        Raises:
            UserError: There are none.
        """
        if self.mode in ("disabled", "shared"):
            raise UserError(f"tracking: mode {self.mode!r} of wandb keeps nothing of a run: expected online or offline")
        if self.mode in OFFLINE:
            if not local and not os.environ.get("WANDB_DIR"):
                raise UserError(
                    "tracking: wandb is offline and the storage is not a folder: set WANDB_DIR to a folder for its files"
                )
        elif not _has_key():
            raise UserError(
                "tracking: wandb has no API key: run `wandb login`, or set WANDB_API_KEY; without a connection, WANDB_MODE=offline"
            )

    def start(self, run: TrackedRun) -> Started:
        import wandb

        offline = self.mode in OFFLINE
        folder = os.environ.get("WANDB_DIR") or run.local
        identifier = run.id or uuid.uuid4().hex[:8]
        if offline and folder is not None:
            self.earlier = list(Path(folder, "wandb").glob(f"offline-run-*-{identifier}"))
        group = {"group": run.group} if run.group else {}
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, init_timeout=INIT_TIMEOUT_S
        )
        self.run = wandb.init(
            **{**group, **self.arguments, "mode": "offline" if offline else self.mode},
            name=run.name, id=identifier, resume="allow", reinit="create_new", dir=folder, config=dict(run.config),
            allow_val_change=True, settings=settings,
        )  # fmt: skip
        return Started(identifier, self.run.url, keeps=not offline)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self, state: State, figures: Mapping[str, float], report: str | None) -> None:
        import wandb

        self.run.summary["state"] = state  # its summary has the last value of each curve, and so the final figures
        if report is not None:
            artifact = wandb.Artifact(f"report-{self.run.id}", type="report")
            artifact.add_file(report)
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=1 if state == "failed" else 0)
        for folder in self.earlier:  # the new one has everything that these have
            shutil.rmtree(folder)
        self.earlier = []


def _has_key() -> bool:
    """Whether there are credentials where W&B looks for them: the environment, and the file that `wandb login` writes."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    try:
        return any(host == name or "wandb" in name for name in netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError):
        return False
