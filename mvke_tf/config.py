"""Frozen settings of the data, the model and the training, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, TypeVar

T = TypeVar("T")

PROTOCOLS = ("impressions", "ratings")
SPLITS = ("temporal", "random", "per_user")
TASKS = ("ctr", "cvr", "rating")
CONVERSIONS = ("impressions", "clicked", "esmm")
OPTIMIZERS = ("adam", "adamw")
LOSS_WEIGHTINGS = ("fixed", "uncertainty")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
MODEL_NAMES = ("mvke", "mmoe", "cgc", "ple", "shared_bottom", "hard_sharing", "single_task")
# Rows of a comparison without a neural network.
BASELINE_NAMES = ("popularity", "lightgbm")
# What a command line can choose from, by section and setting.
CHOICES = {
    ("data", "protocol"): PROTOCOLS,
    ("data", "split"): SPLITS,
    ("model", "name"): MODEL_NAMES,
    ("model", "tasks"): TASKS,
    ("model", "conversion"): CONVERSIONS,
    ("training", "optimizer"): OPTIMIZERS,
    ("training", "loss_weighting"): LOSS_WEIGHTINGS,
    ("training", "precision"): PRECISIONS,
}


def from_dict(cls: type[T], values: Any) -> T:
    """Builds a settings dataclass from a dictionary, such as JSON gives.

    Raises:
        ValueError: If it is no dictionary, has a key that the dataclass does not know, or a value of another type than
            the default's.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is read from an object of settings. Received: {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {unknown}. Known settings: {sorted(fields)}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in given.items():
        default = fields[key].default
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is dataclasses.MISSING or default is None:
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"{cls.__name__}.{key} must be of the type of {default!r}. Received: {value!r}")
        if isinstance(value, tuple):
            element = entry_type(fields[key])
            kinds, kind = ((int, float), "number") if element is float else (element, element.__name__)
            if any(not isinstance(entry, kinds) or isinstance(entry, bool) for entry in value):
                raise ValueError(f"{cls.__name__}.{key} must be a list of {kind}s. Received: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{cls.__name__}.{key} must be finite. Received: {value!r}")
    return cls(**given)


def entry_type(field: dataclasses.Field) -> type:
    """The type of the entries of a setting that is a tuple."""
    return type(field.default[0]) if field.default else field.metadata["entries"]


def index_range(text: str) -> tuple[int, ...]:
    """Indices written as `"0-5"` (both ends included) or `"0,2,4-6"`.

    Raises:
        ValueError: If it is written in another way.

    >>> index_range("0-2,5")
    (0, 1, 2, 5)
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"Indices are written as 0-5 or 0,2,4-6. Received: {text!r}")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if any(part[0] > part[-1] for part in ends):
        raise ValueError(f"A range of indices goes up. Received: {text!r}")
    return tuple(index for part in ends for index in range(part[0], part[-1] + 1))


def _check(owner: object, name: str, valid: object, expected: str) -> None:
    if not valid:
        raise ValueError(f"{type(owner).__name__}.{name} must be {expected}. Received: {getattr(owner, name)!r}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How the interaction log becomes labelled, split pairs.

    Args:
        protocol: `"impressions"` or `"ratings"` (see `mvke_tf.data.protocols`).
        split: `"temporal"`, `"random"` or `"per_user"`.
        neg_ratio: Sampled negatives per impression (`"impressions"` only).
        unknown_rate: Share of the values of every single-valued feature but the user id that training replaces by
            "unknown", so that index 0 is learned.
        unknown_user_rate: The same of the user id. Most users of a temporal test part are new: the model must learn to
            do without the id.
        history_length: Slots of the lists of recent and of liked items.
        seed: Seed of the negatives and of the random split.
    """

    protocol: str = "impressions"
    split: str = "temporal"
    neg_ratio: int = 1
    unknown_rate: float = 0.05
    unknown_user_rate: float = 0.9
    history_length: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "protocol", self.protocol in PROTOCOLS, f"one of {PROTOCOLS}")
        _check(self, "split", self.split in SPLITS, f"one of {SPLITS}")
        _check(self, "neg_ratio", self.neg_ratio >= 0, "0 or more")
        _check(self, "unknown_rate", 0 <= self.unknown_rate <= 1, "in [0, 1]")
        _check(self, "unknown_user_rate", 0 <= self.unknown_user_rate <= 1, "in [0, 1]")
        _check(self, "history_length", self.history_length >= 1, "at least 1")
        _check(self, "seed", self.seed >= 0, "0 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
        name: Name of the model.
        tasks: Names of the tasks that it learns: `"ctr"` and `"cvr"` (classification), `"rating"` (regression).
        embedding_dim: Width D of field embeddings, virtual kernels and tags.
        hidden_dims: Widths of the hidden layers of every expert and of every tag tower.
        num_virtual_kernels: Number K of virtual kernels (MVKE).
        num_experts: Number E of experts (MMoE, CGC; PLE has so many per level).
        num_levels: Levels of extraction (PLE).
        task_kernels: The virtual kernels that each task may select, in the order of the tasks, as `("0-2", "1-4")`; by
            default they follow from the number of kernels (MVKE).
        task_experts: The experts that each task sees, as `("0-5", "2-9")`, the published MMoE baseline; by default all
            in MMoE, its own and the shared ones in CGC.
        shared_experts: Whether one network serves as expert of all virtual kernels (MVKE).
        gate_top_k: Experts (MVKE: virtual kernels) that keep gate weight in each row, those with the highest scores; 0
            keeps all. For mixtures of experts.
        balance_coefficient: Coefficient of the training loss that evens out the use of experts, for every gate the
            squared coefficient of variation of the experts' total weight in a batch (with `distinct`, over its distinct
            users or items and the rows that fill them up); 0 leaves it out. For mixtures of experts.
        dropout_rate: Dropout after every hidden layer.
        embedding_dropout_rate: Dropout of the field embeddings.
        kernel_stddev: Standard deviation of the first virtual kernels; published: 0.01.
        embedding_stddev: Standard deviation of the first embeddings; published: 0.01.
        attention_stddev: Standard deviation of the first projections of the attention of virtual kernels (MVKE);
            published: 0.01, with which the attention stays nearly flat on MovieLens.
        conversion: How CVR is learned: on all impressions as one probability (`"impressions"`), as p(conversion given
            click) on the clicked rows only (`"clicked"`), or over all impressions as p(click) p(conversion given click)
            (`"esmm"`). With the latter two, CVR comes out as that product if CTR is a task too.
    """

    name: str = "mvke"
    tasks: tuple[str, ...] = ("ctr", "cvr")
    embedding_dim: int = 64
    hidden_dims: tuple[int, ...] = (256, 128)
    num_virtual_kernels: int = 5
    num_experts: int = 10
    num_levels: int = 2
    task_kernels: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    task_experts: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    shared_experts: bool = False
    gate_top_k: int = 0
    balance_coefficient: float = 0.0
    dropout_rate: float = 0.3
    embedding_dropout_rate: float = 0.2
    kernel_stddev: float = 0.01
    embedding_stddev: float = 0.01
    attention_stddev: float = 0.01
    conversion: str = "impressions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        _check(self, "tasks", self.tasks and set(self.tasks) <= set(TASKS), f"some of {TASKS}")
        # The product reads the click before the conversion, and weights of tasks have one order.
        ordered = tuple(task for task in TASKS if task in self.tasks)
        _check(self, "tasks", self.tasks == ordered, f"different tasks in the order of {TASKS}")
        needed = {"impressions": set(), "clicked": {"cvr"}, "esmm": {"ctr", "cvr"}}
        _check(self, "conversion", self.conversion in CONVERSIONS, f"one of {CONVERSIONS}")
        _check(
            self,
            "conversion",
            needed[self.conversion] <= set(self.tasks),
            f"'impressions' unless the tasks have {sorted(needed[self.conversion])}, and they are {self.tasks}",
        )
        _check(self, "embedding_dim", self.embedding_dim >= 1, "at least 1")
        _check(self, "hidden_dims", all(width >= 1 for width in self.hidden_dims), "positive widths")
        _check(self, "num_virtual_kernels", self.num_virtual_kernels >= 1, "at least 1")
        _check(self, "num_experts", self.num_experts >= 1, "at least 1")
        _check(self, "num_levels", self.num_levels >= 1, "at least 1")
        for name, number in (("task_kernels", self.num_virtual_kernels), ("task_experts", self.num_experts)):
            ranges = tuple(getattr(self, name))
            object.__setattr__(self, name, ranges)
            _check(self, name, len(ranges) in (0, len(self.tasks)), f"left out, or one range for each of {self.tasks}")
            indices = [index_range(text) for text in ranges]
            _check(
                self,
                name,
                all(0 < len(seen) == len(set(seen)) and max(seen) < number for seen in indices),
                f"ranges of different indices below {number}",
            )
        _check(self, "gate_top_k", self.gate_top_k >= 0, "0 (all experts) or more")
        _check(self, "balance_coefficient", self.balance_coefficient >= 0, "0 or more")
        _check(self, "dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        _check(self, "embedding_dropout_rate", 0 <= self.embedding_dropout_rate < 1, "in [0, 1)")
        _check(self, "kernel_stddev", self.kernel_stddev > 0, "positive")
        _check(self, "embedding_stddev", self.embedding_stddev > 0, "positive")
        _check(self, "attention_stddev", self.attention_stddev > 0, "positive")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        epochs: Most epochs to train.
        batch_size: Pairs per step.
        learning_rate: Learning rate of the optimizer.
        optimizer: `"adam"` or `"adamw"`.
        weight_decay: Decoupled weight decay of AdamW, per step and learning rate.
        learning_rate_decay: Factor by which the learning rate falls after every step of epochs; 1 keeps it.
        learning_rate_decay_epochs: Epochs after which the learning rate falls once.
        clipnorm: Largest global norm of the gradients, to which larger ones are scaled down; 0 clips nothing.
        accumulation_steps: Batches whose gradients are averaged before the optimizer takes one step.
        loss_weighting: `"fixed"` sums the losses of the tasks with the task weights; `"uncertainty"` learns one
            log-variance per task (Kendall et al., CVPR 2018).
        task_weights: Weight of the loss of each task, in the order ctr, cvr, rating; 1 each by default.
        precision: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"` (with loss scaling); weights stay float32.
        xla: Whether XLA compiles the training step (TensorFlow; JAX always does). Needs deterministic to be off.
        steps_per_execution: Batches per call of the compiled training function; more of them save overhead.
        patience: Epochs without a better validation score after which training stops; 0 never stops early. The score
            is the mean AUC of the classification tasks, or minus the mean RMSE where there is none; with conversion
            clicked, CVR counts with its AUC over the clicked rows, so that scores of other conversions do not compare.
        deterministic: Whether the same seed gives the same weights to the last bit; costs speed on a GPU.
        distinct: Whether the towers run once per distinct user state and item of a batch.
        monitor_images_epochs: Epochs from one heat map of the gates in TensorBoard to the next; 0 draws none.
        seed: Seed of the weights, of dropout and of the order of the pairs.
    """

    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.01
    learning_rate_decay: float = 0.7
    learning_rate_decay_epochs: int = 1
    clipnorm: float = 0.0
    accumulation_steps: int = 1
    loss_weighting: str = "fixed"
    task_weights: tuple[float, ...] = dataclasses.field(default=(), metadata={"entries": float})
    precision: str = "float32"
    xla: bool = False
    steps_per_execution: int = 1
    patience: int = 3
    deterministic: bool = True
    distinct: bool = False
    monitor_images_epochs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, "epochs", self.epochs >= 1, "at least 1")
        _check(self, "batch_size", self.batch_size >= 1, "at least 1")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "positive and finite")
        _check(self, "learning_rate_decay", 0 < self.learning_rate_decay <= 1, "in (0, 1]")
        object.__setattr__(self, "task_weights", tuple(self.task_weights))
        _check(self, "optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}")
        _check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _check(self, "learning_rate_decay_epochs", self.learning_rate_decay_epochs >= 1, "at least 1")
        _check(self, "clipnorm", self.clipnorm >= 0, "0 or more")
        _check(self, "accumulation_steps", self.accumulation_steps >= 1, "at least 1")
        _check(self, "loss_weighting", self.loss_weighting in LOSS_WEIGHTINGS, f"one of {LOSS_WEIGHTINGS}")
        _check(
            self,
            "task_weights",
            all(0 <= weight < math.inf for weight in self.task_weights)
            and (not self.task_weights or any(self.task_weights)),
            "finite numbers, 0 or more each, not all 0",
        )
        _check(
            self,
            "task_weights",
            self.loss_weighting == "fixed" or not self.task_weights,
            "left out where loss_weighting='uncertainty' learns them",
        )
        _check(self, "precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")
        _check(
            self,
            "xla",
            not (self.xla and self.deterministic),
            "off where `deterministic` is on, for which Keras has no XLA; add --no-deterministic",
        )
        _check(self, "steps_per_execution", self.steps_per_execution >= 1, "at least 1")
        _check(self, "patience", self.patience >= 0, "0 or more")
        _check(self, "monitor_images_epochs", self.monitor_images_epochs >= 0, "0 or more")
        _check(self, "seed", 0 <= self.seed < 2**31, "in [0, 2**31)")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of one run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        weights, tasks = self.training.task_weights, self.model.tasks
        if weights and len(weights) != len(tasks):
            raise ValueError(f"`task_weights` needs a weight for each of the tasks {tasks}. Received: {weights}")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `RunConfig.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Reads what `to_dict` wrote; a setting that is absent keeps its default.

        Raises:
            ValueError: If a section or a setting is unknown.
        """
        if isinstance(values, dict):
            values = {
                key: from_dict(SECTIONS[key], value) if key in SECTIONS else value for key, value in values.items()
            }
        return from_dict(cls, values)


SECTIONS = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig}
