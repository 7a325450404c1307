"""A trained model as a TensorFlow SavedModel: raw features in; probabilities, vectors and recommendations out.

Encoder and catalogue are inside, so that a client sends strings, numbers and ids, and needs TensorFlow alone.

    <path>/<version>/
        saved_model.pb, variables/   for `tf.saved_model.load` and TensorFlow Serving
        signatures.json              tasks, catalogue, and what each signature takes and gives, in words
        client.py                    calls the model with inputs that it has checked by name (optional)
"""

from mvke_tf.serving.catalogue import Catalogue
from mvke_tf.serving.export import SIGNATURES_FILE, export_run, export_saved_model
from mvke_tf.serving.model import Serving
from mvke_tf.serving.ports import Port, Signature

__all__ = ["SIGNATURES_FILE", "Catalogue", "Port", "Serving", "Signature", "export_run", "export_saved_model"]
