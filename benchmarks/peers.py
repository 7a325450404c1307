# SPDX-License-Identifier: Apache-2.0
"""Trains a model of another library, for `benchmarks/suite.py --sections peers`, in an environment of its own.

    python benchmarks/peers.py MODEL FILE    # then lines "BATCH_SIZE ROWS" on the standard input, until it ends

FILE is what `suite.peers` has written. Each line trains on the first rows and answers with the seconds of CPU
that it took. Whatever can be done before is not counted: columns are tensors of the library already, and in order.

The models have the sizes of ours: embeddings of 64, hidden layers of 256 and 128, ten experts, dropout of 0.3.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Trains one epoch on the first rows, in batches of this many.
Train = Callable[[int, int], None]
DIM, HIDDEN, EXPERTS, DROPOUT, KERNELS = 64, (256, 128), 10, 0.3, ((0, 1, 2), (1, 2, 3, 4))


@dataclasses.dataclass(frozen=True)
class Field:
    """A column of one side: indices into a table of so many rows, `(n,)` or a list of them, or a dense vector."""

    name: str
    side: str
    kind: str
    width: int
    table: str
    rows: int


@dataclasses.dataclass(frozen=True)
class Log:
    """Fields, their columns `(n,)` or `(n, width)` with `<list>_weights`, and labels of two tasks `(n,)`."""

    fields: tuple[Field, ...]
    columns: dict[str, np.ndarray]
    labels: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, file: str) -> Log:
        with np.load(file) as held:
            columns = {name: held[name] for name in held.files}
        fields = tuple(Field(**field) for field in json.loads(str(columns.pop("fields"))))
        return cls(fields, columns, (columns.pop("label_0"), columns.pop("label_1")))

    def torch_batches(self, batch_size: int, rows: int) -> Iterator[tuple[dict[str, Any], Any]]:
        """Whole batches of columns, and of labels `(B, 2)`."""
        import torch

        columns = {name: torch.from_numpy(column) for name, column in self.columns.items()}
        labels = torch.from_numpy(np.stack(self.labels, 1))
        for start in range(0, rows - batch_size + 1, batch_size):
            batch = slice(start, start + batch_size)
            yield {name: column[batch] for name, column in columns.items()}, labels[batch]


def looped_mvke(log: Log) -> Train:
    """MVKE in PyTorch as it is usually written: a loop over virtual kernels, every row by itself."""
    import torch
    from torch import nn

    def mlp(width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for units in HIDDEN:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, DIM))

    class Fields(nn.Module):
        """Embeddings of the fields of one side, `(B, F, D)`; a list is the weighted mean of its entries."""

        def __init__(self, side: str, tables: nn.ModuleDict):
            super().__init__()
            self.fields, self.tables = [field for field in log.fields if field.side == side], tables
            self.dense = nn.ModuleDict({f.name: nn.Linear(f.width, DIM) for f in self.fields if f.kind == "dense"})

        def forward(self, x: dict[str, Any]) -> Any:
            vectors = []
            for field in self.fields:
                if field.kind == "dense":
                    vectors.append(self.dense[field.name](x[field.name]))
                    continue
                entries = self.tables[field.table](x[field.name])
                if field.kind == "list":
                    weights = x[f"{field.name}_weights"].unsqueeze(-1)
                    entries = (entries * weights).sum(1) / weights.sum(1)
                vectors.append(entries)
            return torch.stack(vectors, 1)

    class MVKE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            count = 1 + max(map(max, KERNELS))
            self.tables = nn.ModuleDict({f.table: nn.Embedding(f.rows, DIM) for f in log.fields if f.kind != "dense"})
            self.user, self.item = Fields("user", self.tables), Fields("item", self.tables)
            self.kernels = nn.Parameter(torch.randn(count, DIM) * 0.01)
            self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
            self.norm = nn.LayerNorm(DIM, eps=1e-12)
            self.experts = nn.ModuleList(mlp(len(self.user.fields) * DIM) for _ in range(count))
            self.tags = nn.ModuleList(mlp(len(self.item.fields) * DIM) for _ in KERNELS)

        def forward(self, x: dict[str, Any]) -> Any:
            fields, item = self.user(x), self.item(x).flatten(1)
            keys, values, outputs = self.key(fields), self.value(fields), []
            for kernel, expert in zip(self.query(self.kernels), self.experts, strict=True):
                attention = torch.softmax(keys @ kernel / DIM**0.5, dim=1).unsqueeze(-1)
                outputs.append(expert(self.norm(attention * values + fields).flatten(1)))
            logits = []
            for seen, tower in zip(KERNELS, self.tags, strict=True):
                tag = tower(item)
                gate = torch.softmax(tag @ self.kernels[list(seen)].T, dim=1)
                user = sum(gate[:, [n]] * outputs[kernel] for n, kernel in enumerate(seen))
                logits.append((user * tag).sum(1))
            return torch.stack(logits, 1)

    model = MVKE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_of = nn.BCEWithLogitsLoss()

    def train(batch_size: int, rows: int) -> None:
        model.train()
        for inputs, labels in log.torch_batches(batch_size, rows):
            logits = model(inputs)
            loss = sum(loss_of(logits[:, n], labels[:, n]) for n in range(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def torch_rechub(log: Log, model_name: str) -> Train:
    """MMOE and PLE of torch-rechub, through its trainer; a list is the plain mean of its entries."""
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE, PLE
    from torch_rechub.trainers import MTLTrainer

    features: list[Any] = []
    for field in log.fields:
        shared = None if field.table == field.name else field.table
        if field.kind == "dense":
            features.append(DenseFeature(field.name, field.width))
        elif field.kind == "index":
            features.append(SparseFeature(field.name, field.rows, DIM, shared_with=shared))
        else:
            features.append(SequenceFeature(field.name, field.rows, DIM, shared_with=shared, padding_idx=0))
    experts = {"dims": list(HIDDEN), "activation": "relu", "dropout": DROPOUT}
    towers = [{"dims": [], "activation": "relu", "dropout": DROPOUT}] * 2
    types = ["classification", "classification"]
    if model_name == "mmoe":
        model = MMOE(features, types, EXPERTS, experts, towers)
    else:
        model = PLE(features, types, 2, 3, 4, experts, towers)
    trainer = MTLTrainer(model, types, optimizer_params={"lr": 1e-3}, n_epoch=1, device="cpu", model_path=os.devnull)

    def train(batch_size: int, rows: int) -> None:
        # An epoch of its `fit`, without its data loader, which makes batches row by row.
        trainer.train_one_epoch(log.torch_batches(batch_size, rows))

    return train


def deepctr(log: Log) -> Train:
    """MMOE of DeepCTR, which is Keras 2, through `fit`."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from deepctr.feature_column import DenseFeat, SparseFeat, VarLenSparseFeat
    from deepctr.models import MMOE

    features: list[Any] = []
    for field in log.fields:
        if field.kind == "dense":
            features.append(DenseFeat(field.name, field.width))
            continue
        feature = SparseFeat(field.name, field.rows, DIM, embedding_name=field.table)
        if field.kind == "list":
            weights = {"weight_name": f"{field.name}_weights", "weight_norm": False}
            feature = VarLenSparseFeat(feature, field.width, combiner="mean", **weights)
        features.append(feature)
    model = MMOE(features, EXPERTS, HIDDEN, (), dnn_dropout=DROPOUT, task_names=("first", "second"))
    model.compile("adam", "binary_crossentropy")
    # It declares single values and weights as (n, 1) and (n, length, 1).
    unchanged = {field.name for field in log.fields if field.kind != "index"}
    inputs = {name: column if name in unchanged else column[..., None] for name, column in log.columns.items()}

    def train(batch_size: int, rows: int) -> None:
        rows -= rows % batch_size
        given, labels = {name: column[:rows] for name, column in inputs.items()}, [y[:rows] for y in log.labels]
        model.fit(given, labels, batch_size=batch_size, shuffle=False, verbose=0)

    return train


MODELS: dict[str, Callable[[Log], Train]] = {
    "mvke of torch": looped_mvke,
    "mmoe of torch-rechub": lambda log: torch_rechub(log, "mmoe"),
    "ple of torch-rechub": lambda log: torch_rechub(log, "ple"),
    "mmoe of deepctr": deepctr,
}


def main() -> None:
    name, file = sys.argv[1:]
    # The output is answers; what libraries print goes elsewhere.
    answers, sys.stdout = sys.stdout, sys.stderr
    train = MODELS[name](Log.of(file))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        batch_size, rows = map(int, line.split())
        started = time.process_time()
        train(batch_size, rows)
        print(time.process_time() - started, file=answers, flush=True)


if __name__ == "__main__":
    main()
