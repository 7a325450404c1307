# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics of a model per task, kind of user and group; the report of a run and its pictures."""

from mvke_tf.evaluation.calibration import METHODS, calibrate_run, calibration_table
from mvke_tf.evaluation.groups import group_metrics
from mvke_tf.evaluation.multitask import evaluate_multitask_model
from mvke_tf.evaluation.report import Report, evaluate_model, evaluate_run, measure
from mvke_tf.run_folder import results_table

__all__ = [
    "METHODS",
    "Report",
    "calibrate_run",
    "calibration_table",
    "evaluate_model",
    "evaluate_multitask_model",
    "evaluate_run",
    "group_metrics",
    "measure",
    "results_table",
]
