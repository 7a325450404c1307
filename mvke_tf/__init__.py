# SPDX-License-Identifier: Apache-2.0
"""Multi-task models of users in Keras 3: MVKE and what it is compared with, from a declared dataset to a served model.

The names below are imported when they are first used, so that `import mvke_tf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from mvke_tf.analysis import analyze_run
    from mvke_tf.config import ModelConfig, RunConfig, TrainingConfig
    from mvke_tf.data.batches import Batches, Interactions
    from mvke_tf.data.declaration import Dataset
    from mvke_tf.data.encoder import Encoder
    from mvke_tf.data.preparation import prepare, prepared_dataset
    from mvke_tf.data.store import PreparedDataset
    from mvke_tf.errors import MvkeError
    from mvke_tf.evaluation import evaluate_model, evaluate_multitask_model, evaluate_run
    from mvke_tf.models import TwoTowerModel, build_model, load_model
    from mvke_tf.models.dense_mmoe import build_mmoe
    from mvke_tf.models.mvke import build_mvke
    from mvke_tf.run import Run
    from mvke_tf.schema import Feature, Schema, Task
    from mvke_tf.serving import export_run, export_saved_model
    from mvke_tf.serving.profiles import profile_run
    from mvke_tf.training import train, train_run

_HOME = {
    "mvke_tf.analysis": ("analyze_run",),
    "mvke_tf.config": ("ModelConfig", "RunConfig", "TrainingConfig"),
    "mvke_tf.data.batches": ("Batches", "Interactions"),
    "mvke_tf.data.declaration": ("Dataset",),
    "mvke_tf.data.encoder": ("Encoder",),
    "mvke_tf.data.preparation": ("prepare", "prepared_dataset"),
    "mvke_tf.data.store": ("PreparedDataset",),
    "mvke_tf.errors": ("MvkeError",),
    "mvke_tf.evaluation": ("evaluate_model", "evaluate_multitask_model", "evaluate_run"),
    "mvke_tf.models": ("TwoTowerModel", "build_model", "load_model"),
    "mvke_tf.models.dense_mmoe": ("build_mmoe",),
    "mvke_tf.models.mvke": ("build_mvke",),
    "mvke_tf.run": ("Run",),
    "mvke_tf.schema": ("Feature", "Schema", "Task"),
    "mvke_tf.serving": ("export_run", "export_saved_model"),
    "mvke_tf.serving.profiles": ("profile_run",),
    "mvke_tf.training": ("train", "train_run"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  (in the order in which they are used)
    "Dataset",
    "prepare",
    "prepared_dataset",
    "PreparedDataset",
    "Encoder",
    "Interactions",
    "Batches",
    "Feature",
    "Schema",
    "Task",
    "ModelConfig",
    "TrainingConfig",
    "RunConfig",
    "build_model",
    "build_mvke",
    "build_mmoe",
    "load_model",
    "TwoTowerModel",
    "train",
    "train_run",
    "Run",
    "evaluate_model",
    "evaluate_multitask_model",
    "evaluate_run",
    "analyze_run",
    "export_run",
    "export_saved_model",
    "profile_run",
    "MvkeError",
    "__version__",
]


if not TYPE_CHECKING:
    # Type checkers know the names above, and would take every other one for Any.
    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(__all__)}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
