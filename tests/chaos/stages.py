# SPDX-License-Identifier: Apache-2.0
"""The commands that are broken off, each in a folder that is ready for it, and what makes two outcomes the same."""

from __future__ import annotations

import csv
import functools
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from tests.chaos.nursery import Ended, Nursery

TRAIN = (
    *("train", "--data", "shop/small.toml", "--run_name", "r", "--epochs", "2", "--batch_size", "64", "--seed", "1"),
    *("--embedding_dim", "4", "--hidden_dims", "4", "--num_virtual_kernels", "2", "--monitor_images_epochs", "0"),
)
# Fewer features than `tests/small.py` has: what is built in less time can be broken off more often.
MAKE = """
from pathlib import Path

import polars as pl

from tests.small import SMALL, small_log, small_toml

kept = ("user", "age", "clicks", "recent_items", "item", "tags")
SMALL["features"] = {name: SMALL["features"][name] for name in kept}
SMALL["groups"] = {"tags": SMALL["groups"]["tags"]}
small_toml(Path("shop"))
# A log that takes more than a MiB allows.
small_toml(Path("many"))
log = small_log()[0]
pl.concat([log, log.with_columns(pl.col("user") + 100)]).write_parquet("many/log.parquet")
"""
# Measured, so different each time.
_SPEED = "examples_per_second"


class Stage(NamedTuple):
    """A command, and the one that is to be run after it was broken off."""

    command: tuple[str, ...]
    again: tuple[str, ...] = ()

    def next(self, folder: Path) -> tuple[str, ...]:
        """What a user runs after the command was broken off in this folder."""
        return self.again if self.again and (folder / self.again[-1]).exists() else self.command


STAGES = {
    "prepare": Stage(("prepare", "--data", "shop/small.toml")),
    "prepare in buckets": Stage(("prepare", "--data", "many/small.toml", "--memory_mb", "1")),
    "train": Stage(TRAIN, ("train", "--resume", "runs/r")),
    "export": Stage(("export", "runs/r")),
    "profile": Stage(("profile", "runs/r")),
}


class Workshop:
    """Folders in which each command has all that it needs, and what an unbroken one leaves."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery, self.folder = nursery, folder
        self.operations: dict[str, int] = {}
        self._wanted: dict[str, dict[str, Any]] = {}
        self._number = 0
        first = folder / "prepare"
        first.mkdir()
        (folder / "make.py").write_text(MAKE)
        assert nursery.run(first, "python", str(folder / "make.py")).status == 0
        shutil.copytree(first, folder / "prepare in buckets")
        for name, stage in STAGES.items():
            done = shutil.copytree(folder / name, folder / f"{name}-done")
            ended = nursery.run(done, *stage.command)
            assert ended.status == 0, ended.errors
            self.operations[name] = len(ended.operations)
            self._wanted[name] = outcome(done)
            for following in {"prepare": ("train",), "train": ("export", "profile")}.get(name, ()):
                shutil.copytree(done, folder / following)

    @functools.cached_property
    def finished(self) -> Path:
        """A folder in which every command has been run."""
        folder = Path(shutil.copytree(self.folder / "export-done", self.folder / "finished"))
        assert self.nursery.run(folder, *STAGES["profile"].command).status == 0
        return folder

    @functools.cache  # noqa: B019
    def result_of(self, reader: str) -> dict[str, Any]:
        """What a command of `attacks.READERS` leaves and answers where everything has been done before."""
        from tests.chaos.attacks import ASK, READERS, _answer

        folder = Path(shutil.copytree(self.finished, self.folder / f"finished-{reader}"))
        (folder / "ask.py").write_text(ASK)
        ended = self.nursery.run(folder, *READERS[reader])
        assert ended.status == 0, ended
        return {**outcome(folder), "answer": _answer(ended)}

    def ready(self, name: str) -> Path:
        """A new folder in which a command can begin."""
        self._number += 1
        return Path(shutil.copytree(self.folder / name, self.folder / f"{name}-{self._number}"))

    def check(self, name: str, folder: Path, *how: object) -> None:
        """Runs the command again where it was broken off: it must end as an unbroken one does. Deletes the folder."""
        ended = self.nursery.run(folder, *STAGES[name].next(folder))
        assert ended.status == 0, (how, ended)
        difference = differences(outcome(folder), self._wanted[name])
        assert not difference, (how, difference)
        left = [str(path.relative_to(folder)) for path in folder.rglob(".writing-*")]
        assert not left, (how, left)
        shutil.rmtree(folder)

    def killed(self, name: str, operation: int) -> Ended:
        """Kills a command before an operation and checks what the next one makes of it."""
        folder = self.ready(name)
        ended = self.nursery.run(folder, *STAGES[name].command, kill=operation)
        # Fewer operations than in the first run are possible where threads decide when a buffer is full.
        assert ended.status in (-9, 0), ended
        self.check(name, folder, f"killed before operation {operation} of {name}")
        return ended


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of files that differ."""
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if name not in found or name not in wanted or not _same(found[name], wanted[name])]


def _same(one: Any, other: Any) -> bool:
    try:
        np.testing.assert_equal(one, other)
    except AssertionError:
        return False
    return True


def outcome(folder: Path) -> dict[str, Any]:
    """Contents by file, without times, speeds and the numbers that Keras gives to layers."""
    contents: dict[str, Any] = {}
    events: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == ".lock":
            continue
        if "tfevents" in path.name:
            events.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path)
        elif path.name == "digests.json":
            contents[name] = sorted(entry[-1] for entry in json.loads(path.read_text()).values())
        elif path.name == "log.csv":
            rows = csv.DictReader(io.StringIO(path.read_text()))
            contents[name] = [{key: value for key, value in row.items() if key != _SPEED} for row in rows]
        elif path.name == "state.npz":
            contents[name] = _state(path)
        elif path.suffix == ".keras":
            with zipfile.ZipFile(path) as file:
                contents[name] = _datasets(file.read("model.weights.h5"))
        elif "/export/" in name:
            # A command that was killed at its very end has made the version: the next one makes another.
            inside = name.partition("/export/")[2].partition("/")[2]
            if inside != "fingerprint.pb":
                contents.setdefault(f"export/{inside}", set()).add(path.read_bytes())
        else:
            contents[name] = path.read_bytes()
    for name, paths in events.items():
        contents[f"{name}/events"] = _curves(sorted(paths, key=lambda path: path.stat().st_mtime_ns))
    return contents


def _state(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        arrays = dict(file)
    history = [
        {key: value for key, value in epoch.items() if key != _SPEED} for epoch in json.loads(str(arrays["history"]))
    ]
    return {**arrays, "history": history}


def _datasets(content: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    with h5py.File(io.BytesIO(content)) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def _curves(paths: list[Path]) -> dict[tuple[str, int], Any]:
    """What TensorBoard shows: points by curve and step, those that were told to be forgotten left out."""
    points: dict[tuple[str, int], Any] = {}
    for path in paths:
        data = path.read_bytes()
        # A killed process leaves half a record, which TensorBoard does not show.
        while len(data) >= 12 and len(data) >= (size := struct.unpack("<Q", data[:8])[0]) + 16:
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                points = {key: value for key, value in points.items() if key[1] < event.step}
            for value in event.summary.value:
                if _SPEED not in value.tag and not value.tag.startswith("_hparams_"):
                    points[value.tag, event.step] = (value.simple_value, value.image.encoded_image_string)
    return points
