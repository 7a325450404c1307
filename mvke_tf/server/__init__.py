"""A small local server for a SavedModel, in TensorFlow Serving's REST protocol. Needs the extra `serve`."""
