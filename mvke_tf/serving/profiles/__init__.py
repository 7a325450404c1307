# SPDX-License-Identifier: Apache-2.0
"""Profiles of users in bulk: the items, or the groups of items, that each task rates highest for each."""

from mvke_tf.errors import require_extra

require_extra("profile", "pandas")

# ruff: noqa: E402
from mvke_tf.serving.profiles.entities import Candidates, Users
from mvke_tf.serving.profiles.files import profile_run
from mvke_tf.serving.profiles.profiler import Profiler

__all__ = ["Candidates", "Profiler", "Users", "profile_run"]
