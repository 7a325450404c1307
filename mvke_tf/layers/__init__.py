# SPDX-License-Identifier: Apache-2.0
"""Keras layers of the multi-task models, in `keras.ops` only."""

from mvke_tf.layers.calibration import CalibratedLogit, LogitMap
from mvke_tf.layers.counterfactual import CounterfactualRisk
from mvke_tf.layers.embedding import FieldEmbedding, ReplaceByUnknown, SliceFields, StackFields
from mvke_tf.layers.experts import ConvolutionalExpert, Experts, SelectExperts
from mvke_tf.layers.gates import (
    AttentionGate,
    ExpertGate,
    GatedTag,
    GateSoftmax,
    MixExperts,
    TransferAttention,
    VirtualKernelGate,
)
from mvke_tf.layers.heads import ClassHead, CountHead, GatherRows, JointLogit, RegressionHead, RowDot
from mvke_tf.layers.in_batch import InBatchSoftmax
from mvke_tf.layers.task_balance import TaskBalance
from mvke_tf.layers.task_uncertainty import TaskUncertainty
from mvke_tf.layers.virtual_kernels import VirtualKernelAttention, VirtualKernels

__all__ = [
    "AttentionGate",
    "CalibratedLogit",
    "ClassHead",
    "ConvolutionalExpert",
    "CountHead",
    "CounterfactualRisk",
    "ExpertGate",
    "Experts",
    "FieldEmbedding",
    "GateSoftmax",
    "GatedTag",
    "GatherRows",
    "InBatchSoftmax",
    "JointLogit",
    "LogitMap",
    "MixExperts",
    "RegressionHead",
    "ReplaceByUnknown",
    "RowDot",
    "SelectExperts",
    "SliceFields",
    "StackFields",
    "TaskBalance",
    "TaskUncertainty",
    "TransferAttention",
    "VirtualKernelAttention",
    "VirtualKernelGate",
    "VirtualKernels",
]
