# SPDX-License-Identifier: Apache-2.0
"""Makes the profiles of users in bulk: `mvke profile` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mvke_tf.cli import main

if __name__ == "__main__":
    # The former name of an option.
    main(["profile", *(text.replace("--genre_items", "--group_items") for text in sys.argv[1:])])
