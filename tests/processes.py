# SPDX-License-Identifier: Apache-2.0
"""What tests of commands with several processes share."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any


def end_command(command: Sequence[Any], has_begun: Callable[[], Any], sent: signal.Signals, code: int) -> None:
    """Starts a command, sends it a signal as soon as it has begun, and checks that it and its workers end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 300
    while not has_begun():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # A terminal sends Ctrl-C to all processes, and workers leave it to the first.
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    # Workers have the same stdout: it ends with the last of them.
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and b"Traceback" not in errors
