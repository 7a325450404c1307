# SPDX-License-Identifier: Apache-2.0
"""A server for a SavedModel, in TensorFlow Serving's REST protocol. Needs TensorFlow and the extra `serve`."""

from mvke_tf.serving.rest.app import Application, Limits
from mvke_tf.serving.rest.server import serve

__all__ = ["Application", "Limits", "serve"]
