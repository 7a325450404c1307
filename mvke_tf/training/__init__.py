# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, what it measures after each epoch, and what it shows in TensorBoard."""

from mvke_tf.training.loop import Result, follow, new_run, train, train_run

__all__ = ["Result", "follow", "new_run", "train", "train_run"]
