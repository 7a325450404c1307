# SPDX-License-Identifier: Apache-2.0
"""Adam as one operation per variable, where the backend has it."""

from __future__ import annotations

import keras


class FusedAdam(keras.optimizers.Adam):
    """Adam, and AdamW with `weight_decay`, whose step is one operation per variable under TensorFlow.

    Keras makes some thirty small ones, which at small batches cost a quarter of a training step. The formula is the
    same, and so is the state; under other backends the step is Keras' own.
    """

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf

        index, step = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2 = (tf.constant(beta, variable.dtype) for beta in (self.beta_1, self.beta_2))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, variable.dtype),
            grad=tf.cast(tf.convert_to_tensor(gradient), variable.dtype),
        )

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # What Keras does for one device, where there is nothing to reduce, TensorFlow keeps for ever: the graph of the
        # step, and with it all variables.
        import tensorflow as tf

        return super()._all_reduce_sum_gradients(grads_and_vars) if tf.distribute.has_strategy() else grads_and_vars
