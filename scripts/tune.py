# SPDX-License-Identifier: Apache-2.0
"""Searches good settings of a model: `mvke tune` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
