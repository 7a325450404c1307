"""Keras layers of the multi-task models, in `keras.ops` only."""

from mvke_tf.layers.embedding import FieldEmbedding, ReplaceByUnknown
from mvke_tf.layers.exchangeable import AttentionGate, ConvolutionalExpert
from mvke_tf.layers.experts import Experts, SelectExperts
from mvke_tf.layers.gates import ExpertGate, GateSoftmax, MixExperts, VirtualKernelGate
from mvke_tf.layers.rows import GatherRows, JointLogit, RegressionHead, RowDot
from mvke_tf.layers.virtual_kernels import VirtualKernelAttention, VirtualKernels

__all__ = [
    "AttentionGate",
    "ConvolutionalExpert",
    "ExpertGate",
    "Experts",
    "FieldEmbedding",
    "GateSoftmax",
    "GatherRows",
    "JointLogit",
    "MixExperts",
    "RegressionHead",
    "ReplaceByUnknown",
    "RowDot",
    "SelectExperts",
    "VirtualKernelAttention",
    "VirtualKernelGate",
    "VirtualKernels",
]
