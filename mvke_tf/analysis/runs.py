"""The analysis of a finished run: tables, pictures, verdict and one page, written whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvke_tf.analysis.chapters import Subject, chapters_of
from mvke_tf.analysis.frames import MAPS
from mvke_tf.analysis.page import page
from mvke_tf.analysis.study import Study
from mvke_tf.analysis.verdict import Thresholds, Verdict
from mvke_tf.data.groups import movielens_groups
from mvke_tf.data.movielens import DataError
from mvke_tf.data.prepared import Prepared
from mvke_tf.files import write_json, written_whole
from mvke_tf.models.two_tower import task_names
from mvke_tf.run import Run

PAGE = "analysis.html"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What `analyze_run` found, and where it is.

    Args:
        folder: Holds `analysis.html`, `verdict.json`, `tables/*.csv` and `figures/*.png`.
        verdicts: One per task with a gate; none for a model without gates.
        summary: The verdict in words.
    """

    folder: Path
    verdicts: tuple[Verdict, ...]
    summary: str

    @property
    def page(self) -> Path:
        """The self-contained page."""
        return self.folder / PAGE


def analyze_run(
    run: Run,
    out: Path | None = None,
    part: str = "test",
    user: str | None = None,
    map_method: str = "pca",
    top: int = 10,
    thresholds: Thresholds | None = None,
    report: Callable[[str], object] = print,
) -> Analysis:
    """Analyses the best checkpoint of a run and writes tables, pictures, verdict and page.

    Args:
        run: The run.
        out: Where to; `analysis` in the run directory by default. An earlier analysis there is replaced.
        part: `"train"`, `"validation"` or `"test"`.
        user: Id of the user to explain; by default the one with the most impressions in the part.
        map_method: See `item_map`.
        top: Items of the explained user, per task.
        thresholds: Where one word of the verdict ends and the next begins.
        report: Receives a line of progress.

    Raises:
        RunError: If the run has no checkpoint.
        DataError: If the part has no rows.
        ValueError: If there is no such part, user or map, or `out` holds something else.
    """
    out = run.folder / "analysis" if out is None else Path(out)
    _check_target(out)
    if map_method not in MAPS:
        raise ValueError(f"`map_method` must be one of {MAPS}. Received: {map_method!r}")
    prepared, model = run.prepared, run.load_model()
    rows = prepared.part_rows(part)
    if not len(rows):
        raise DataError(f"The {part} part of the prepared data has no rows. Choose another part or another split.")
    user, user_row, known = user_state(prepared, part, user)
    report(f"Analysing {run.checkpoint} on {len(rows):,} impressions of the {part} part ...")
    tasks = task_names(model)
    # Without a click task, a conversion learned on clicks is a probability given the click.
    clicked = run.config.model.conversion == "clicked" and "ctr" not in tasks
    study = Study(model, prepared.part(part, tasks, clicked=clicked))
    subject = Subject(
        study,
        movielens_groups(prepared),
        prepared.titles.tolist(),
        thresholds or Thresholds(),
        map_method,
        user,
        user_row,
        known,
        top,
        f"Model {run.config.model.name}, tasks {', '.join(tasks)}, {len(rows):,} impressions of the {part} "
        f"part ({run.config.data.protocol}, {run.config.data.split} split).",
    )
    chapters = [chapter(subject) for chapter in tqdm(chapters_of(model), desc="analysis", unit="chapter")]
    with written_whole(out) as temporary:
        for name in ("tables", "figures"):
            (temporary / name).mkdir(parents=True)
        for chapter in chapters:
            for name, frame in chapter.frames.items():
                frame.to_csv(temporary / "tables" / f"{name}.csv", index=False)
            for picture in chapter.section.pictures:
                (temporary / "figures" / f"{picture.name}.png").write_bytes(picture.content)
        write_json(temporary / "verdict.json", [dataclasses.asdict(verdict) for verdict in subject.verdicts])
        title = f"What the experts of {run.folder.resolve().name} learned"
        (temporary / PAGE).write_text(page(title, [chapter.section for chapter in chapters]), encoding="utf-8")
        if out.exists():
            # No folder can be renamed onto one with files: the earlier analysis leaves with the temporary folder.
            out.rename(temporary.with_name("earlier"))
    return Analysis(out, subject.verdicts, "\n".join(subject.summary))


def user_state(prepared: Prepared, part: str, user: str | None = None) -> tuple[str, int, list[int]]:
    """The last state of a user in one part of the data, and what was rated before.

    Args:
        prepared: The data.
        part: `"train"`, `"validation"` or `"test"`.
        user: Id of the user; by default the one with the most impressions in the part, of several the lowest.

    Returns:
        Id, row of the state, and rows of the items rated before it.

    Raises:
        ValueError: If the user has no impression in the part.
    """
    pairs = prepared.pairs.assign(user=prepared.raw["user"]["user_id"][prepared.pairs["user_row"]].astype(str))
    inside = pairs.iloc[prepared.part_rows(part)]
    impressions = inside["user"].value_counts(sort=False)
    if user is None:
        most = impressions[impressions == impressions.max()].index
        user = min(most, key=lambda name: (len(name), name))
    if user not in impressions.index:
        some = sorted(impressions.index, key=lambda name: (len(name), name))[:5]
        raise ValueError(f"Expected a user with an impression in the {part} part, such as {some}. Received: {user!r}")
    last = inside[inside["user"] == user].sort_values("timestamp", kind="stable").iloc[-1]
    before = (pairs["user"] == user) & (pairs["rating"] > 0) & (pairs["timestamp"] < last["timestamp"])
    return user, int(last["user_row"]), np.unique(pairs.loc[before, "item_row"]).tolist()


def _check_target(out: Path) -> None:
    ours = out.is_dir() and ((out / PAGE).is_file() or not any(out.iterdir()))
    if out.exists() and not ours:
        raise ValueError(
            f"Expected a folder for the analysis that is new, empty, or holds an earlier one. Received: {out}"
        )
