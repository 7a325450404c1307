# SPDX-License-Identifier: Apache-2.0
"""Trains a model, or continues an interrupted training: `mvke train` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
