# SPDX-License-Identifier: Apache-2.0
"""What is done to a command and to its files. Each returns in words how it ended, and fails by an assertion."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.chaos.nursery import FULL, READ_ONLY, Ended
from tests.chaos.stages import STAGES, TRAIN, Workshop, differences, outcome

# Loads an export as the server does, and answers the same request each time.
ASK = """
import json

from mvke_tf.errors import MvkeError
from mvke_tf.serving.rest.app import Limits, answer
from mvke_tf.serving.rest.server import load, newest_version

try:
    model = load(newest_version("runs/r/export"), Limits())
except MvkeError as error:
    raise SystemExit(print(f"error: {error}", file=__import__("sys").stderr) or 2)
body = json.dumps(model.example("serving_default")).encode()
print("ANSWER", answer(model, body, Limits()).decode())
"""


def kill(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """Killed before a file operation, some of them while a file is half written."""
    ended = workshop.killed(stage, chance.randrange(workshop.operations[stage]))
    return "killed" if ended.status else "ended before"


def full_disk(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """From some operation on, nothing can be written; then there is space again."""
    return _failing(workshop, stage, chance.randrange(workshop.operations[stage]), FULL)


def read_only(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """Nothing can be written from the start."""
    return _failing(workshop, stage, 0, READ_ONLY)


def _failing(workshop: Workshop, stage: str, operation: int, error: int) -> str:
    folder = workshop.ready(stage)
    ended = workshop.nursery.run(folder, *STAGES[stage].command, fail=(operation, error))
    how = f"error {error} from operation {operation} of {stage} on"
    if ended.status:
        assert_one_line(ended, how)
    workshop.check(stage, folder, how)
    return "an error of one line" if ended.status else "ended well"


def two_writers(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """The same command runs from its start to its end while another one stands still before some operation."""
    folder = workshop.ready(stage)
    operation = chance.randrange(workshop.operations[stage])
    command = STAGES[stage].command
    if stage == "train":
        # One that is to make the run, or one that is to continue it.
        command = chance.choice([command, STAGES[stage].again])
    ended = workshop.nursery.run(folder, *STAGES[stage].command, pause=operation, meanwhile=command)
    how = f"{command} while another stands before operation {operation} of {stage}"
    assert ended.status in (0, 2) and re.search("^MEANWHILE [02]$", ended.output, re.M), (how, ended)
    assert "Traceback" not in ended.errors, (how, ended.errors)
    workshop.check(stage, folder, how)
    return "both went well" if not ended.status and "MEANWHILE 0" in ended.output else "one was refused"


# Commands by what they read, from the folder in which everything has been done.
READERS: dict[str, tuple[str, ...]] = {
    "prepare": STAGES["prepare"].command,
    "train": (*TRAIN, "--run_name", "other", "--epochs", "1"),
    "resume": ("train", "--resume", "runs/r"),
    "profile": ("profile", "runs/r"),
    "serve": ("python", "ask.py"),
}


def read_by(reader: str, folder: Path) -> list[Path]:
    """Files that a command of `READERS` reads."""
    prepared = [path for path in (folder / "data").rglob("*") if path.is_file()]
    run = [folder / "runs" / "r" / name for name in ("config.json", "dataset.json", "encoder.json", "data.json")]
    files = {
        "prepare": prepared,
        "train": prepared,
        "resume": [*run[:1], *run[3:], folder / "runs/r/state.npz"],
        "profile": [*run, folder / "runs/r/best.keras", *prepared],
        "serve": [path for path in (folder / "runs/r/export").rglob("*") if path.is_file()],
    }
    return sorted(files[reader])


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """What a bad disk, a broken transfer or an editor makes of a file."""
    place = chance.randrange(len(content) + 1)
    length = chance.choice((1, 1, 1, 8, 512))
    kind = chance.choice(("flip", "flip", "cut", "zeros", "noise", "longer", "empty"))
    if kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if kind == "zeros":
        return content[:place] + bytes(length) + content[place + length :]
    if kind == "noise":
        return content[:place] + chance.randbytes(length) + content[place + length :]
    if kind == "longer":
        return content + chance.randbytes(length)
    return content[:place] if kind == "cut" else b""


def damage(workshop: Workshop, stage: str, chance: random.Random) -> str:
    """Some bytes of a file that a command reads are others: an error that names it, or the same result."""
    reader = chance.choice(list(READERS))
    folder = Path(shutil.copytree(workshop.finished, workshop.folder / f"damaged-{chance.random()}"))
    (folder / "ask.py").write_text(ASK)
    path = chance.choice(read_by(reader, folder))
    content = path.read_bytes()
    path.write_bytes(damaged_bytes(content, chance))
    if path.read_bytes() == content:
        shutil.rmtree(folder)
        return "the same bytes"
    how = f"{path.relative_to(folder)} damaged, read by {reader}"
    ended = workshop.nursery.run(folder, *READERS[reader])
    if ended.status:
        assert_one_line(ended, how)
        assert re.search(rf"{re.escape(path.name)}|{re.escape(path.parent.name)}", ended.errors), (how, ended.errors)
    else:
        path.write_bytes(content)
        wanted = workshop.result_of(reader)
        found = {**outcome(folder), "answer": _answer(ended)}
        assert not (others := differences(found, wanted)), (how, others)
    shutil.rmtree(folder)
    return f"by {reader}: {'an error' if ended.status else 'the same result'}"


def _answer(ended: Ended) -> list[str]:
    return re.findall("^ANSWER (.*)", ended.output, re.M)


def assert_one_line(ended: Ended, how: object) -> None:
    """A command said in one line what is wrong, and no traceback."""
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.errors, (how, ended.status, ended.errors)


ATTACKS: dict[str, Callable[[Workshop, str, random.Random], str]] = {
    attack.__name__: attack for attack in (kill, full_disk, read_only, two_writers, damage)
}
