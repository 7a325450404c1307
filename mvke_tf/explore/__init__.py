# SPDX-License-Identifier: Apache-2.0
"""A local page on a run: users as they are and as they might be, items, and what the experts have to do with it."""
