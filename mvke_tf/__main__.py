# SPDX-License-Identifier: Apache-2.0
"""`python -m mvke_tf`: the `mvke` command."""

from mvke_tf.cli import main

if __name__ == "__main__":
    main()
