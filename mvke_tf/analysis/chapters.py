"""The chapters of the page on a finished run: what is said, shown and tabled."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import pandas as pd

from mvke_tf.analysis import figures, frames
from mvke_tf.analysis.contributions import explain_user, gate_effect
from mvke_tf.analysis.page import Picture, Section
from mvke_tf.analysis.study import Study, has_gates, has_kernels
from mvke_tf.analysis.verdict import Thresholds, Verdict, attention_note, judge
from mvke_tf.data.groups import Grouping
from mvke_tf.models.two_tower import task_names

NO_GATES = "This model has no gates: there is nothing to say about experts. The map of its items follows."


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A section of the page, and the frames behind it, `{name of the file: frame}`."""

    section: Section
    frames: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is analysed, and how; frames that several chapters need are made once.

    Args:
        study: Model and data.
        groupings: Groups of items and users.
        titles: Title of each item.
        thresholds: Of the verdict.
        map_method: See `item_map`.
        user: Id of the user to explain.
        user_row: Row of the state of that user.
        known: Rows of the items that the user had rated before.
        top: Items of that user, per task.
        introduction: First paragraph of the page.
    """

    study: Study
    groupings: tuple[Grouping, ...]
    titles: list[str]
    thresholds: Thresholds
    map_method: str
    user: str
    user_row: int
    known: list[int]
    top: int
    introduction: str

    @cached_property
    def weights(self) -> pd.DataFrame:
        return frames.gate_weights(self.study, self.groupings)

    @cached_property
    def entropy(self) -> pd.DataFrame:
        return frames.gate_entropy(self.study)

    @cached_property
    def used(self) -> pd.DataFrame:
        return frames.utilisation(self.study, self.thresholds.dead_weight)

    @cached_property
    def similarity(self) -> pd.DataFrame:
        return frames.expert_similarity(self.study)

    @cached_property
    def effect(self) -> pd.DataFrame:
        return gate_effect(self.study)

    @cached_property
    def attention(self) -> pd.DataFrame:
        return frames.field_attention(self.study)

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One per task with a gate."""
        if not has_gates(self.study.model):
            return ()
        kernels = has_kernels(self.study.model)
        return judge(self.entropy, self.used, self.similarity, self.weights, self.effect, self.thresholds, kernels)

    @property
    def summary(self) -> list[str]:
        """The verdict in words, and what is to be said of the model as a whole."""
        if not self.verdicts:
            return [f"no gates\n  {NO_GATES}"]
        notes = [f"field attention\n  {attention_note(self.attention)}"] if has_kernels(self.study.model) else []
        return [*map(str, self.verdicts), *notes]


def chapters_of(model) -> tuple:
    """The functions from a `Subject` to a `Chapter` that suit a model, in the order of the page."""
    chosen = [verdict_chapter]
    if has_gates(model):
        chosen += [gates_chapter, usage_chapter, experts_chapter]
    if has_kernels(model):
        chosen.append(attention_chapter)
    chosen.append(map_chapter)
    return (*chosen, user_chapter) if has_gates(model) else tuple(chosen)


def verdict_chapter(subject: Subject) -> Chapter:
    """The verdict on every task, in words."""
    return Chapter(Section("Verdict", (subject.introduction,), quotes=tuple(subject.summary)))


def gates_chapter(subject: Subject) -> Chapter:
    """Gate weights by group."""
    pictures = []
    for grouping in subject.groupings:
        figure = figures.weights_figure(subject.weights, grouping.variable, grouping.description)
        alt = f"Heat map of the mean gate weight of each expert by {grouping.description}, per task; see the table."
        pictures.append(_picture(f"weights_by_{grouping.variable}", figure, alt))
    text = (
        "Each cell is the mean gate weight over the impressions of a group. An item counts in each of its genres. The "
        "gate of MVKE reads the item, those of the other models the user: differences along the other side "
        "come from the mix of impressions.",
    )
    section = Section("What the gates choose", text, tuple(pictures), {"gate weights by group": subject.weights})
    return Chapter(section, {"gate_weights": subject.weights})


def usage_chapter(subject: Subject) -> Chapter:
    """Mean weights, entropies, and what choosing and each expert is worth."""
    tables = {"use of the experts": subject.used, "entropy of the gates": subject.entropy, "worth": subject.effect}
    used = [f"{row.task} expert {row.expert}: {row.mean_weight:.2f}" for row in subject.used.itertuples()]
    entropy = [f"{row.task}: {row.impression_entropy_share:.1%}" for row in subject.entropy.itertuples()]
    pictures = [
        _picture("utilisation", figures.utilisation_figure(subject.used), f"Mean gate weights. {'; '.join(used)}."),
        _picture(
            "entropy",
            figures.entropy_figure(subject.entropy),
            f"Entropy of the weights of one impression, as a share of the maximum. {'; '.join(entropy)}.",
        ),
    ]
    if len(subject.effect):
        worth = [f"{row.task} {row.change}: {row.difference:+.4f}" for row in subject.effect.itertuples()]
        pictures.append(
            _picture("effect", figures.effect_figure(subject.effect), f"Change of the metric. {'; '.join(worth)}.")
        )
    text = (
        "Entropy of one impression: does each impression listen to all experts alike? Entropy of the mean weights: are "
        "all experts used by somebody? Worth: the metric after the gate's weights are replaced by their mean, or after "
        "one expert is removed and its weight given to the others; nothing is retrained.",
    )
    named = {"utilisation": subject.used, "gate_entropy": subject.entropy, "gate_effect": subject.effect}
    return Chapter(Section("Does the model use its experts?", text, tuple(pictures), tables), named)


def experts_chapter(subject: Subject) -> Chapter:
    """Similarity of experts and of virtual kernels."""
    named = {"expert_similarity": subject.similarity}
    pictures = [
        _picture(
            f"experts_{measure}",
            figures.similarity_figure(subject.similarity, measure),
            f"Heat map of the {measure} of the outputs of each pair of experts; numbers in the table.",
        )
        for measure in ("cka", "correlation")
    ]
    if has_kernels(subject.study.model):
        kernels = named["kernel_similarity"] = frames.kernel_similarity(subject.study.model)
        alt = "Heat map of the cosine similarity of each pair of virtual kernels; numbers in the table."
        pictures.append(_picture("kernels_cosine", figures.similarity_figure(kernels, "cosine"), alt))
    text = (
        "CKA (centred kernel alignment) is 1 where two experts carry the same information; correlation is 1 where they "
        "also put out the same numbers, up to a positive factor.",
    )
    tables = {name.replace("_", " "): frame for name, frame in named.items()}
    return Chapter(Section("How alike are the experts?", text, tuple(pictures), tables), named)


def attention_chapter(subject: Subject) -> Chapter:
    """Field attention of the virtual kernels."""
    alt = (
        f"Heat map of the mean attention of each virtual kernel to each user field. {attention_note(subject.attention)}"
    )
    picture = _picture("field_attention", figures.attention_figure(subject.attention), alt)
    text = (attention_note(subject.attention),)
    section = Section("Which user fields each kernel listens to", text, (picture,), {"attention": subject.attention})
    return Chapter(section, {"field_attention": subject.attention})


def map_chapter(subject: Subject) -> Chapter:
    """Items and virtual kernels in one plane."""
    frame = frames.item_map(subject.study, subject.map_method, subject.titles)
    genres = next((grouping for grouping in subject.groupings if grouping.variable == "genre"), None)
    pictures = []
    for task in task_names(subject.study.model):
        alt = f"Map ({subject.map_method}) of the tag vectors of {task}, one panel per genre."
        pictures.append(_picture(f"map_{task}", figures.map_figure(frame, task, genres), alt))
    text = ["Items near each other get similar scores from every user."]
    if has_kernels(subject.study.model):
        text.append("The gate weighs a kernel more the further an item lies in the kernel's direction.")
    return Chapter(
        Section("Map of the items", (" ".join(text),), tuple(pictures)), {f"map_{subject.map_method}": frame}
    )


def user_chapter(subject: Subject) -> Chapter:
    """One user explained."""
    frame = explain_user(subject.study, subject.user_row, subject.titles, subject.top, subject.known)
    pictures = []
    for task, rows in frame.groupby("task", sort=False):
        best = ", ".join(rows.drop_duplicates("rank")["title"].head(3))
        alt = (
            f"Contributions of the experts to the logits of the top items of user {subject.user} for {task}: {best} ..."
        )
        pictures.append(_picture(f"user_{task}", figures.explanation_figure(frame, task, subject.user), alt))
    text = (
        f"User {subject.user} at the last moment in this part, without the {len(subject.known):,} items rated before. "
        "A logit is the sum of its row: gate weight times inner product of expert output and tag.",
    )
    tables = {f"user {subject.user}": frame}
    return Chapter(Section("One user explained", text, tuple(pictures), tables), {"user": frame})


def _picture(name: str, figure, alt: str) -> Picture:
    return Picture(name, figures.png(figure), alt)
