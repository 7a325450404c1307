# SPDX-License-Identifier: Apache-2.0
"""What a training shows in TensorBoard, and what it warns of, while it runs and when it is done.

    tensorboard/
        train/         losses; below training/ the learning rate, examples per second, log-variances and weights of
                       the losses
        validation/    losses and metrics; of each gate mean weights, use of the experts, entropy, heat maps; warnings
        best/          hyperparameters with the metrics of the best epoch; item vectors for the Embedding Projector

A step is the number of an epoch, from 0, as in `keras.callbacks.TensorBoard`, whose names the curves of losses and
metrics have: `epoch_<name>`. TensorBoard sorts by name, so that they come first.
"""

from mvke_tf.training.monitoring.callback import Monitor
from mvke_tf.training.monitoring.tracking import MlflowLogger

__all__ = ["MlflowLogger", "Monitor"]
