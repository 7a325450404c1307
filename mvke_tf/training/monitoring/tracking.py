# SPDX-License-Identifier: Apache-2.0
"""Settings and numbers of a training in MLflow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from mvke_tf.errors import TrainingError, require_extra
from mvke_tf.io import read_json, write_json
from mvke_tf.run import Run
from mvke_tf.run_folder import History, resume_command


class MlflowLogger(keras.callbacks.Callback):
    """Logs a training to the server or folder of `MLFLOW_TRACKING_URI`, in an experiment with the name of the dataset.

    The file mlflow.json of the run says which MLflow run is its own, so that a resumed training goes on in it; epochs
    that MLflow does not know yet are sent then. Every epoch is sent when it is on the disk.

    Args:
        run: The run.

    Raises:
        MissingExtraError: If MLflow is not installed.
        TrainingError: If MLflow cannot be reached.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        require_extra("mlflow", "mlflow")
        from mlflow.tracking import MlflowClient

        self.run = run
        with self._explained():
            if run.mlflow_file.is_file():
                found = read_json(run.mlflow_file)
                self._client, self._id = MlflowClient(found["tracking_uri"]), found["run_id"]
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._client = MlflowClient()
                self._id = self._create()
                write_json(run.mlflow_file, {"tracking_uri": self._client.tracking_uri, "run_id": self._id})

    def _create(self) -> str:
        from mlflow.entities import Param

        name = self.run.data["name"]
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        created = self._client.create_run(number, run_name=self.run.folder.resolve().name).info.run_id
        settings = {
            f"{section}.{name}": value
            for section, values in self.run.config.to_dict().items()
            if isinstance(values, dict)
            for name, value in values.items()
        }
        settings |= {"data.name": name, "data.digest": self.run.data["digest"]}
        self._client.log_batch(created, params=[Param(key, str(value)) for key, value in settings.items()])
        return created

    def catch_up(self, history: History) -> None:
        """Sends the epochs that MLflow does not know."""
        with self._explained():
            known = {point.step for point in self._client.get_metric_history(self._id, "val_score")}
        for epoch in history:
            if int(epoch["epoch"]) not in known:
                self._send(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._send({**logs, "epoch": epoch + 1})

    def _send(self, epoch: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), int(epoch["epoch"])
        metrics = [Metric(name, float(value), now, step) for name, value in epoch.items() if name != "epoch"]
        with self._explained():
            self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        """Ends the MLflow run.

        Args:
            status: `"FINISHED"`, `"KILLED"` (a resumed training goes on) or `"FAILED"`.
        """
        with self._explained():
            self._client.set_terminated(self._id, status)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError, KeyError, TypeError) as error:
            reason: Any = " ".join(str(error).split())
            raise TrainingError(
                f"MLflow cannot log {self.run.folder}: {reason} What has finished is kept. Set MLFLOW_TRACKING_URI to "
                f"a server that answers, or delete {self.run.mlflow_file} to log no more, and continue: "
                f"{resume_command(self.run)}"
            ) from error
