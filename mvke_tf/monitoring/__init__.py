"""What a training shows in TensorBoard, and what it warns of, while it runs and when it is done.

    tensorboard/
        train/         losses and metrics, learning rate, rows per second, log-variances and weights of the tasks
        validation/    losses and metrics; of each gate mean weights, use of the experts, entropy, heat maps; warnings
        best/          hyperparameters with the metrics of the best epoch; item vectors for the Embedding Projector

A step is the number of an epoch, from 0, as in `keras.callbacks.TensorBoard`, whose names the curves of losses and
metrics have.
"""

from mvke_tf.monitoring.best import item_columns, write_best
from mvke_tf.monitoring.callback import Monitor
from mvke_tf.monitoring.events import EventFolder
from mvke_tf.monitoring.gates import GateUse, GateView, gate_events

__all__ = ["EventFolder", "GateUse", "GateView", "Monitor", "gate_events", "item_columns", "write_best"]
