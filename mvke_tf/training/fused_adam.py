# SPDX-License-Identifier: Apache-2.0
"""Adam as one operation per variable, where the backend has it."""

from __future__ import annotations

import keras


class FusedAdam(keras.optimizers.Adam):
    """Adam, and AdamW with `weight_decay`, whose step is one operation per variable under TensorFlow.

    Keras makes some thirty small ones, which at small batches cost a quarter of a training step. The formula is the
    same, and so is the state; under other backends the step is Keras' own.
    """

    @property
    def _is_fused(self) -> bool:
        return keras.backend.backend() == "tensorflow" and not self.amsgrad

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if self._is_fused:
            # The same for all variables: made once in a step.
            dtypes = {variable.dtype for variable in trainable_variables}
            learning_rate = {dtype: self._scalars(learning_rate, dtype) for dtype in sorted(dtypes)}
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _scalars(self, learning_rate, dtype):
        import tensorflow as tf

        step = tf.cast(self.iterations + 1, dtype)
        betas = {name: tf.constant(value, dtype) for name, value in (("beta1", self.beta_1), ("beta2", self.beta_2))}
        powers = {f"{name}_power": tf.pow(beta, step) for name, beta in betas.items()}
        return {"lr": tf.cast(learning_rate, dtype), "epsilon": tf.constant(self.epsilon, dtype), **betas, **powers}

    def update_step(self, gradient, variable, learning_rate):
        if not self._is_fused:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf

        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            grad=tf.cast(tf.convert_to_tensor(gradient), variable.dtype),
            **learning_rate[keras.backend.standardize_dtype(variable.dtype)],
        )

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # What Keras does for one device, where there is nothing to reduce, TensorFlow keeps for ever: the graph of the
        # step, and with it all variables.
        import tensorflow as tf

        return super()._all_reduce_sum_gradients(grads_and_vars) if tf.distribute.has_strategy() else grads_and_vars
