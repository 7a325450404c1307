# SPDX-License-Identifier: Apache-2.0
"""The analysis of a finished run: its chapters, as tables, pictures, verdict and one page."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from mvke_tf.analysis import figures, tables
from mvke_tf.analysis.explanation import UserState, explain_user, user_state
from mvke_tf.analysis.page import Card, Picture, Section, page
from mvke_tf.analysis.study import Study, has_kernels
from mvke_tf.analysis.verdict import Verdict, attention_note, judge
from mvke_tf.data.batches import Interactions
from mvke_tf.data.encoder import known_values
from mvke_tf.data.groups import Grouping, groups
from mvke_tf.data.store import PreparedDataset
from mvke_tf.errors import ConfigError
from mvke_tf.inference.gates import Thresholds
from mvke_tf.io import atomic_write, csv_safe, write_json
from mvke_tf.models import TwoTowerModel
from mvke_tf.run import Run

logger = logging.getLogger(__name__)

PAGE = "analysis.html"
# Rows of the log that are looked at, drawn at random where a part has more: nothing here needs more.
MOST_ROWS = 100_000
NO_GATES = "This model has no gates: there is nothing to say about experts."


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
    user: str | int | None = None,
    map_method: str = "pca",
    top: int = 10,
    thresholds: Thresholds | None = None,
    most_rows: int = MOST_ROWS,
) -> Analysis:
    """Analyses the best checkpoint of a run and writes tables, pictures, verdict and page.

    Args:
        run: The run.
        out: Where to; `analysis` in the run directory by default. An earlier analysis there is replaced.
        part: `"train"`, `"validation"` or `"test"`.
        user: Id of the user to explain; by default the one with the most rows in the part. Where users have no ids, the
            number of a user state.
        map_method: See `item_map`.
        top: Items of the explained user, per task.
        thresholds: Where one word of the verdict ends and the next begins.
        most_rows: Rows of the part that are looked at, drawn at random where it has more.

    Raises:
        ConfigError: If there is no such part or map, or `out` holds something else.
        DataError: If the part has no rows, or none of that user.
        MissingExtraError: If the map needs an extra that is not installed.
        RunError: If the run has no checkpoint or no data.
    """
    out = run.analysis if out is None else Path(out)
    _check_target(out)
    if map_method not in tables.MAPS:
        raise ConfigError(f"The map of the items must be one of {', '.join(tables.MAPS)}. Received: {map_method!r}")
    subject = _subject(run, run.load_model(), part, most_rows, user, thresholds, map_method, top)
    chapters = [chapter(subject) for chapter in tqdm(CHAPTERS, desc="analysis", unit="chapter", disable=None)]
    chapters = [chapter for chapter in chapters if chapter is not None]
    with atomic_write(out) as temporary:
        for name in ("tables", "figures"):
            (temporary / name).mkdir(parents=True)
        for chapter in chapters:
            for name, frame in chapter.tables.items():
                frame.map(csv_safe).to_csv(temporary / "tables" / f"{name}.csv", index=False)
            for picture in chapter.section.pictures:
                (temporary / "figures" / f"{picture.name}.png").write_bytes(picture.content)
        write_json(temporary / "verdict.json", [dataclasses.asdict(verdict) for verdict in subject.verdicts])
        name = run.folder.resolve().name
        title = f"What the experts of {name} learned" if subject.has_gates else f"Analysis of {name}"
        (temporary / PAGE).write_text(page(title, [chapter.section for chapter in chapters]), encoding="utf-8")
    return Analysis(out, subject.verdicts, "\n".join(subject.summary))


def run_cards(run: Run, model: TwoTowerModel, part: str = "test", most_rows: int = MOST_ROWS) -> Section | None:
    """The cards of the page alone, and what they say; None of a model without gates.

    Args:
        run: The run.
        model: Its best checkpoint.
        part: As in `analyze_run`, like `most_rows`.

    Raises:
        DataError: If the part has no rows.
    """
    chapter = cards_chapter(_subject(run, model, part, most_rows))
    return None if chapter is None else chapter.section


def _subject(
    run: Run,
    model: TwoTowerModel,
    part: str,
    most_rows: int,
    user: str | int | None = None,
    thresholds: Thresholds | None = None,
    map_method: str = "pca",
    top: int = 10,
) -> Subject:
    prepared = run.prepared.bucket_with(part, user)
    explained = user_state(prepared, part, user)
    rows = prepared.part_rows(part)
    chosen = np.arange(len(rows))
    if len(rows) > most_rows:
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), most_rows, replace=False))
    logger.info("Analysing %s on %s rows of the %s part ...", run.checkpoint, f"{len(chosen):,}", part)
    users = ", those of one bucket of users" if run.prepared.is_in_buckets else ""
    drawn = "" if len(chosen) == len(rows) else f", drawn at random of {len(rows):,}"
    data = _interactions(prepared, part, model.task_names, run.config.model.objective).take(chosen)
    # Without ids, items are combinations of features: those of these rows.
    catalogue = prepared.catalogue if prepared.has_items else np.unique(data.item_rows)
    return Subject(
        Study(model, data, catalogue),
        groups(prepared),
        _item_names(prepared, catalogue),
        thresholds or Thresholds(),
        map_method,
        explained,
        top,
        f"Model {run.config.model.name}, tasks {', '.join(model.task_names)}; {len(chosen):,} rows of the {part} part "
        f"of {prepared.dataset.name} (split by {prepared.dataset.split.by}){users}{drawn}.",
    )


def _interactions(prepared: PreparedDataset, part: str, tasks: Sequence[str], objective: str) -> Interactions:
    """The interactions of a part with the weights of the metrics.

    A task that is learned given an event which the model does not predict puts out a probability given that event: it
    counts in the rows with that event.
    """
    data = prepared.part(part, tasks, "marginal")
    rows, weights = prepared.part_rows(part), dict(data.weights)
    for task in prepared.schema(tasks, objective).tasks:
        given = prepared.dataset.task(task.name).given
        if given is not None and given not in tasks and task.objective == "conditional":
            weights[task.name] = weights.get(task.name, np.ones(len(data), np.float32)) * prepared.event(given)[rows]
    return dataclasses.replace(data, weights=weights)


def _item_names(prepared: PreparedDataset, catalogue: np.ndarray) -> np.ndarray | None:
    """Name of each row of the table of items, of the catalogue at least; without ids the values of its features."""
    if prepared.has_items:
        return prepared.items.names
    texts = []
    for feature in prepared.encoder.of_tower("item"):
        if not (feature.constant or feature.is_list or feature.raw == "vector"):
            values = np.asarray(prepared.items.raw[feature.name])[catalogue]
            known = known_values(feature, values)
            texts.append(
                [f"{feature.name} {v}" if k else f"no {feature.name}" for v, k in zip(values, known, strict=True)]
            )
    if not texts:
        return None
    names = np.full(len(prepared.items), "", object)
    names[catalogue] = [", ".join(parts) for parts in zip(*texts, strict=True)]
    return names


def _check_target(out: Path) -> None:
    ours = out.is_dir() and ((out / PAGE).is_file() or not any(out.iterdir()))
    if out.exists() and not ours:
        raise ConfigError(
            f"Expected a folder for the analysis that is new, empty, or holds an earlier one. Received: {out}"
        )


# === What is analysed ===


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is analysed, and how; tables that several chapters need are made once.

    Args:
        study: Model and data.
        groupings: Groups of items and users.
        names: Name of each row of the table of items; None of a single item without features.
        thresholds: Of the verdict.
        map_method: See `item_map`.
        explained: The user to explain.
        top: Items of that user, per task.
        introduction: First paragraph of the page.
    """

    study: Study
    groupings: tuple[Grouping, ...]
    names: np.ndarray | None
    thresholds: Thresholds
    map_method: str
    explained: UserState
    top: int
    introduction: str

    @property
    def has_gates(self) -> bool:
        return self.study.model.gates is not None

    @property
    def has_kernels(self) -> bool:
        return has_kernels(self.study.model)

    @cached_property
    def weights(self) -> pd.DataFrame:
        return tables.gate_weights(self.study, self.groupings)

    @cached_property
    def shares(self) -> pd.DataFrame:
        return tables.contribution_shares(self.study, self.groupings)

    @cached_property
    def entropy(self) -> pd.DataFrame:
        return tables.gate_entropy(self.study)

    @cached_property
    def used(self) -> pd.DataFrame:
        return tables.utilisation(self.study, self.thresholds)

    @cached_property
    def similarity(self) -> pd.DataFrame:
        return tables.expert_similarity(self.study)

    @cached_property
    def effect(self) -> pd.DataFrame:
        return tables.gate_effect(self.study)

    @cached_property
    def attention(self) -> pd.DataFrame:
        return tables.field_attention(self.study)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One per task with a gate."""
        if not self.has_gates:
            return ()
        return judge(
            self.entropy, self.used, self.similarity, self.weights, self.effect, self.thresholds, self.has_kernels
        )

    @property
    def summary(self) -> list[str]:
        """The verdict in words, and what is to be said of the model as a whole."""
        if not self.verdicts:
            return [f"no gates\n  {NO_GATES}"]
        notes = [f"field attention\n  {attention_note(self.attention, self.thresholds)}"] if self.has_kernels else []
        return [*map(str, self.verdicts), *notes]


# === Chapters ===


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A section of the page, and the tables behind it, `{name of the file: table}`."""

    section: Section
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)


def verdict_chapter(subject: Subject) -> Chapter:
    """The verdict on every task, in words."""
    return Chapter(Section("Verdict", (subject.introduction,), quotes=tuple(subject.summary)))


def cards_chapter(subject: Subject) -> Chapter | None:
    """What each virtual kernel or expert of each task stands for."""
    if not subject.has_gates:
        return None
    frame = tables.kernel_cards(
        subject.study, subject.weights, subject.shares, subject.names, subject.similarity, subject.effect
    )
    what = "kernel" if subject.has_kernels else "expert"
    read, other = ("item", "user") if subject.study.model.gate_side == "item" else ("user", "item")
    text = (
        f"One card per task and {what}. Its weight is what the gate gives it, and depends on the {read} alone. Its "
        "share of the output is the size of its contribution to the logit, weight times score, over the sum of all, "
        f"and depends on the {other}, too. In brackets: weight or share there, and how many times its mean that is.",
        f"Listed is what raises that mean by at least {tables.LEAST_LIFT:.0%} of an equal share. Groups of few "
        "impressions are left out, and items of few beyond the most frequent, which have "
        f"{tables.COMMON_ITEMS:.0%} of the impressions together. CKA is the similarity of the outputs, from 0 to 1. "
        f"Without it: the weight of the {what} goes to the others; nothing is retrained.",
    )
    cards = tuple(_card(row, what, read) for row in frame.to_dict("records"))
    texts = frame.assign(**{name: frame[name].map("; ".join) for name in ("items", "item_groups", "user_groups")})
    return Chapter(Section(f"What each {what} stands for", text, cards=cards), {"kernel_cards": texts})


def _card(row: dict, what: str, read: str) -> Card:
    used = f"{row['mean_weight']:.2f} on average, the largest in {row['strongest']:.0%} of the impressions"
    facts = {"Weight": [used]}
    if np.isfinite(row["mean_share"]):
        facts["Share of the output"] = [f"{row['mean_share']:.2f} on average"]
    listed = {"items": "Items", "item_groups": "Item groups", "user_groups": "User groups"}
    raised = {
        f"{text} that raise its {'weight' if name.startswith(read) else 'share'}": row[name]
        for name, text in listed.items()
        if row[name]
    }
    facts |= raised or {"Raised by": ["nothing in particular"]}
    if np.isfinite(row["difference"]):
        facts["Without it"] = [f"{row['metric'].upper()} {row['difference']:+z.4f}"]
    if row["most_similar"] >= 0:
        facts["Most similar"] = [f"{what} {row['most_similar']} (CKA {row['cka']:.2f})"]
    # A line break in a name is none of the page.
    return Card(
        f"{row['task']}: {what} {row['expert']}",
        {name: [" ".join(value.split()) for value in values] for name, values in facts.items()},
    )


def gates_chapter(subject: Subject) -> Chapter | None:
    """Gate weights by group."""
    if not subject.has_gates:
        return None
    pictures = []
    for grouping in subject.groupings:
        if grouping.variable in set(subject.weights["variable"]):
            figure = figures.weights_figure(subject.weights, grouping.variable, grouping.description)
            alt = f"Heat map of the mean gate weight of each expert by {grouping.description}, per task; see the table."
            pictures.append(_picture(f"weights_by_{grouping.variable}", figure, alt))
    side = subject.study.model.gate_side
    text = (
        "Each cell is the mean gate weight over the impressions of a group; an item or user counts in each of its "
        "groups. All pictures have the same colours, and groups of few impressions are pale. The gates of this model "
        f"read the {side}: differences between groups of the other side come from the mix of impressions. How much of "
        "the output each expert makes in a group is in the second table.",
    )
    shown = {"gate weights by group": subject.weights, "shares of the output by group": subject.shares}
    named = {"gate_weights": subject.weights, "contribution_shares": subject.shares}
    return Chapter(Section("What the gates choose", text, tuple(pictures), shown), named)


def usage_chapter(subject: Subject) -> Chapter | None:
    """Mean weights, entropies, and what choosing and each expert is worth."""
    if not subject.has_gates:
        return None
    used = [f"{row.task} expert {row.expert}: {row.mean_weight:.2f}" for row in subject.used.itertuples()]
    entropy = [f"{row.task}: {row.impression_entropy_share:.1%}" for row in subject.entropy.itertuples()]
    worth = [f"{row.task} {row.change}: {row.difference:+z.4f}" for row in subject.effect.itertuples()]
    pictures = (
        _picture("utilisation", figures.utilisation_figure(subject.used), f"Mean gate weights. {'; '.join(used)}."),
        _picture(
            "entropy",
            figures.entropy_figure(subject.entropy),
            f"Entropy of the weights of one impression, as a share of the maximum. {'; '.join(entropy)}.",
        ),
        _picture("effect", figures.effect_figure(subject.effect), f"Change of the metric. {'; '.join(worth)}."),
    )
    text = (
        "Entropy of one impression: does each impression listen to all experts alike? Entropy of the mean weights: are "
        "all experts used by somebody? Worth: the metric after the gate's weights are replaced by their mean, or after "
        "one expert is removed and its weight given to the others; nothing is retrained.",
    )
    shown = {"use of the experts": subject.used, "entropy of the gates": subject.entropy, "worth": subject.effect}
    named = {"utilisation": subject.used, "gate_entropy": subject.entropy, "gate_effect": subject.effect}
    return Chapter(Section("Does the model use its experts?", text, pictures, shown), named)


def experts_chapter(subject: Subject) -> Chapter | None:
    """Similarity of experts and of virtual kernels."""
    if not subject.has_gates:
        return None
    named = {"expert_similarity": subject.similarity}
    pictures = [
        _picture(
            f"experts_{measure}",
            figures.similarity_figure(subject.similarity, measure),
            f"Heat map of the {measure} of the outputs of each pair of experts; numbers in the table.",
        )
        for measure in ("cka", "correlation")
    ]
    if subject.has_kernels:
        kernels = named["kernel_similarity"] = tables.kernel_similarity(subject.study.model)
        alt = "Heat map of the cosine similarity of each pair of virtual kernels; numbers in the table."
        pictures.append(_picture("kernels_cosine", figures.similarity_figure(kernels, "cosine"), alt))
    text = (
        "CKA (centred kernel alignment) is 1 where two experts carry the same information; correlation is 1 where they "
        "also put out the same numbers, up to a positive factor.",
    )
    shown = {name.replace("_", " "): frame for name, frame in named.items()}
    return Chapter(Section("How alike are the experts?", text, tuple(pictures), shown), named)


def attention_chapter(subject: Subject) -> Chapter | None:
    """Field attention of the virtual kernels."""
    if not subject.has_kernels:
        return None
    note = attention_note(subject.attention, subject.thresholds)
    alt = f"Heat map of the mean attention of each virtual kernel to each user field. {note}"
    picture = _picture("field_attention", figures.attention_figure(subject.attention), alt)
    section = Section("Which user fields each kernel listens to", (note,), (picture,), {"attention": subject.attention})
    return Chapter(section, {"field_attention": subject.attention})


def map_chapter(subject: Subject) -> Chapter:
    """Items and virtual kernels in one plane."""
    heading = "Map of the items"
    if len(subject.study.catalogue) < 3:
        return Chapter(Section(heading, ("There are too few items for a map.",)))
    frame = tables.item_map(subject.study, subject.map_method, subject.names)
    grouping = next((grouping for grouping in subject.groupings if grouping.side == "item"), None)
    by = "" if grouping is None else f", one panel per group by {grouping.description}"
    pictures = [
        _picture(
            f"map_{task}",
            figures.map_figure(frame, task, grouping),
            f"Map ({subject.map_method}) of the tag vectors of {task}{by}.",
        )
        for task in subject.study.model.task_names
    ]
    text = ["Items near each other get similar scores from every user."]
    if subject.has_kernels:
        text.append("The gate weighs a kernel more the further an item lies in the kernel's direction.")
    return Chapter(Section(heading, (" ".join(text),), tuple(pictures)), {f"map_{subject.map_method}": frame})


def user_chapter(subject: Subject) -> Chapter | None:
    """One user explained."""
    if not subject.has_gates:
        return None
    heading, explained, study = "One user explained", subject.explained, subject.study
    known = [] if len(study.catalogue) == len(explained.known) else list(explained.known)
    frame = explain_user(study, explained.row, subject.names, subject.top, known)
    pictures = []
    for task, rows in frame.groupby("task", sort=False):
        best = ", ".join(rows.drop_duplicates("rank")["item"].head(3))
        alt = f"Contributions of the experts to the outputs of {task} for {explained.name}, top items: {best} ..."
        figure = figures.explanation_figure(frame, task, explained.name)
        pictures.append(_picture(f"user_{task}", figure, alt))
    moment = f"{explained.name[0].upper()}{explained.name[1:]}, the last state in this part"
    if known:
        moment += f", without the {len(known):,} items of earlier rows"
    if len(study.catalogue) == 1:
        moment += "; there is a single item"
    text = (
        f"{moment}. A logit (of a regression, the value less its constant) is the sum of its row: gate weight times "
        "inner product of expert output and tag.",
    )
    return Chapter(Section(heading, text, tuple(pictures), {explained.name: frame}), {"user": frame})


CHAPTERS = (
    verdict_chapter,
    cards_chapter,
    gates_chapter,
    usage_chapter,
    experts_chapter,
    attention_chapter,
    map_chapter,
    user_chapter,
)


def _picture(name: str, figure, alt: str) -> Picture:
    return Picture(name, figures.png(figure), alt)
