# SPDX-License-Identifier: Apache-2.0
"""Models on data outside training: vectors, predictions, gates, exact top-k, vector index."""
