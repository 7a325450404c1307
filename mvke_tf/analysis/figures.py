# SPDX-License-Identifier: Apache-2.0
"""One picture per table; all are readable in black and white and for colour-blind eyes.

Colour runs along one map of rising lightness, every cell and bar states its number, and marks differ in shape.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from mvke_tf.analysis.tables import ALL, AS_TRAINED
from mvke_tf.data.groups import FEW_ROWS, SMALL_SHARE, Grouping, is_small
from mvke_tf.figures import BLUE, ORANGE, plain_text

# Groups that a picture can show.
MOST_GROUPS = 40
_UNSEEN = "#e8e8e8"
_MAP = colormaps["cividis"].with_extremes(bad=_UNSEEN)
_METRICS = {"auc": "AUC", "rmse": "RMSE (unit of the label)"}


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The picture as a PNG file."""
    buffer, small = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        # Names in the data may be in a script that the font lacks; they are in the tables too.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_figure(buffer, dpi=dpi, facecolor="white")
    # 256 colours are enough for these pictures, and half the bytes.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def weights_scale(frame: pd.DataFrame) -> Normalize:
    """The colours of all heat maps of one table of gate weights: from 0 to the largest weight, in equal shares.

    At least up to twice an equal share, so that a gate that does not choose looks flat. Small groups may lie above.

    Args:
        frame: As `gate_weights` makes it.
    """
    total = frame.loc[frame["variable"] == ALL, "impressions"].max()
    large = frame[(frame["variable"] == ALL) | ~is_small(frame["impressions"], total)]
    return Normalize(0.0, max(2.0, _in_equal_shares(large).max()), clip=True)


def _in_equal_shares(frame: pd.DataFrame) -> np.ndarray:
    """Mean weights as multiples of an equal share, so that tasks with different numbers of experts compare."""
    return (frame["mean_weight"] * frame.groupby("task")["expert"].transform("nunique")).to_numpy()


def weights_figure(frame: pd.DataFrame, variable: str, description: str = "") -> Figure:
    """Heat map of the mean gate weights of each group, one panel per task.

    Cells state the weight; the colour is its multiple of an equal share, on a scale that is the same for all variables
    of the table. Groups of few impressions are pale and hatched. Grey: the task does not see that expert.

    Args:
        frame: As `gate_weights` makes it, with all its variables.
        variable: Which groups; of more than `MOST_GROUPS` those with the most impressions.
        description: Variable and unit, for the title.

    Raises:
        ValueError: If the frame has no such groups.
    """
    scale, total = weights_scale(frame), frame.loc[frame["variable"] == ALL, "impressions"].max()
    frame = frame[frame["variable"] == variable]
    if frame.empty:
        raise ValueError(f"The table of gate weights has no groups of {variable!r}.")
    counts = frame.groupby("group", sort=False)["impressions"].max()
    largest = counts.sort_values(ascending=False, kind="stable").index[:MOST_GROUPS]
    groups = [group for group in counts.index if group in set(largest)]
    tasks, experts = list(frame["task"].unique()), sorted(frame["expert"].unique())
    frame = frame.assign(relative=_in_equal_shares(frame))
    small = is_small(counts[groups].to_numpy(), total)
    names = [f"{_name(group, 40)} ({counts[group]:,})" for group in groups]
    figure, all_axes = _panels(len(tasks), _width(len(experts)), len(groups), max(map(len, names)))
    unseen = False
    for axes, task in zip(all_axes, tasks, strict=True):
        weights, relative = (
            frame[frame["task"] == task]
            .pivot(index="group", columns="expert", values=column)
            .reindex(groups, columns=experts)
            for column in ("mean_weight", "relative")
        )
        seen = weights.notna().any()
        unseen |= not seen.all()
        _heat(axes, relative.to_numpy(), weights.to_numpy(), scale, f"{task}\n{seen.sum()} experts", faded=small)
        axes.set_xticks(range(len(experts)), [str(expert) for expert in experts])
        axes.set_xlabel("expert (index)")
    all_axes[0].set_yticks(range(len(groups)), names)
    all_axes[0].set_ylabel("group (impressions)")
    _colour_bar(figure, all_axes, scale, "mean weight, in equal shares")
    legend = []
    if small.any():
        few = f"fewer than {FEW_ROWS} impressions or {SMALL_SHARE:.0%} of them"
        legend.append(Patch(facecolor="white", edgecolor="0.5", hatch="////", label=few))
    if unseen:
        legend.append(Patch(facecolor=_UNSEEN, label="the task does not see this expert"))
    if legend:
        figure.legend(handles=legend, loc="outside lower center", fontsize=9, frameon=False)
    title = f"Mean gate weight of each expert by {plain_text(description or variable)}"
    if len(groups) < len(counts):
        title += f" (the {len(groups)} largest of {len(counts)} groups)"
    figure.suptitle(_wrapped(title, figure), fontsize=12)
    return figure


def utilisation_figure(frame: pd.DataFrame) -> Figure:
    """Mean weight and share of impressions as the strongest, of each expert and task.

    Args:
        frame: As `utilisation` makes it.
    """
    tasks = list(frame["task"].unique())
    widest = frame.groupby("task").size().max()
    figure = Figure(figsize=(max(4.5, 0.75 * widest + 1.2) * len(tasks), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(all_axes, tasks, strict=True):
        rows = frame[frame["task"] == task]
        place = np.arange(len(rows))
        for offset, column, style, label in (
            (-0.2, "mean_weight", {"color": BLUE}, "mean weight"),
            (0.2, "strongest", {"color": ORANGE, "hatch": "///"}, "share of impressions\nwhere strongest"),
        ):
            bars = axes.bar(place + offset, rows[column], 0.38, edgecolor="black", linewidth=0.7, label=label, **style)
            numbers = axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2, zorder=4)
            for number in numbers:
                number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        equal = rows["equal_share"].iloc[0]
        axes.axhline(equal, color="black", linestyle="--", linewidth=1, label=f"equal share, {equal:.2f}")
        names = [
            f"{expert}\ndead" if dead else str(expert)
            for expert, dead in zip(rows["expert"], rows["dead"], strict=True)
        ]
        axes.set_xticks(place, names)
        axes.set_xlabel("expert (index)")
        axes.set_title(f"{task}, {rows['impressions'].iloc[0]:,} impressions", fontsize=11)
        axes.set_ylim(0, 1.3 * max(0.4, frame[["mean_weight", "strongest"]].to_numpy().max()))
        axes.legend(fontsize=8, loc="upper center", ncols=3, frameon=False, columnspacing=1.0, handlelength=1.6)
    all_axes[0].set_ylabel("share (0 to 1)")
    figure.suptitle("How much each task uses each expert", fontsize=12)
    return figure


def entropy_figure(frame: pd.DataFrame) -> Figure:
    """Entropy of the weights of one impression and of the mean weights, as shares of the maximum.

    Args:
        frame: As `gate_entropy` makes it.
    """
    figure = Figure(figsize=(7.2, 1.5 + 0.75 * len(frame)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(frame))
    for offset, name, colour, hatch, label in (
        (-0.19, "impression_entropy", BLUE, "", "one impression (mean)"),
        (0.19, "mean_weight_entropy", ORANGE, "///", "mean weights"),
    ):
        style: dict[str, Any] = {
            "color": colour,
            "hatch": hatch,
            "edgecolor": "black",
            "linewidth": 0.7,
            "label": label,
        }
        bars = axes.barh(place + offset, frame[f"{name}_share"].to_numpy(), height=0.36, **style)
        bits = [
            f"{share:.1%} ({bits:.2f} bits)"
            for share, bits in zip(frame[f"{name}_share"], frame[f"{name}_bits"], strict=True)
        ]
        axes.bar_label(bars, bits, fontsize=9, padding=3)
    axes.set_yticks(place, [f"{task}\n{n} experts" for task, n in zip(frame["task"], frame["experts"], strict=True)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("entropy (share of the maximum, log2 of the number of experts)")
    axes.set_title("How evenly the gates spread their weight", fontsize=12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def attention_figure(frame: pd.DataFrame) -> Figure:
    """Heat map of the user fields that each virtual kernel listens to.

    Args:
        frame: As `field_attention` makes it.
    """
    fields, kernels = list(frame["field"].unique()), list(frame["kernel"].unique())
    values = frame.pivot(index="field", columns="kernel", values="mean_attention").loc[fields].to_numpy()
    relative = values * len(fields)
    scale = Normalize(0.0, max(2.0, np.nanmax(relative)))
    figure, (axes,) = _panels(1, _width(len(kernels)) + 0.4, len(fields), max(map(len, fields)))
    _heat(axes, relative, values, scale, "Field attention\nof the virtual kernels", "{:.3f}")
    axes.set_xticks(range(len(kernels)), [str(kernel) for kernel in kernels])
    axes.set_xlabel("virtual kernel (index)")
    axes.set_yticks(range(len(fields)), fields)
    axes.set_ylabel("user field")
    _colour_bar(figure, [axes], scale, "attention, in equal shares")
    return figure


def similarity_figure(frame: pd.DataFrame, measure: str) -> Figure:
    """Heat map of the similarity of all pairs of experts or kernels.

    Args:
        frame: As `expert_similarity` or `kernel_similarity` makes it.
        measure: Its column: `"cka"`, `"correlation"` or `"cosine"`.
    """
    what = "expert" if "expert_a" in frame else "kernel"
    values = frame.pivot(index=f"{what}_a", columns=f"{what}_b", values=measure)
    titles = {
        "cka": "Similarity of the experts' outputs (linear CKA)",
        "correlation": "Correlation of the experts' outputs",
        "cosine": "Cosine similarity of the virtual kernels",
    }
    scale = Normalize(0.0 if measure == "cka" else -1.0, 1.0)
    figure, (axes,) = _panels(1, max(_width(len(values)), 3.2), len(values), 4)
    _heat(axes, values.to_numpy(), values.to_numpy(), scale, "\n".join(textwrap.wrap(titles[measure], 32)))
    for side in (axes.set_xticks, axes.set_yticks):
        side(range(len(values)), [str(index) for index in values.index])
    name = "expert (index)" if what == "expert" else "virtual kernel (index)"
    axes.set(xlabel=name, ylabel=name)
    _colour_bar(figure, [axes], scale, "CKA" if measure == "cka" else measure)
    if values.isna().any(axis=None):
        undefined = Patch(facecolor=_UNSEEN, label="not defined: never changes")
        figure.legend(handles=[undefined], loc="outside lower center", fontsize=9, frameon=False)
    return figure


def effect_figure(frame: pd.DataFrame) -> Figure:
    """What the metric of each task loses without the gate's choice, or without one expert.

    Args:
        frame: As `gate_effect` makes it.
    """
    tasks = list(frame["task"].unique())
    figure = Figure(figsize=(5.4 * len(tasks), 1.7 + 0.36 * frame.groupby("task").size().max()), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        rows = frame[frame["task"] == task]
        trained, changed = rows[rows["change"] == AS_TRAINED].iloc[0], rows[rows["change"] != AS_TRAINED]
        place, values = np.arange(len(changed)), changed["difference"].to_numpy()
        bars = axes.barh(place, values, 0.6, color=BLUE, edgecolor="black", linewidth=0.7)
        axes.bar_label(bars, [f"{value:+.5f}" for value in values], fontsize=9, padding=3)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(place, changed["change"])
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"change of {_METRICS[trained['metric']]}")
        axes.set_title(f"{task}: {trained['metric'].upper()} {trained['value']:.4f} as trained", fontsize=11)
    figure.suptitle("What choosing, and each expert, is worth", fontsize=12)
    return figure


def map_figure(frame: pd.DataFrame, task: str, grouping: Grouping | None = None, panels: int = 8) -> Figure:
    """The map of one task: items as points, virtual kernels as numbered diamonds, one panel per group of items.

    Args:
        frame: As `item_map` makes it.
        task: Its task.
        grouping: Groups of items, of which the most frequent get a panel that shows their items in colour; a single
            panel without them.
        panels: Most panels.
    """
    rows = frame[frame["task"] == task]
    items, kernels = rows[rows["kind"] == "item"], rows[rows["kind"] == "kernel"]
    chosen: list[tuple[str, np.ndarray]] = [("all items", np.ones(len(items), bool))]
    members = None if grouping is None else grouping.members[items["row"].to_numpy()]
    if grouping is not None and members is not None and members.any():
        sizes = members.sum(axis=0)
        largest = [index for index in np.argsort(-sizes, kind="stable")[:panels] if sizes[index]]
        names = [f"{_name(grouping.groups[index], 28)} ({sizes[index]:,})" for index in largest]
        chosen = list(zip(names, members[:, largest].T, strict=True))
    columns = min(4, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(5.0, 2.7 * columns), max(4.4, 2.6 * lines + 1.1)), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(chosen) :]:
        axes.set_visible(False)
    for axes, (name, inside) in zip(grid, chosen, strict=False):
        axes.scatter(items["x"][~inside], items["y"][~inside], s=5, color="#d8d8d8", linewidths=0, rasterized=True)
        axes.scatter(items["x"][inside], items["y"][inside], s=9, color=BLUE, linewidths=0, rasterized=True)
        axes.scatter(kernels["x"], kernels["y"], s=150, marker="D", color=ORANGE, edgecolors="black", zorder=3)
        for kernel in kernels.itertuples():
            axes.text(
                kernel.x, kernel.y, str(kernel.row), ha="center", va="center", fontsize=9, weight="bold", zorder=4
            )
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.margins(0.08)
    shares = rows[["share_x", "share_y"]].iloc[0]
    projected = np.isfinite(shares["share_x"])
    figure.supxlabel(
        f"first component ({shares['share_x']:.0%} of the variance)" if projected else "x (no unit)", fontsize=10
    )
    figure.supylabel(f"second component ({shares['share_y']:.0%})" if projected else "y (no unit)", fontsize=10)
    by = "" if grouping is None else f" by {plain_text(grouping.description)}"
    legend = "points: items" if grouping is None else "dark: items of the group, pale: all others"
    legend += "; numbered diamonds: virtual kernels" if len(kernels) else ""
    figure.suptitle(f"Tag vectors of {task}{by}\n{legend}", fontsize=11)
    return figure


def explanation_figure(frame: pd.DataFrame, task: str, user: str = "") -> Figure:
    """Heat map of what each expert contributes to the logits of a user's top items.

    Args:
        frame: As `explain_user` makes it.
        task: Its task.
        user: Name of the user, such as "user 7", for the title.
    """
    rows = frame[frame["task"] == task]
    values = rows.pivot(index="rank", columns="expert", values="contribution")
    first = rows.groupby("rank").first()
    titles = [f"{rank}. {_name(row['item'], 34)}  ({row['logit']:+.2f})" for rank, row in first.iterrows()]
    largest = np.nanmax(np.abs(values.to_numpy()))
    scale = Normalize(-(largest or 1.0), largest or 1.0)
    figure, (axes,) = _panels(1, max(_width(values.shape[1]), 2.6), len(values), max(map(len, titles)))
    _heat(
        axes, values.to_numpy(), values.to_numpy(), scale, f"{task}{f', {plain_text(user)}' if user else ''}", "{:+.2f}"
    )
    axes.set_xticks(range(values.shape[1]), [str(expert) for expert in values.columns])
    axes.set_yticks(range(len(titles)), titles)
    axes.set(xlabel="expert (index)", ylabel="top items (sum of the row)")
    _colour_bar(figure, [axes], scale, "contribution")
    return figure


def _width(columns: int) -> float:
    return max(1.9, 0.52 * columns)


def _panels(number: int, width: float, rows: int, label_letters: int) -> tuple[Figure, Sequence[Axes]]:
    size = (number * (width + 0.25) + 0.085 * label_letters + 1.9, max(2.6, 0.29 * rows + 1.75))
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, number, sharey=True, squeeze=False)[0]


def _name(text: object, letters: int) -> str:
    """A name of the data on one line, of at most so many letters."""
    line = " ".join(str(text).split())
    return plain_text(line if len(line) <= letters else f"{line[: letters - 1]}…")


def _wrapped(title: str, figure: Figure) -> str:
    """The title in lines that are no longer than the picture is wide."""
    return "\n".join(textwrap.wrap(title, max(30, round(9.5 * figure.get_figwidth()))))


def _heat(
    axes: Axes,
    colours: np.ndarray,
    numbers: np.ndarray,
    scale: Normalize,
    title: str,
    form: str = "{:.2f}",
    faded: np.ndarray | None = None,
) -> None:
    """Coloured cells with their numbers, grey ones without; rows that say little are pale and hatched."""
    cells = _MAP(scale(np.ma.masked_invalid(colours)))
    if faded is not None:
        pale = faded[:, None] & np.isfinite(colours)
        cells[pale, :3] = 0.25 * cells[pale, :3] + 0.75
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    for (row, column), number in np.ndenumerate(numbers):
        if not np.isfinite(number):
            continue
        if faded is not None and faded[row]:
            corner = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor="0.55", hatch="////", linewidth=0))
        dark = cells[row, column, :3] @ (0.299, 0.587, 0.114) < 0.45
        text = axes.text(
            column, row, form.format(number), ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )
        if faded is not None and faded[row]:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    axes.set_xticks(np.arange(-0.5, colours.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, colours.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set_title(title, fontsize=11)


def _colour_bar(figure: Figure, axes: Sequence[Axes], scale: Normalize, label: str) -> None:
    figure.colorbar(ScalarMappable(scale, _MAP), ax=list(axes), label=label, fraction=0.05, pad=0.02)
