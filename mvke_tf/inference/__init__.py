"""Models on data outside training: vectors, predictions, gates, exact top-k, vector index."""
