# SPDX-License-Identifier: Apache-2.0
"""Tidy tables of what the gates and experts of a model do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from keras import ops

from mvke_tf.analysis.study import Study, has_kernels
from mvke_tf.data.groups import Grouping, group_counts, is_small
from mvke_tf.errors import ConfigError, MissingExtraError
from mvke_tf.inference.gates import GateUse, Thresholds, dead, entropy_bits
from mvke_tf.metrics import auc
from mvke_tf.models import MultiTaskModel

# One per row of a table of items.
Names = Sequence[str] | np.ndarray

ALL = "all"
AS_TRAINED, MEAN_WEIGHTS = "as trained", "mean weights"
MAPS = ("pca", "tsne", "umap")
# Items of few impressions make a card if they are among the most frequent, which have this share of the impressions.
COMMON_ITEMS = 0.5
# What raises an expert lifts its share by at least this much of an equal share.
LEAST_LIFT = 0.1
# Items on a map: more of them hide one another, and t-SNE would take hours.
MOST_POINTS = 20_000


def gate_weights(study: Study, groupings: Iterable[Grouping] = ()) -> pd.DataFrame:
    """Mean gate weights over all impressions, and over each group of them.

    Args:
        study: Model and data.
        groupings: Groups of the rows of the tables that the study was given.

    Returns:
        One row per task, group and expert: `task`, `side` (`"item"` or `"user"`: whose group it is), `variable`,
        `group`, `expert`, `mean_weight` (sums to 1 over the experts of a task), `strongest` (share of the impressions
        in which the expert has the largest weight; ties count in parts) and `impressions`. All impressions are the
        group `"all"` of the variable `"all"` and of the side `"all"`. A group without impressions has no row.

    Raises:
        ConfigError: If the model has no gates.
        ValueError: If a grouping has another number of rows than the table of its side.
    """
    tables = []
    groupings = list(groupings)
    for gate in study.gates.values():
        counts = {(ALL, ALL, ALL): gate.counts}
        for grouping in groupings:
            inside = _inside(study, grouping)
            of_group = group_counts(inside, study.rows(gate.side), len(study.source(gate.side)))
            counts |= dict(zip(_keys(grouping), of_group, strict=True))
        for (side, variable, group), count in counts.items():
            if count.sum():
                use = gate.reweighted(count)
                tables.append(
                    pd.DataFrame(
                        {
                            "task": gate.task,
                            "side": side,
                            "variable": variable,
                            "group": group,
                            "expert": gate.experts,
                            "mean_weight": use.mean_weight,
                            "strongest": use.strongest,
                            "impressions": int(count.sum()),
                        }
                    )
                )
    return pd.concat(tables, ignore_index=True)


def _inside(study: Study, grouping: Grouping) -> np.ndarray:
    """`(n, groups)` bool: the groups in which each impression is."""
    expected = study.table_rows(grouping.side)
    if len(grouping.members) != expected:
        raise ValueError(
            f"Grouping {grouping.variable!r} must have a row for each {grouping.side} of the data, {expected}. "
            f"Received: {len(grouping.members)}"
        )
    return grouping.members[study.source(grouping.side)][study.rows(grouping.side)]


def _keys(grouping: Grouping) -> list[tuple[str, str, str]]:
    return [(grouping.side, grouping.variable, group) for group in grouping.groups]


def contribution_shares(study: Study, groupings: Iterable[Grouping] = ()) -> pd.DataFrame:
    """How much of the output of a task each expert makes, over all impressions, and over each group of them.

    Gate weights say what a gate does for the side that it reads; this also says for which entities of the other side an
    expert matters. See `Study.contribution_shares`.

    Args:
        study: A two-tower model and data.
        groupings: Groups of the rows of the tables that the study was given.

    Returns:
        As `gate_weights`, with `mean_share` (sums to 1 over the experts of a task) for `mean_weight` and `strongest`.
        Multi-class tasks have no rows.

    Raises:
        ConfigError: If the model has no gates.
        ValueError: If a grouping has another number of rows than the table of its side.
    """
    inside = {(ALL, ALL, ALL): np.ones(len(study), bool)}
    for grouping in groupings:
        inside |= dict(zip(_keys(grouping), _inside(study, grouping).T, strict=True))
    tables = [pd.DataFrame(columns=["task", "side", "variable", "group", "expert", "mean_share", "impressions"])]
    for task, shares in study.contribution_shares.items():
        tables += [
            pd.DataFrame(
                {
                    "task": task,
                    "side": side,
                    "variable": variable,
                    "group": group,
                    "expert": study.gates[task].experts,
                    "mean_share": shares[rows].mean(axis=0),
                    "impressions": int(rows.sum()),
                }
            )
            for (side, variable, group), rows in inside.items()
            if rows.any()
        ]
    return pd.concat(tables[1:] or tables, ignore_index=True)


def gate_entropy(study: Study) -> pd.DataFrame:
    """How evenly each gate spreads its weight, over all impressions.

    Two entropies: of the weights of one impression (does *each* listen to all experts?), averaged, and of the mean
    weights (are all experts used by *somebody*?). Their difference is how much the choice depends on the impression
    (the mutual information of impression and expert).

    Returns:
        One row per task with at least two experts: `task`, `experts`; `impression_entropy_bits`,
        `mean_weight_entropy_bits`, `information_bits`; as shares of the maximum, log2 of the number of experts:
        `impression_entropy_share`, `mean_weight_entropy_share`, `information_share`; `largest_mean_weight`;
        `weight_deviation` (standard deviation of a weight over impressions, largest of all experts); `impressions`.
    """
    return pd.DataFrame(
        [
            {
                "task": gate.task,
                "experts": len(gate.experts),
                **gate.entropies(),
                "largest_mean_weight": float(gate.mean_weight.max()),
                "weight_deviation": float(gate.deviation.max()),
                "impressions": int(gate.counts.sum()),
            }
            for gate in study.gates.values()
            if len(gate.experts) > 1
        ]
    )


def utilisation(study: Study, thresholds: Thresholds | None = None) -> pd.DataFrame:
    """How much each task uses each expert, over all impressions.

    Args:
        study: Model and data.
        thresholds: Say which expert is dead for a task.

    Returns:
        One row per task and expert: `task`, `expert`, `mean_weight`, `equal_share`, `strongest`, `dead`, `impressions`.
    """
    frame = gate_weights(study)[["task", "expert", "mean_weight", "strongest", "impressions"]]
    equal = 1.0 / frame.groupby("task")["expert"].transform("size")
    dead_weight = (thresholds or Thresholds()).dead_weight
    frame = frame.assign(equal_share=equal, dead=dead(frame["mean_weight"], frame["strongest"], equal, dead_weight))
    return frame[["task", "expert", "mean_weight", "equal_share", "strongest", "dead", "impressions"]]


def gate_effect(study: Study) -> pd.DataFrame:
    """What the choice of the gate, and each expert, is worth: the metric of a task after a change, nothing retrained.

    Changes: `"mean weights"`, every impression gets the gate's mean weights (what is lost is the worth of choosing);
    `"without expert e"`, its weight goes to the others in proportion (to all alike where it had everything).

    Args:
        study: A two-tower model and data; tasks without labels, and multi-class tasks, have no rows.

    Returns:
        One row per task and change, `"as trained"` first: `task`, `change`, `expert` (-1 where none is removed),
        `metric` (`"auc"`, or `"rmse"` of a regression or count task, in the unit of the label), `value`,
        `difference` to the model as trained, and `impressions`, those with a label. NaN where the metric is not
        defined, as an AUC of one class.

    Raises:
        ConfigError: If the model has no gates.
    """
    products, parts = {}, {}
    gates = {task: study.gates[task] for task in study.scores}
    for task, gate in gates.items():
        parts[task] = study.scores[task], gate.weights[study.rows(gate.side)]
        products[task] = np.sum(parts[task][0] * parts[task][1], axis=1)
    products |= study.products([task for task in study.model.ranked_tasks if task not in gates])
    rows = []
    for task, gate in gates.items():
        if task not in study.labels:
            continue
        scores, weights = parts[task]
        changes = {
            (AS_TRAINED, -1): weights,
            (MEAN_WEIGHTS, -1): np.broadcast_to(weights.mean(axis=0), weights.shape),
        }
        changes |= {(f"without expert {e}", e): _without(weights, k) for k, e in enumerate(gate.experts)}
        values = {
            change: _metric(study, task, products | {task: np.sum(scores * changed, axis=1)})
            for change, changed in changes.items()
        }
        trained = values[AS_TRAINED, -1]
        for (change, expert), value in values.items():
            rows.append(
                {
                    "task": task,
                    "change": change,
                    "expert": expert,
                    "metric": "auc" if study.model.kinds[task] == "binary" else "rmse",
                    "value": value,
                    "difference": value - trained,
                    "impressions": int(np.isfinite(study.labels[task]).sum()),
                }
            )
    columns = ("task", "change", "expert", "metric", "value", "difference", "impressions")
    return pd.DataFrame(rows, columns=columns)


def _without(weights: np.ndarray, expert: int) -> np.ndarray:
    rest = np.delete(weights, expert, axis=1)
    total = rest.sum(axis=1, keepdims=True)
    if not rest.shape[1]:
        return np.zeros_like(weights)
    rest = np.divide(rest, total, out=np.full_like(rest, 1.0 / rest.shape[1]), where=total > 0)
    return np.insert(rest, expert, 0.0, axis=1)


def _metric(study: Study, task: str, products: dict[str, np.ndarray]) -> float:
    outputs = study.model.outputs_of_products(products)
    labels = study.labels[task]
    known = np.isfinite(labels)
    if study.model.kinds[task] != "binary":
        values = ops.convert_to_numpy(study.model.predictions({task: outputs[task]})[task]).astype(np.float64)
        return math.sqrt(np.mean(np.square(values[known] - labels[known]))) if known.any() else math.nan
    # Logits order rows like probabilities, without rounding many of them to 1.
    return auc(labels[known], ops.convert_to_numpy(outputs[task]).astype(np.float64)[known])


def field_attention(study: Study) -> pd.DataFrame:
    """Which user fields each virtual kernel listens to, over all impressions.

    Returns:
        One row per kernel and field: `kernel`, `field`, `mean_attention` (sums to 1 over the fields), `deviation`
        (standard deviation over impressions), `entropy_share` (of the kernel: entropy of the attention of one
        impression, on average, as a share of its maximum) and `impressions`.

    Raises:
        ValueError: If the model has no virtual kernels.
    """
    attention, weight = study.attention.astype(np.float64), study.impressions("user")
    names = study.model.user_fields
    mean = np.average(attention, axis=0, weights=weight)
    deviation = np.sqrt(np.average(np.square(attention - mean), axis=0, weights=weight))
    bits = np.average(entropy_bits(attention.transpose(0, 2, 1)), axis=0, weights=weight)
    share = bits / np.log2(len(names)) if len(names) > 1 else np.ones_like(bits)
    rows = [
        {
            "kernel": kernel,
            "field": names[field],
            "mean_attention": mean[field, kernel],
            "deviation": deviation[field, kernel],
            "entropy_share": share[kernel],
            "impressions": len(study),
        }
        for kernel, field in product(range(mean.shape[1]), range(len(names)))
    ]
    return pd.DataFrame(rows)


def expert_similarity(study: Study) -> pd.DataFrame:
    """How alike the outputs of the experts are, over all impressions.

    Returns:
        One row per pair of experts: `expert_a`, `expert_b`; `cka`, the linear centred kernel alignment (1 where one is
        a rotation and scaling of the other: the same information); `correlation` of the centred outputs, entry by
        entry (1 where one is a positive multiple of the other: the same work). NaN for an expert whose output never
        changes.

    Raises:
        ValueError: If the model has no experts.

    Reference: Kornblith et al., ICML 2019, section 3.
    """
    weight = study.impressions("user") / len(study)
    outputs = study.expert_outputs.astype(np.float64)
    size = np.sqrt(np.tensordot(weight, np.square(outputs), axes=1).sum(axis=-1))
    outputs = outputs - np.tensordot(weight, outputs, axes=1)
    deviation = np.sqrt(np.tensordot(weight, np.square(outputs), axes=1).sum(axis=-1))
    # What is left of an output that never changes is rounding.
    outputs[:, deviation <= 1e-6 * size] = 0.0
    outputs *= np.sqrt(weight)[:, None, None]
    number = outputs.shape[1]
    cross, inner = np.empty((number, number)), np.empty((number, number))
    for a, b in product(range(number), repeat=2):
        covariance = outputs[:, a].T @ outputs[:, b]
        cross[a, b], inner[a, b] = np.sum(np.square(covariance)), np.trace(covariance)
    return _pairs_frame("expert", cka=_normalised(cross), correlation=_normalised(inner))


def kernel_similarity(model: MultiTaskModel) -> pd.DataFrame:
    """Cosine similarity of the virtual kernels.

    Returns:
        One row per pair of kernels: `kernel_a`, `kernel_b`, `cosine`, and the length of the first, `norm_a`.

    Raises:
        ValueError: If the model has no virtual kernels.
    """
    if not has_kernels(model):
        raise ValueError(f"Only MVKE has virtual kernels. Received: the model {model.name!r}")
    kernels = model.virtual_kernels.astype(np.float64)
    products = kernels @ kernels.T
    frame = _pairs_frame("kernel", cosine=_normalised(products))
    return frame.assign(norm_a=np.sqrt(np.diag(products))[frame["kernel_a"]])


def _normalised(products: np.ndarray) -> np.ndarray:
    """`products[a, b] / sqrt(products[a, a] products[b, b])`; NaN where that is 0 / 0."""
    scale = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    return np.divide(products, scale, out=np.full_like(products, np.nan), where=scale > 0)


def _pairs_frame(what: str, **values: np.ndarray) -> pd.DataFrame:
    first, second = np.indices(next(iter(values.values())).shape)
    columns = {f"{what}_a": first.ravel(), f"{what}_b": second.ravel()}
    return pd.DataFrame(columns | {name: array.ravel() for name, array in values.items()})


def kernel_cards(
    study: Study,
    weights: pd.DataFrame,
    shares: pd.DataFrame | None = None,
    names: Names | None = None,
    similarity: pd.DataFrame | None = None,
    effect: pd.DataFrame | None = None,
    most: int = 3,
) -> pd.DataFrame:
    """What each virtual kernel, or each expert of another model, stands for in each task.

    Items and users of the side that the gate reads raise its *weight*; those of the other side, of which the gate knows
    nothing, its *share of the output*.

    Args:
        study: Model and data.
        weights: As `gate_weights` makes it.
        shares: As `contribution_shares` makes it; without it the side that the gate does not read is left out.
        names: Name of each row of the table of items; by default there are no items in the cards.
        similarity: As `expert_similarity` makes it.
        effect: As `gate_effect` makes it.
        most: Most groups and items of a card.

    Returns:
        One row per task and expert: `task`, `expert`, `mean_weight`, `strongest`; `mean_share`, of the output (NaN if
        unknown); `metric` and `difference` of that metric without it (NaN if unknown); `most_similar`, the other expert
        of the task whose outputs have the highest CKA (-1 if unknown), and that `cka`; `items`, `item_groups` and
        `user_groups`, tuples of texts: where its mean weight or share is furthest above that over all impressions, and
        by a tenth of an equal share at least, with its value there and how many times the mean that is. Small groups
        are left out, and so are items of as few impressions beyond the most frequent, which have half of all.
    """
    read = study.model.gate_side
    frames = {read: weights.rename(columns={"mean_weight": "value"})}
    if shares is not None:
        frames["user" if read == "item" else "item"] = shares.rename(columns={"mean_share": "value"})
    rows = []
    for task, gate in study.gates.items():
        least = LEAST_LIFT / len(gate.experts)
        titles, item_values = [], np.empty((0, len(gate.experts)))
        if names is not None and "item" in frames and len(study.catalogue) > 1:
            item_rows, item_values = _common_items(study, gate)
            titles = [str(names[row]) for row in item_rows]
        for index, expert in enumerate(gate.experts):
            card: dict[str, Any] = {
                "task": task,
                "expert": expert,
                "mean_weight": gate.mean_weight[index],
                "strongest": gate.strongest[index],
                "mean_share": math.nan,
                "metric": "",
                "difference": math.nan,
                "most_similar": -1,
                "cka": math.nan,
                "items": (),
                "item_groups": (),
                "user_groups": (),
            }
            if effect is not None:
                removed = effect[(effect["task"] == task) & (effect["expert"] == expert)]
                card |= dict(removed[["metric", "difference"]].iloc[0]) if len(removed) else {}
            if similarity is not None:
                card |= _most_similar(similarity, expert, gate.experts)
            for side, frame in frames.items():
                own = frame[(frame["task"] == task) & (frame["expert"] == expert)]
                if own.empty:
                    continue
                mean, total = own.loc[own["variable"] == ALL, ["value", "impressions"]].iloc[0]
                if side != read:
                    card["mean_share"] = mean
                large = own[(own["side"] == side) & ~is_small(own["impressions"], total)]
                labels = large["variable"] + " " + large["group"]
                card[f"{side}_groups"] = _raised(labels.tolist(), large["value"].to_numpy(), mean, least, most)
                if side == "item":
                    card["items"] = _raised(titles, item_values[:, index], mean, least, most)
            rows.append(card)
    return pd.DataFrame(rows)


def _common_items(study: Study, gate: GateUse) -> tuple[np.ndarray, np.ndarray]:
    """Rows in their table of the items that make cards, `(m,)`, and of each expert the weight or the share, `(m, E)`.

    Shares where the gate does not read the item.
    """
    counts = study.impressions("item")
    descending = np.sort(counts[study.catalogue])[::-1]
    together = np.cumsum(descending)
    fewest = descending[np.searchsorted(together, COMMON_ITEMS * together[-1])]
    own = counts[study.catalogue]
    common = study.catalogue[(own >= max(fewest, 1)) | ~is_small(own, len(study))]
    if gate.side == "item":
        return study.source_items[common], gate.weights[common]
    if gate.task not in study.scores:
        return common[:0], gate.weights[:0]
    sums = [
        np.bincount(study.item_rows, weights=share, minlength=len(counts))
        for share in study.contribution_shares[gate.task].T
    ]
    return study.source_items[common], np.stack(sums, axis=1)[common] / counts[common, None]


def _raised(labels: Sequence[str], values: np.ndarray, mean: float, least: float, most: int) -> tuple[str, ...]:
    best = np.argsort(-values, kind="stable")[:most]
    return tuple(
        f"{labels[place]} ({values[place]:.2f}, {values[place] / mean:.1f}x)"
        for place in best
        if values[place] >= mean + least
    )


def _most_similar(similarity: pd.DataFrame, expert: int, experts: Sequence[int]) -> dict[str, Any]:
    others = [other for other in experts if other != expert]
    rows = similarity[(similarity["expert_a"] == expert) & similarity["expert_b"].isin(others)]
    rows = rows[rows["cka"].notna()]
    if rows.empty:
        return {}
    best = rows.loc[rows["cka"].idxmax()]
    return {"most_similar": int(best["expert_b"]), "cka": float(best["cka"])}


def item_map(study: Study, method: str = "pca", names: Names | None = None, seed: int = 0) -> pd.DataFrame:
    """Tag vectors of the items, and the virtual kernels where there are some, in one plane per task.

    The PCA is that of the items; kernels are projected into its plane. t-SNE and UMAP place both together.

    Args:
        study: Model and data; of a catalogue of more than `MOST_POINTS` items, those with the most impressions.
        method: `"pca"`, `"tsne"` or `"umap"` (needs the extra `umap`).
        names: Name of each row of the table of items; `item <row>` by default.
        seed: Seed of t-SNE and UMAP.

    Returns:
        One row per task and point: `task`, `kind` (`"item"` or `"kernel"`), `row` (of the item in its table, or index
        of the kernel), `label`, `x`, `y` (in PCA in the unit of the vectors), `impressions` (of an item), `share_x`,
        `share_y` (share of the variance of the items, PCA only).

    Raises:
        ConfigError: If there is no such method.
        MissingExtraError: If UMAP is not installed.
        ValueError: If the catalogue has fewer than two items.
    """
    if method not in MAPS:
        raise ConfigError(f"The map of the items must be one of {', '.join(MAPS)}. Received: {method!r}")
    impressions = study.impressions("item")
    items = study.catalogue
    if len(items) > MOST_POINTS:
        items = np.sort(items[np.argsort(-impressions[items], kind="stable")[:MOST_POINTS]])
    if len(items) < 2:
        raise ValueError(f"Expected at least two items to map. Received: {len(items)}")
    rows = study.source_items[items]
    labels = [f"item {row}" if names is None else str(names[row]) for row in rows]
    kernels = study.model.virtual_kernels if has_kernels(study.model) else None
    tables = []
    for task in study.model.task_names:
        tags = study.tags[task][items]
        chosen = [] if kernels is None else list(study.model.kernels_of(task))
        points, shares = _plane(tags, tags[:0] if kernels is None else kernels[chosen], method, seed)
        tables.append(
            pd.DataFrame(
                {
                    "task": task,
                    "kind": ["item"] * len(items) + ["kernel"] * len(chosen),
                    "row": [*rows, *chosen],
                    "label": [*labels, *(f"kernel {kernel}" for kernel in chosen)],
                    "x": points[:, 0],
                    "y": points[:, 1],
                    "impressions": [*impressions[items], *[0] * len(chosen)],
                    "share_x": shares[0],
                    "share_y": shares[1],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _plane(items: np.ndarray, kernels: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, Sequence[float]]:
    if items.shape[1] == 1:
        # A plane needs two axes; nothing lies along the second one.
        items, kernels = (np.pad(array, [(0, 0), (0, 1)]) for array in (items, kernels))
    together = np.concatenate([items, kernels])
    undefined = (np.nan, np.nan)
    if method == "pca":
        from sklearn.decomposition import PCA

        if (items == items[0]).all():
            # No variance to share: any plane will do.
            return (together - items[0])[:, :2], undefined
        pca = PCA(n_components=2, svd_solver="full").fit(items)
        return pca.transform(together), pca.explained_variance_ratio_
    if method == "tsne":
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        perplexity = min(30.0, (len(together) - 1) / 3)
        # One thread: sums in another order would give another map.
        with threadpool_limits(1):
            return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(together), undefined
    try:
        import umap
    except ImportError as error:
        raise MissingExtraError(
            f"The map 'umap' needs umap-learn: pip install 'mvke_tf[umap]', or choose 'tsne'. Received: {error}"
        ) from error
    neighbours = min(15, len(together) - 1)
    return umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(together), undefined


def analyze_expert_weights(model: MultiTaskModel, dataset: object) -> pd.DataFrame:
    """How much each task uses each expert: `utilisation` with the entropies of `gate_entropy`, in one call.

    Args:
        model: Any model with gates: a two-tower mixture of experts, or a plain MMoE.
        dataset: A `tf.data.Dataset` of (features, labels), `Interactions` or `Batches`.

    Returns:
        One row per task and expert, with the columns of both.

    Raises:
        ConfigError: If the model has no gates.
        ValueError: If the data do not fit it.
    """
    study = Study(model, dataset)
    return utilisation(study).merge(gate_entropy(study).drop(columns="impressions"), on="task", validate="many_to_one")
