# SPDX-License-Identifier: Apache-2.0
"""Kills commands or their workers at random moments (`kill -9`) and compares the end with that of an unbroken one.

A preparation in buckets by two workers, and a training on its data, which keeps a state every few batches, are killed
and begun again until they end; a worker of a preparation, or of a training of two processes, on this machine or of Ray,
is killed while its command goes on by itself. What they leave must have the same bits, but for measured times. Prints
the seed and, for each of these, a JSON line: the kills, the ends that were the same, and the epoch and batch, or the
step of the preparation, that the kills met. Status 1 if an end was another one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from mvke_tf.cli import positive_int, run_main
from tests.chaos.stages import MAKE, differences, outcome

DATA = ("--data", "many/small.toml")
PREPARE = ("prepare", *DATA, "--memory_mb", "1")
TRAIN = (
    *("train", *DATA, "--run_name", "r", "--epochs", "4", "--batch_size", "16", "--checkpoint_steps", "3"),
    *("--embedding_dim", "4", "--hidden_dims", "4", "--num_virtual_kernels", "2", "--embedding_optimizer", "lazy_adam"),
    *("--monitor_images_epochs", "0", "--patience", "0"),
)
RESUME = ("train", "--resume", "runs/r")
RAY = ("--engine", "ray", "--workers", "2")
# Ray begins a training again so many times.
MOST_KILLS = 3


@dataclasses.dataclass(frozen=True)
class Victim:
    """What is killed.

    Args:
        command: The command.
        again: The command that goes on, where the command itself is killed.
        process: How the command line of the process begins or contains; None for the command itself.
        kills: How often one command loses a process, at most.
    """

    command: tuple[str, ...]
    again: tuple[str, ...] = ()
    process: bytes | None = None
    kills: int = 1

    @property
    def prepares(self) -> bool:
        return self.command[0] == "prepare"


VICTIMS = {
    "prepare": Victim((*PREPARE, "--workers", "2"), (*PREPARE, "--workers", "2")),
    "train": Victim(TRAIN, RESUME),
    "worker of prepare": Victim((*PREPARE, "--workers", "2"), process=b"spawn_main"),
    "Ray worker of prepare": Victim((*PREPARE, *RAY), process=b"ray::_work", kills=MOST_KILLS),
    "Ray worker of train": Victim((*TRAIN, *RAY), process=b"ray::RayTrainWorker", kills=MOST_KILLS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=positive_int, default=20, help="of each (default: 20)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    chance, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.victims:
            result = campaign(Path(folder), VICTIMS[name], args.kills, chance)
            wrong += result["ends"] - result["same"]
            print(json.dumps({"victim": name, **result}), flush=True)
    if wrong:
        sys.exit(1)


def campaign(folder: Path, victim: Victim, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kills until so many kills have met their victim."""
    ready = folder / ("log" if victim.prepares else "data")
    if not ready.is_dir():
        ready.mkdir()
        (folder / "make.py").write_text(MAKE)
        makes = [[sys.executable, folder / "make.py"], *([] if victim.prepares else [line(PREPARE)])]
        for make in makes:
            subprocess.run(make, cwd=ready, env=environment(victim), check=True, capture_output=True)
    wanted_in = Path(shutil.copytree(ready, folder / "unbroken"))
    seconds = Broken(victim, wanted_in).run(chance, 0.0, 0)
    wanted, met, ends, same = outcome(wanted_in), list[str](), 0, 0
    while len(met) < kills:
        broken = Broken(victim, Path(shutil.copytree(ready, folder / "broken")))
        broken.run(chance, seconds, min(victim.kills, kills - len(met)))
        others = differences(outcome(broken.folder), wanted)
        if others:
            print(f"DIFFERENT after {broken.met}: {others}", flush=True)
        ends, same = ends + bool(broken.met), same + bool(broken.met and not others)
        met += broken.met
        shutil.rmtree(broken.folder)
    shutil.rmtree(wanted_in)
    moments = dict(sorted(collections.Counter(met).items()))
    return {"kills": len(met), "ends": ends, "same": same, "seconds_of_work": round(seconds, 1), "moments": moments}


class Broken:
    """A command in a folder of its own, which may be killed."""

    def __init__(self, victim: Victim, folder: Path) -> None:
        self.victim, self.folder = victim, folder
        # What was under way at each kill.
        self.met: list[str] = []

    def run(self, chance: random.Random, seconds: float, kills: int) -> float:
        """Runs the command, kills it or its processes so often within so many seconds of work, and lets it end.

        Returns:
            The seconds from the beginning of the work to the end of the last command.
        """
        command = self.victim.command
        while True:
            process = subprocess.Popen(
                line(command),
                cwd=self.folder,
                env=environment(self.victim),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            begun = self._until(process, lambda: self._moment() != "start")
            while len(self.met) < kills and process.poll() is None:
                before = self._moment()
                until = time.monotonic() + chance.uniform(0.0, seconds / (kills if self.victim.process else 1))
                self._until(process, lambda until=until: time.monotonic() >= until)
                killed = self._kill(process)
                if killed and self.victim.process:
                    # The next one is for the process that follows, when it has come further.
                    self._until(process, lambda before=before: self._moment() not in (before, self.met[-1]))
                if not killed:
                    break
            errors = process.communicate()[1].decode()
            if process.returncode == -signal.SIGKILL and self.victim.again:
                command = self.victim.again if self.victim.prepares or (self.folder / "runs/r").exists() else command
                continue
            if process.returncode:
                raise RuntimeError(f"{command} ended with {process.returncode} after {self.met}: {errors}")
            return time.monotonic() - begun

    def _until(self, process: subprocess.Popen[bytes], is_true: Callable[[], bool]) -> float:
        """Waits; returns when."""
        while process.poll() is None and not is_true():
            time.sleep(0.02)
        return time.monotonic()

    def _kill(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether there was something to kill."""
        while process.poll() is None:
            wanted = self.victim.process
            found = [process.pid] if wanted is None else [n for n in descendants(process.pid) if wanted in named(n)]
            if found:
                moment = self._moment()
                try:
                    os.kill(max(found), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.met.append(moment)
                return True
            time.sleep(0.02)
        return False

    def _moment(self) -> str:
        """How far the command has come, by its files."""
        if self.victim.prepares:
            unfinished = [path for path in (self.folder / "data/prepared").glob("*.unfinished") if path.is_dir()]
            written = [path for folder in unfinished for path in folder.iterdir()]
            try:
                return max(written, key=lambda path: path.stat().st_mtime_ns).name if written else "start"
            except FileNotFoundError:
                return "a step ends"
        try:
            with np.load(self.folder / "runs/r/state.npz") as file:
                epochs = len(json.loads(str(file["history"])))
                step = json.loads(str(file["progress"]))[0] if "progress" in file else 0
        except (OSError, zipfile.BadZipFile):
            return "start"
        return f"epoch {epochs + 1} after batch {step}"


def line(command: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "mvke_tf", *command]


def environment(victim: Victim) -> dict[str, str]:
    own = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    # What XLA compiles quickly is as good here.
    ray = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, **own, **(ray if "ray" in victim.command else {})}


def named(process: int) -> bytes:
    """Its command line; empty if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(process: int) -> list[int]:
    """The processes that a process has started, directly or not."""
    children = collections.defaultdict[int, list[int]](list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
        except OSError:
            continue
    found, left = list[int](), [process]
    while left:
        left += (own := children[left.pop()])
        found += own
    return found


if __name__ == "__main__":
    run_main(main)
