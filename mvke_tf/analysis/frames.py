"""Tidy frames of what the gates and experts of a model do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import keras
import numpy as np
import pandas as pd

from mvke_tf.analysis.study import Study, gate_tensors, has_kernels, user_fields
from mvke_tf.data.groups import Grouping, group_counts
from mvke_tf.gate_statistics import DEAD_WEIGHT, dead, entropies, entropy_bits, strongest
from mvke_tf.models.two_tower import task_names

ALL = "all"


def gate_weights(study: Study, groupings: Iterable[Grouping] = ()) -> pd.DataFrame:
    """Mean gate weights over all impressions, and over each group of them.

    Args:
        study: Model and data.
        groupings: Groups of the rows of the tables that the study was given.

    Returns:
        One row per task, group and expert: `task`, `variable`, `group`, `expert`, `mean_weight` (sums to 1 over the
        experts of a task), `strongest` (share of the impressions in which the expert has the largest weight; ties
        count in parts) and `impressions`. All impressions are the group `"all"` of the variable `"all"`. A group
        without impressions has no row.

    Raises:
        ValueError: If the model has no gates, or a grouping has another number of rows than the data.
    """
    frames = []
    groupings = list(groupings)
    for gate in study.gates.values():
        largest = strongest(gate.weights)
        counts = {(ALL, ALL): study.impressions(gate.side)}
        for grouping in groupings:
            counts |= _group_counts(study, gate.side, grouping)
        for (variable, group), count in counts.items():
            if count.sum():
                frames.append(
                    pd.DataFrame(
                        {
                            "task": gate.task,
                            "variable": variable,
                            "group": group,
                            "expert": gate.experts,
                            "mean_weight": np.average(gate.weights, axis=0, weights=count),
                            "strongest": np.average(largest, axis=0, weights=count),
                            "impressions": int(count.sum()),
                        }
                    )
                )
    return pd.concat(frames, ignore_index=True)


def _group_counts(study: Study, side: str, grouping: Grouping) -> dict[tuple[str, str], np.ndarray]:
    """Impressions of each entity of `side` in each group."""
    members = grouping.members
    expected = study.size("item") if grouping.side == "item" else 1 + int(study.source_users.max())
    if len(members) < expected or (grouping.side == "item" and len(members) != expected):
        raise ValueError(
            f"Grouping {grouping.variable!r} must have a row for each {grouping.side} of the data, {expected}. "
            f"Received: {len(members)}"
        )
    if grouping.side == "user":
        members = members[study.source_users]
    counts = group_counts(members[study.rows(grouping.side)], study.rows(side), study.size(side))
    return {(grouping.variable, group): count for group, count in zip(grouping.groups, counts, strict=True)}


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
    rows = []
    for gate in study.gates.values():
        if len(gate.experts) == 1:
            continue
        count = study.impressions(gate.side)
        mean = np.average(gate.weights, axis=0, weights=count)
        variance = np.average(np.square(gate.weights - mean), axis=0, weights=count)
        rows.append(
            {
                "task": gate.task,
                "experts": len(gate.experts),
                **entropies(gate.weights, count),
                "largest_mean_weight": float(mean.max()),
                "weight_deviation": float(np.sqrt(variance.max())),
                "impressions": int(count.sum()),
            }
        )
    return pd.DataFrame(rows)


def utilisation(study: Study, dead_weight: float = DEAD_WEIGHT) -> pd.DataFrame:
    """How much each task uses each expert, over all impressions.

    Args:
        study: Model and data.
        dead_weight: An expert is dead for a task if it is never the strongest, and its mean weight is below this
            share of an equal share `1 / experts`.

    Returns:
        One row per task and expert: `task`, `expert`, `mean_weight`, `equal_share`, `strongest`, `dead`, `impressions`.
    """
    frame = gate_weights(study)[["task", "expert", "mean_weight", "strongest", "impressions"]]
    equal = 1.0 / frame.groupby("task")["expert"].transform("size")
    frame = frame.assign(equal_share=equal, dead=dead(frame["mean_weight"], frame["strongest"], equal, dead_weight))
    return frame[["task", "expert", "mean_weight", "equal_share", "strongest", "dead", "impressions"]]


def field_attention(study: Study) -> pd.DataFrame:
    """Which user fields each virtual kernel listens to, over all impressions.

    Returns:
        One row per kernel and field: `kernel`, `field`, `mean_attention` (sums to 1 over the fields), `deviation`
        (standard deviation over impressions), `entropy_share` (of the kernel: entropy of the attention of one
        impression, on average, as a share of its maximum) and `impressions`.

    Raises:
        ValueError: If the model has no virtual kernels.
    """
    names, weight = user_fields(study.model), study.impressions("user")
    attention = study.attention.astype(np.float64)
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
        ValueError: If the model has no gates, or its experts cannot be reached.

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


def kernel_similarity(model: keras.Model) -> pd.DataFrame:
    """Cosine similarity of the virtual kernels.

    Returns:
        One row per pair of kernels: `kernel_a`, `kernel_b`, `cosine`, and the length of the first, `norm_a`.

    Raises:
        ValueError: If the model has no virtual kernels.
    """
    kernels = virtual_kernels(model).astype(np.float64)
    products = kernels @ kernels.T
    frame = _pairs_frame("kernel", cosine=_normalised(products))
    return frame.assign(norm_a=np.sqrt(np.diag(products))[frame["kernel_a"]])


def virtual_kernels(model: keras.Model) -> np.ndarray:
    """The table of virtual kernels, `(K, D)`.

    Raises:
        ValueError: If the model has none.
    """
    if not has_kernels(model):
        raise ValueError(f"Only MVKE has virtual kernels. Received: the model {model.name!r}")
    return keras.ops.convert_to_numpy(model.get_layer("virtual_kernels").kernels)


def _normalised(products: np.ndarray) -> np.ndarray:
    """`products[a, b] / sqrt(products[a, a] products[b, b])`; NaN where that is 0 / 0."""
    scale = np.sqrt(np.outer(np.diag(products), np.diag(products)))
    return np.divide(products, scale, out=np.full_like(products, np.nan), where=scale > 0)


def _pairs_frame(what: str, **values: np.ndarray) -> pd.DataFrame:
    first, second = np.indices(next(iter(values.values())).shape)
    columns = {f"{what}_a": first.ravel(), f"{what}_b": second.ravel()}
    return pd.DataFrame(columns | {name: array.ravel() for name, array in values.items()})


MAPS = ("pca", "tsne", "umap")


def item_map(study: Study, method: str = "pca", titles: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """Tag vectors of all items, and the virtual kernels where there are some, in one plane per task.

    The PCA is that of the items; kernels are projected into its plane. t-SNE and UMAP place both together.

    Args:
        study: Model and data.
        method: `"pca"`, `"tsne"` or `"umap"` (needs the extra `umap`).
        titles: Name of each item; its row by default.
        seed: Seed of t-SNE and UMAP.

    Returns:
        One row per task and point: `task`, `kind` (`"item"` or `"kernel"`), `row` (of the item, or index of the
        kernel), `label`, `x`, `y` (in PCA in the unit of the vectors), `impressions` (of an item), `share_x`, `share_y`
        (share of the variance of the items, PCA only).

    Raises:
        ValueError: If there is no such method, or UMAP is not installed.
    """
    kernels, seen = np.zeros((0, 0)), {}
    if has_kernels(study.model):
        kernels = virtual_kernels(study.model)
        seen = {task: list(gate.experts) for task, gate in study.gates.items()}
    names = np.arange(study.size("item")).astype(str) if titles is None else np.asarray(titles, str)
    frames = []
    for task in task_names(study.model):
        tags, chosen = study.tags[task], seen.get(task, [])
        points, shares = _plane(tags, kernels[chosen] if chosen else tags[:0], method, seed)
        frames.append(
            pd.DataFrame(
                {
                    "task": task,
                    "kind": ["item"] * len(tags) + ["kernel"] * len(chosen),
                    "row": [*range(len(tags)), *chosen],
                    "label": [*names, *(f"kernel {kernel}" for kernel in chosen)],
                    "x": points[:, 0],
                    "y": points[:, 1],
                    "impressions": [*study.impressions("item"), *[0] * len(chosen)],
                    "share_x": shares[0],
                    "share_y": shares[1],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _plane(items: np.ndarray, kernels: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, Sequence[float]]:
    together = np.concatenate([items, kernels])
    undefined = (np.nan, np.nan)
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(n_components=2, svd_solver="full").fit(items)
        return pca.transform(together), pca.explained_variance_ratio_
    if method == "tsne":
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        perplexity = min(30.0, (len(together) - 1) / 3)
        # One thread: sums in another order would give another map.
        with threadpool_limits(1):
            return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(together), undefined
    if method == "umap":
        try:
            import umap
        except ImportError as error:
            raise ValueError(
                f"The map 'umap' needs umap-learn: pip install '.[umap]', or choose 'tsne'. Received: {error}"
            ) from error
        neighbours = min(15, len(together) - 1)
        return umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(together), undefined
    raise ValueError(f"`method` must be one of {MAPS}. Received: {method!r}")


def analyze_expert_weights(model: keras.Model, dataset: object) -> pd.DataFrame:
    """How much each task uses each expert: `utilisation` with the entropies of `gate_entropy`, in one call.

    Args:
        model: Any model with gates: a two-tower mixture of experts, or a dense MMoE.
        dataset: A `tf.data.Dataset` of (features, labels), a `PairData` or `Batches`.

    Returns:
        One row per task and expert, with the columns of both.

    Raises:
        ValueError: If the model has no gates, or the data do not fit it.
    """
    gate_tensors(model)
    study = Study(model, dataset)
    return utilisation(study).merge(gate_entropy(study).drop(columns="impressions"), on="task", validate="many_to_one")
