# SPDX-License-Identifier: Apache-2.0
"""A declared dataset: its tables, histories and parts, its encoding, the prepared dataset, and batches of it."""
