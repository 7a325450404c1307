# SPDX-License-Identifier: Apache-2.0
"""Event files of TensorBoard, by its own writer: independent of the backend."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

# Of the files of this process.
_NUMBERS = itertools.count()


class EventFolder:
    """Appends to the curves of one folder of TensorBoard.

    A process that is killed leaves what it wrote of an epoch that did not finish; TensorBoard is told to forget it.

    Args:
        folder: The folder.
        step: Everything that is there of this step and later ones no longer counts.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        # Not `EventFileWriter`: its thread would end with a traceback on a full disk, and the training go on.
        folder.mkdir(parents=True, exist_ok=True)
        moment, process = time.time_ns() // 10**9, f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        file = open(folder / f"events.out.tfevents.{moment:010d}.{process}", "wb")  # noqa: SIM115
        self._file = RecordWriter(file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        self._file.write(event.SerializeToString())

    def add(self, summary: Summary, step: int) -> None:
        """Appends any summary, one of TensorFlow's class too."""
        summary = Summary.FromString(summary.SerializeToString())
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Appends a point to each of several curves."""
        self.add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Appends a text."""
        self.add(text_pb(tag, markdown), step)

    def image(self, tag: str, png: bytes, step: int) -> None:
        """Appends a picture."""
        width, height = Image.open(io.BytesIO(png)).size
        picture = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self.add(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)

    def flush(self) -> None:
        """Returns when everything is in the file."""
        self._file.flush()

    def close(self) -> None:
        """Writes what is left; nothing can be appended any more."""
        self._file.close()
