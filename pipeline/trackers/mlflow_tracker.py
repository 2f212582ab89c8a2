"""MLflow. Each run is one of theirs, found again by the id that the run's folder keeps; a sweep is the parent of its trials."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlparse

from pipeline.errors import UserError, one_line
from pipeline.trackers.tracker import Started, State, TrackedRun

ARGUMENTS = ("experiment", "tracking_uri", "tags")
EXPERIMENT = "raydml"
CONNECT_TIMEOUT_S = 10.0
BATCH = 100  # MLflow's largest number of parameters in a request
LONGEST = 6000  # of a parameter, characters
PARENT = "mlflow.parentRunId"
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """One run.

    Args:
        storage: Folder or URI of datasets and runs, below which a store of its own is made where nothing else is said.
        experiment: Name of the experiment.
        tracking_uri: Its store: http://..., sqlite:///..., a folder; else $MLFLOW_TRACKING_URI, else STORAGE/mlflow.db.
        tags: Further tags of the run.
    """

    def __init__(
        self,
        storage: str,
        experiment: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _own_store(storage)
        self.tags = {name: str(value) for name, value in (tags or {}).items()}
        self.id = ""
        self._client: Any = None
        self._last: dict[str, int] = {}  # largest step that the store has, by name

    @property
    def client(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            with _its_own_logging():
                self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def check(self, local: bool) -> None:
        """Opens the store, or looks whether its server answers.

        Args:
            local: Whether the run's folder is one of this machine.

        Raises:
            UserError: It cannot be.
        """
        address = urlparse(self.uri)
        if address.scheme in ("http", "https"):
            place = (address.hostname or "", address.port or (443 if address.scheme == "https" else 80))
            try:
                socket.create_connection(place, CONNECT_TIMEOUT_S).close()
            except OSError as error:
                raise UserError(
                    f"tracking: the MLflow server at {self.uri} does not answer ({one_line(error)}): start it, or set "
                    "MLFLOW_TRACKING_URI"
                ) from error
            return
        if address.scheme == "sqlite" and not os.path.exists(address.path.removeprefix("/")):
            return  # made at the start of the run
        try:
            self.client.get_experiment_by_name(self.experiment)
        except Exception as error:  # whatever a store raises
            hint = ""
            if "maintenance mode" in str(error):
                hint = ": this version of MLflow wants MLFLOW_ALLOW_FILE_STORE=true for a folder; or use sqlite:///PATH"
            text = "a folder as its store is refused" if hint else one_line(error)
            raise UserError(f"tracking: MLflow's store {self.uri} cannot be opened ({text}){hint}") from error

    def start(self, run: TrackedRun) -> Started:
        experiment = self._experiment_id()
        if run.id is None:
            group = {"raydml.sweep": run.group} if run.group else {}
            parent = {PARENT: run.parent} if run.parent else {}
            tags = self.tags | group | parent | {"raydml.folder": run.folder}
            self.id = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        else:
            self.id = run.id
            self.client.update_run(self.id, status="RUNNING")
        self._log_config(run.config)
        metrics = self.client.get_run(self.id).data.metrics
        self._last = {name: max(m.step for m in self.client.get_metric_history(self.id, name)) for name in metrics}
        return Started(self.id, self._url(experiment))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {_name(name): value for name, value in values.items() if step > self._last.get(_name(name), -1)}
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in new.items()])
        self._last |= dict.fromkeys(new, step)

    def finish(self, state: State, figures: Mapping[str, float], report: str | None) -> None:
        if report is not None:
            self.client.log_artifact(self.id, report)
        for name, value in figures.items():
            self.client.set_tag(self.id, f"test.{_name(name)}", f"{value:.4f}")
        self.client.set_terminated(self.id, STATUS[state])

    def start_group(self, name: str, folder: str, id: str | None) -> str:
        if id is not None:
            return id
        tags = self.tags | {"raydml.sweep": name, "raydml.folder": folder}
        return str(self.client.create_run(self._experiment_id(), run_name=name, tags=tags).info.run_id)

    def _experiment_id(self) -> str:
        """The experiment's id; it is made where there is none, also by several trials at once."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            with contextlib.suppress(MlflowException):  # another was first
                return str(self.client.create_experiment(self.experiment, artifact_location=self._artifacts()))
            found = self.client.get_experiment_by_name(self.experiment)
        return str(found.experiment_id)

    def _artifacts(self) -> str | None:
        """Where artifacts of a new experiment lie: beside a database, which would put them into the working folder otherwise."""
        address = urlparse(self.uri)
        if address.scheme != "sqlite":
            return None
        database = os.path.abspath(address.path.removeprefix("/"))
        return os.path.join(os.path.dirname(database), "mlflow-artifacts")

    def _log_config(self, config: Mapping[str, Any]) -> None:
        """Parameters, which MLflow never changes: a key that has changed since the first start becomes a tag."""
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(self.id).data.params
        values = {_name(key): str(value)[:LONGEST] for key, value in config.items()}
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for part in _parts(new):
            self.client.log_batch(self.id, params=part)
        changed = [RunTag(f"changed.{key}", v) for key, v in values.items() if key in known and known[key] != v]
        for part in _parts(changed):
            self.client.log_batch(self.id, tags=part)

    def _url(self, experiment: str) -> str:
        if not self.uri.startswith("http"):
            return self.uri
        return f"{self.uri.rstrip('/')}/#/experiments/{experiment}/runs/{self.id}"


def _own_store(storage: str) -> str:
    """The address of a database below a storage folder.

    Raises:
        UserError: The storage is not a folder.
    """
    if "://" in storage:
        raise UserError("tracking: the storage is not a folder, so MLflow needs a server: set MLFLOW_TRACKING_URI")
    return f"sqlite:///{os.path.abspath(storage)}/mlflow.db"


def _name(name: str) -> str:
    """A name that MLflow accepts: "recall_at_1" for "recall@1"."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name.replace("@", "_at_"))


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]


@contextlib.contextmanager
def _its_own_logging() -> Iterator[None]:
    """Hides the lines that a new database makes MLflow print."""
    import logging

    logger = logging.getLogger("mlflow.store.db.utils")
    before, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.level = before
