"""A declared dataset: its tables, histories and parts, its encoding, the prepared dataset, and batches of it."""
