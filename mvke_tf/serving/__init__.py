# SPDX-License-Identifier: Apache-2.0
"""What a trained model becomes: a SavedModel, ONNX files, profiles of users in bulk, a REST server.

    <path>/<version>/
        saved_model.pb, variables/   for `tf.saved_model.load` and TensorFlow Serving
        signatures.json              tasks, catalogue, and what each signature takes and gives, in words
        client.py                    calls the model with inputs that it has checked by name (optional)

Encoder and catalogue are inside, so that a client sends strings, numbers and ids, and needs TensorFlow alone.

The names below are imported when they are first used: the server needs nothing of Keras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvke_tf.serving.catalogue import Catalogue
    from mvke_tf.serving.export import export_run, export_saved_model
    from mvke_tf.serving.saved_model import ServingModule
    from mvke_tf.serving.signatures import Signature, TensorField

_HOME = {
    "Catalogue": "catalogue",
    "ServingModule": "saved_model",
    "Signature": "signatures",
    "TensorField": "signatures",
    "export_run": "export",
    "export_saved_model": "export",
}

__all__ = ["Catalogue", "ServingModule", "Signature", "TensorField", "export_run", "export_saved_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
