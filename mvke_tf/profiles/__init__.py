"""Profiles of users in bulk: the items or genres that each is most likely to click or to convert on."""

from mvke_tf.data.entities import Catalogue, Users
from mvke_tf.profiles.files import profile_run
from mvke_tf.profiles.profiler import Profiler

__all__ = ["Catalogue", "Profiler", "Users", "profile_run"]
