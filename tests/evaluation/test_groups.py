# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pandas as pd
import pytest

from mvke_tf.data.groups import Grouping
from mvke_tf.evaluation.groups import MOST_GROUPS, group_metrics, groups_figure
from mvke_tf.evaluation.outcomes import Outcome
from tests.small import handmade_prepared

COLUMNS = [
    "task",
    "variable",
    "group",
    "rows",
    "positives",
    "auc",
    "rmse",
    "poisson_deviance",
    "accuracy",
    "mean_prediction",
    "mean_label",
]
TESTED = 6


class FirstRows:
    """Six rows: users 0, 0, 1, 1, 2, 2 with the items 0, 1, 2, 0, 1, 2."""

    user_row, item_row = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 0, 1, 2])

    def part_rows(self, part):
        return np.arange(TESTED)


def outcome(task="buy", kind="binary", counts=(1, 1, 1, 1, 1, 0)):
    labels = np.array([1, 0, 1, 0, 0, 1.0]) if kind == "binary" else np.array([1, 2, 3, 4, 5, 6.0])
    values = np.array([0.9, 0.8, 0.1, 0.4, 0.3, 0.5])
    return Outcome(task, kind, labels, values, np.array(counts, bool))


GROUPS = (
    Grouping("tags", "item", ("news", "sport", "none"), np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0]], bool)),
    Grouping.of_labels("country", "user", ["de", "fr", "de"]),
)


def test_group_metrics_by_hand():
    frame = group_metrics([outcome(), outcome("stars", "regression", (1, 1, 1, 1, 1, 1))], GROUPS, FirstRows(), "test")
    assert list(frame.columns) == COLUMNS
    buy = frame[frame["task"] == "buy"].set_index(["variable", "group"])
    assert list(buy.index) == [
        ("all", "all"),
        ("tags", "news"),
        ("tags", "sport"),
        ("country", "de"),
        ("country", "fr"),
    ]
    # Of the last row, which does not count, nothing is seen.
    assert buy.loc[("all", "all"), ["rows", "positives"]].tolist() == [5, 2]
    # Positives 0.9 and 0.1 above 0.8, 0.4, 0.3: 3 of 6.
    assert buy.loc[("all", "all"), "auc"] == pytest.approx(3 / 6)
    assert buy.loc[("all", "all"), ["mean_prediction", "mean_label"]].tolist() == pytest.approx([0.5, 0.4])
    # news: rows 0, 1, 3, 4; sport: rows 0, 2, 3 (0.9 and 0.1 against 0.4).
    assert buy.loc[("tags", "news"), ["rows", "positives", "auc"]].tolist() == [4, 1, 1.0]
    assert buy.loc[("tags", "sport"), ["rows", "positives", "auc"]].tolist() == [3, 2, 0.5]
    assert buy.loc[("country", "fr"), ["rows", "auc"]].tolist() == [2, 0.0]
    # de: rows 0, 1 and 4.
    assert buy.loc[("country", "de"), ["rows", "auc", "mean_label"]].tolist() == pytest.approx([3, 1.0, 1 / 3])
    assert buy["rmse"].isna().all()
    stars = frame[frame["task"] == "stars"].set_index("group")
    assert stars.loc["fr", "rmse"] == pytest.approx(np.sqrt((2.9**2 + 3.6**2) / 2))
    assert stars.loc["all", ["rows", "mean_label"]].tolist() == [6, 3.5]
    assert stars[["positives", "auc"]].isna().all(axis=None)


def test_a_group_of_one_class_has_no_auc_and_one_without_rows_no_row():
    frame = group_metrics([outcome(counts=(1, 0, 1, 0, 0, 0))], GROUPS, FirstRows(), "test")
    assert set(frame["group"]) == {"all", "news", "sport", "de", "fr"} and frame["auc"].isna().all()
    nothing = group_metrics([outcome(counts=[0] * 6)], GROUPS, FirstRows(), "test")
    assert nothing.empty and list(nothing.columns) == COLUMNS


def test_groups_of_a_prepared_dataset():
    prepared = handmade_prepared()
    rows = prepared.part_rows("test")
    values, labels = np.linspace(0, 1, len(rows)), prepared.label("click")[rows]
    members = np.zeros((len(prepared.items), 1), bool)
    members[prepared.item_row[rows[:1]]] = True
    grouping = Grouping("first", "item", ("first",), members)
    frame = group_metrics(
        [Outcome("click", "binary", labels, values, np.ones(len(rows), bool))], [grouping], prepared, "test"
    )
    inside = prepared.item_row[rows] == prepared.item_row[rows[0]]
    assert frame["rows"].tolist() == [len(rows), inside.sum()]
    assert frame["mean_prediction"][1] == pytest.approx(values[inside].mean())


def table(groups, total=10_000):
    rows = [("buy", "all", "all", total, 10, 0.7)] + [("buy", "place", name, n, 5, auc) for name, n, auc in groups]
    return pd.DataFrame(rows, columns=COLUMNS[:6]).assign(rmse=np.nan)


def test_the_picture_of_groups():
    grouping = Grouping("place", "item", ("here", "th$re", "rare"), np.zeros((1, 3), bool), "place of the item")
    figure = groups_figure(
        table([("here", 5000, 0.8), ("th$re", 4901, 0.6), ("rare", 99, 0.9)]), grouping, {"buy": "binary"}, "test"
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["here (5,000)", r"th\$re (4,901)", "rare (99)"]
    large, small, overall = axes.lines
    assert large.get_xdata().tolist() == [0.8, 0.6] and list(large.get_ydata()) == [0, 1]
    assert small.get_xdata().tolist() == [0.9] and small.get_markerfacecolor() == "white"
    assert overall.get_xdata() == [0.7, 0.7] and axes.get_title() == "buy, all rows 0.7000"
    assert figure.get_suptitle().startswith("By place of the item\ntest part") and axes.get_xlabel() == "AUC"
    # The first group is on top.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_of_many_groups_the_largest_are_drawn():
    names = tuple(f"g{number}" for number in range(50))
    grouping = Grouping("place", "item", names, np.zeros((1, 50), bool))
    frame = table([(name, 100 + number, 0.5) for number, name in enumerate(names)])
    figure = groups_figure(frame, grouping, {"buy": "binary"}, "test")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == MOST_GROUPS == 40 and labels[0] == "g10 (110)"
    assert figure.get_suptitle().endswith("the 40 largest of 50 groups")
