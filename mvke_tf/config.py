# SPDX-License-Identifier: Apache-2.0
"""Frozen settings of the model and the training, with a JSON round trip."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mvke_tf.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

# Version of the settings file of a run.
FORMAT = 2
# Of signatures.json in an export. 3: checksums of files, rows that do not depend on each other; 2: costs of signatures;
# `item_names` where 1, which had no number, had `titles`. All are read.
EXPORT_FORMAT = 3

OBJECTIVES = ("joint", "conditional", "marginal")
OPTIMIZERS = ("adam", "adamw")
# How the losses of the tasks are weighed; the last three balance losses or gradients in every step.
LOSS_WEIGHTINGS = ("fixed", "uncertainty", "famo", "pcgrad", "gradnorm")
BALANCED = LOSS_WEIGHTINGS[2:]
COUNTERFACTUALS = ("none", "ips", "dr")
EMBEDDING_OPTIMIZERS = ("same", "lazy_adam", "rowwise_adagrad")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
MODEL_NAMES = ("mvke", "mmoe", "cgc", "ple", "stem", "aitm", "resflow", "shared_bottom", "hard_sharing", "single_task")
# Rows of a comparison that are no two-tower models; the first ones are no neural networks either.
WITHOUT_NETWORK = ("popularity", "lightgbm")
BASELINE_NAMES = (*WITHOUT_NETWORK, "target_attention")
# What a command line can choose from, by section and setting.
CHOICES = {
    ("model", "name"): MODEL_NAMES,
    ("model", "objective"): OBJECTIVES,
    ("training", "optimizer"): OPTIMIZERS,
    ("training", "embedding_optimizer"): EMBEDDING_OPTIMIZERS,
    ("training", "loss_weighting"): LOSS_WEIGHTINGS,
    ("training", "counterfactual"): COUNTERFACTUALS,
    ("training", "precision"): PRECISIONS,
}
# Settings that earlier versions called otherwise; files and command lines may still do so.
OLD_NAMES = {
    "clipnorm": "global_clipnorm",
    "accumulation_steps": "gradient_accumulation_steps",
    "distinct": "deduplicate",
    "balance_coefficient": "load_balancing_weight",
    "kernel_stddev": "virtual_kernel_stddev",
    "conversion": "objective",
}
OLD_VALUES = {"conversion": {"impressions": "marginal", "clicked": "conditional", "esmm": "joint"}}

# Bounds that no sensible model reaches, so that a slip is an error and not an hour of allocating memory.
MOST_COUNT = 4096
MOST_WIDTH = 65_536
MOST_LAYERS = 64
MOST_BATCH = 2**24
MOST_EPOCHS = 1_000_000
MOST_STDDEV = 1000.0


def nearest(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word that is nearest to a wrong one; empty if none is near."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def renamed(name: str, value: Any) -> tuple[str, Any]:
    """A setting and its value as they are called now, from what an earlier version called them.

    >>> renamed("conversion", "esmm")
    ('objective', 'joint')
    """
    values = OLD_VALUES.get(name, {})
    return OLD_NAMES.get(name, name), values.get(value, value) if isinstance(value, str) else value


def from_dict(cls: type[T], values: Any) -> T:
    """Builds a settings dataclass from a dictionary, such as JSON gives. Old names of settings are understood.

    Raises:
        ConfigError: If it is no dictionary, has a key that the dataclass does not know, or a value of another type than
            the default's.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} is read from an object of settings. Received: {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name, value = (key, value) if key in fields else renamed(key, value)
        if name not in fields:
            raise ConfigError(
                f"{cls.__name__} has no setting {key!r}.{nearest(key, fields)} Known settings: {sorted(fields)}"
            )
        if name in given:
            raise ConfigError(f"{cls.__name__}.{name} is set twice, once by a former name. Received: {key!r}")
        given[name] = tuple(value) if isinstance(value, list) else value
    for key, value in given.items():
        _check_type(cls, fields[key], value)
    return cls(**given)


def _check_type(cls: type, field: dataclasses.Field, value: Any) -> None:
    """Raises `ConfigError` unless the value has the type of the default, where there is one."""
    default, name = field.default, f"{cls.__name__}.{field.name}"
    if default is dataclasses.MISSING or default is None:
        return
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        raise ConfigError(f"{name} must be of the type of {default!r}. Received: {value!r}")
    if isinstance(value, tuple):
        element = entry_type(field)
        kinds, kind = ((int, float), "number") if element is float else (element, element.__name__)
        if any(not isinstance(entry, kinds) or isinstance(entry, bool) for entry in value):
            raise ConfigError(f"{name} must be a list of {kind}s. Received: {value!r}")
    if isinstance(default, float) and not _is_finite(value):
        raise ConfigError(f"{name} must be finite. Received: {value!r}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # A whole number beyond the range of floating point.
        return False


def entry_type(field: dataclasses.Field) -> type:
    """The type of the entries of a setting that is a tuple."""
    default: Any = field.default
    return type(default[0]) if default else field.metadata["entries"]


def index_range(text: str, below: int = MOST_COUNT) -> tuple[int, ...]:
    """Indices written as `"0-5"` (both ends included) or `"0,2,4-6"`.

    Args:
        text: The indices.
        below: What each of them must be less than; nothing is expanded beyond it.

    Raises:
        ConfigError: If it is written in another way, an index is too large, or one is there twice.

    >>> index_range("0-2,5")
    (0, 1, 2, 5)
    """
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
        raise ConfigError(f"Indices are written as 0-5 or 0,2,4-6. Received: {_short(text)}")
    if any(len(number) > 9 for number in re.findall("[0-9]+", text)):
        raise ConfigError(f"Expected indices below {below}. Received: {_short(text)}")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if any(part[0] > part[-1] for part in ends):
        raise ConfigError(f"A range of indices goes up. Received: {_short(text)}")
    if max(part[-1] for part in ends) >= below:
        raise ConfigError(f"Expected indices below {below}. Received: {_short(text)}")
    # Of different indices below `below` there are at most so many, and no more are expanded.
    number = sum(part[-1] - part[0] + 1 for part in ends)
    indices = tuple(index for part in ends for index in range(part[0], part[-1] + 1)) if number <= below else ()
    if len(set(indices)) < number:
        raise ConfigError(f"Expected each index once. Received: {_short(text)}")
    return indices


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _check(owner: object, name: str, valid: object, expected: str) -> None:
    if not valid:
        raise ConfigError(f"{type(owner).__name__}.{name} must be {expected}. Received: {getattr(owner, name)!r}")


def _check_count(owner: object, name: str, least: int, most: int) -> None:
    value = getattr(owner, name)
    _check(owner, name, least <= value, "0 or more" if least == 0 else f"at least {least}")
    _check(owner, name, value <= most, f"at most {most}")


def _check_finite(owner: DataclassInstance) -> None:
    for field in dataclasses.fields(owner):
        if isinstance(field.default, float):
            _check(owner, field.name, _is_finite(getattr(owner, field.name)), "finite")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model.

    Args:
        name: Name of the model.
        tasks: Names of the tasks that it learns; by default those that the dataset declares as default.
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
        load_balancing_weight: Coefficient of the training loss that evens out the use of experts, for every gate the
            squared coefficient of variation of the experts' total weight in a batch (with `deduplicate`, over its
            distinct users or items and the rows that fill them up); 0 leaves it out. For mixtures of experts.
        dropout_rate: Dropout after every hidden layer.
        embedding_dropout_rate: Dropout of the field embeddings.
        virtual_kernel_stddev: Standard deviation of the first virtual kernels; published: 0.01.
        embedding_stddev: Standard deviation of the first embeddings; published: 0.01.
        attention_stddev: Standard deviation of the first projections of the attention of virtual kernels (MVKE);
            published: 0.01, with which the attention may stay nearly flat.
        objective: How tasks with an event before them (a conversion after a click) are learned, instead of what the
            dataset declares: over all rows as p(event) p(task given the event) (`"joint"`), as p(task given the event)
            on the rows with that event only (`"conditional"`), or over all rows as one probability (`"marginal"`).
            Empty: as declared.
    """

    name: str = "mvke"
    tasks: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    embedding_dim: int = 64
    hidden_dims: tuple[int, ...] = (256, 128)
    num_virtual_kernels: int = 5
    num_experts: int = 10
    num_levels: int = 2
    task_kernels: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    task_experts: tuple[str, ...] = dataclasses.field(default=(), metadata={"entries": str})
    shared_experts: bool = False
    gate_top_k: int = 0
    load_balancing_weight: float = 0.0
    dropout_rate: float = 0.3
    embedding_dropout_rate: float = 0.2
    virtual_kernel_stddev: float = 0.01
    embedding_stddev: float = 0.01
    attention_stddev: float = 0.01
    objective: str = ""

    def __post_init__(self) -> None:
        for name in ("tasks", "hidden_dims", "task_kernels", "task_experts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self, "tasks", all(self.tasks), "names")
        _check(self, "tasks", len(set(self.tasks)) == len(self.tasks), "different tasks")
        _check(self, "objective", self.objective in ("", *OBJECTIVES), f"empty (as declared) or one of {OBJECTIVES}")
        _check_finite(self)
        _check_count(self, "embedding_dim", 1, MOST_WIDTH)
        _check(self, "hidden_dims", all(width >= 1 for width in self.hidden_dims), "positive widths")
        _check(
            self, "hidden_dims", all(width <= MOST_WIDTH for width in self.hidden_dims), f"widths up to {MOST_WIDTH}"
        )
        _check(self, "hidden_dims", len(self.hidden_dims) <= MOST_LAYERS, f"at most {MOST_LAYERS} widths")
        _check_count(self, "num_virtual_kernels", 1, MOST_COUNT)
        _check_count(self, "num_experts", 1, MOST_COUNT)
        _check_count(self, "num_levels", 1, MOST_LAYERS)
        for name, number in (("task_kernels", self.num_virtual_kernels), ("task_experts", self.num_experts)):
            for text in getattr(self, name):
                try:
                    index_range(text, number)
                except ConfigError as error:
                    raise ConfigError(f"{type(self).__name__}.{name}: {error}") from error
        _check(self, "gate_top_k", self.gate_top_k >= 0, "0 (all experts) or more")
        _check_count(self, "gate_top_k", 0, MOST_COUNT)
        _check(self, "load_balancing_weight", self.load_balancing_weight >= 0, "0 or more")
        _check(self, "dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)")
        _check(self, "embedding_dropout_rate", 0 <= self.embedding_dropout_rate < 1, "in [0, 1)")
        for name in ("virtual_kernel_stddev", "embedding_stddev", "attention_stddev"):
            _check(self, name, getattr(self, name) > 0, "positive")
            _check(self, name, getattr(self, name) <= MOST_STDDEV, f"at most {MOST_STDDEV:g}")
        if self.tasks:
            self.check_tasks(self.tasks)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Does nothing if the settings that have one entry per task fit these tasks.

        Raises:
            ConfigError: If one has another number of entries.
        """
        for name in ("task_kernels", "task_experts"):
            fits = len(getattr(self, name)) in (0, len(tasks))
            _check(self, name, fits, f"left out, or one range for each of the tasks {tuple(tasks)}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        epochs: Most epochs to train.
        batch_size: Rows of the log per step.
        learning_rate: Learning rate of the optimizer.
        optimizer: `"adam"` or `"adamw"`.
        embedding_optimizer: How embedding tables are updated: every row in every step (`"same"`, by the optimizer), or
            only the rows that a batch touches, by `"lazy_adam"` or `"rowwise_adagrad"`, which costs the same however
            large the tables are; the latter keeps one number per row, not two per weight. They allow neither
            accumulated gradients nor mixed_float16.
        embedding_learning_rate: Learning rate of embedding tables under the last two, which falls with the other one; 0
            is that of the optimizer.
        weight_decay: Decoupled weight decay of AdamW, per step and learning rate.
        learning_rate_decay: Factor by which the learning rate falls after every step of epochs; 1 keeps it.
        learning_rate_decay_epochs: Epochs after which the learning rate falls once.
        global_clipnorm: Largest global norm of the gradients, to which larger ones are scaled down; 0 clips nothing.
        gradient_accumulation_steps: Batches whose gradients are averaged before the optimizer takes one step.
        loss_weighting: `"fixed"` sums the losses of the tasks with the task weights; `"uncertainty"` learns one
            log-variance per task (Kendall et al., CVPR 2018); `"famo"` (Liu et al., NeurIPS 2023), `"pcgrad"` (Yu et
            al., NeurIPS 2020) and `"gradnorm"` (Chen et al., ICML 2018) balance the tasks in every step, see
            `mvke_tf.layers.TaskBalance`.
        task_weights: Weight of the loss of each task, in the order of the tasks; 1 each by default.
        counterfactual: What is added to the losses of tasks with an event before them and the objective `"joint"`:
            nothing (`"none"`), or an estimate of the loss that p(task given the event) would have over all rows, by
            inverse propensity (`"ips"`) or doubly robust (`"dr"`; ESCM², Wang et al., SIGIR 2022), see
            `mvke_tf.layers.CounterfactualRisk`.
        counterfactual_weight: What that estimate is multiplied with.
        max_inverse_propensity: Largest factor by which a row with the event counts more in it.
        in_batch_weight: What is multiplied with, and added to the losses, how unlikely a softmax over the items of the
            batch makes the positive ones, of each binary task without an event before it; with logQ correction (Yi et
            al., RecSys 2019), see `mvke_tf.layers.InBatchSoftmax`. For retrieval; 0 adds nothing.
        precision: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"` (with loss scaling); weights stay float32.
        xla: Whether XLA compiles the training step (TensorFlow; JAX always does). Needs deterministic to be off.
        steps_per_execution: Batches per call of the compiled training function; more of them save overhead.
        patience: Epochs without a better validation score after which training stops; 0 never stops early. The score
            is the mean AUC of the binary tasks, or minus the mean RMSE where there is none; a task with the objective
            `"conditional"` counts with its AUC over the rows with the event before, so that scores of other objectives
            do not compare.
        deterministic: Whether the same seed gives the same weights to the last bit; costs speed on a GPU.
        deduplicate: Whether the towers run once per distinct user state and item of a batch. The rows of one user state
            then stay in one batch, or in two that follow one another.
        checkpoint_steps: Batches after which the state is kept within an epoch too, so that no more than these are
            lost; 0 keeps it after each epoch only.
        monitor_images_epochs: Epochs from one heat map of the gates in TensorBoard to the next; 0 draws none.
        seed: Seed of the weights, of dropout and of the order of the rows.
    """

    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    embedding_optimizer: str = "same"
    embedding_learning_rate: float = 0.0
    weight_decay: float = 0.01
    learning_rate_decay: float = 0.7
    learning_rate_decay_epochs: int = 1
    global_clipnorm: float = 0.0
    gradient_accumulation_steps: int = 1
    loss_weighting: str = "fixed"
    task_weights: tuple[float, ...] = dataclasses.field(default=(), metadata={"entries": float})
    counterfactual: str = "none"
    counterfactual_weight: float = 0.5
    max_inverse_propensity: float = 15.0
    in_batch_weight: float = 0.0
    precision: str = "float32"
    xla: bool = False
    steps_per_execution: int = 1
    patience: int = 3
    deterministic: bool = True
    deduplicate: bool = True
    checkpoint_steps: int = 0
    monitor_images_epochs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_weights", tuple(self.task_weights))
        _check_finite(self)
        _check_count(self, "epochs", 1, MOST_EPOCHS)
        _check_count(self, "batch_size", 1, MOST_BATCH)
        _check(self, "learning_rate", self.learning_rate > 0, "positive")
        _check(self, "learning_rate_decay", 0 < self.learning_rate_decay <= 1, "in (0, 1]")
        _check(self, "optimizer", self.optimizer in OPTIMIZERS, f"one of {OPTIMIZERS}")
        _check(
            self,
            "embedding_optimizer",
            self.embedding_optimizer in EMBEDDING_OPTIMIZERS,
            f"one of {EMBEDDING_OPTIMIZERS}",
        )
        _check(self, "embedding_learning_rate", self.embedding_learning_rate >= 0, "0 (learning_rate) or more")
        _check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _check_count(self, "learning_rate_decay_epochs", 1, MOST_EPOCHS)
        _check(self, "global_clipnorm", self.global_clipnorm >= 0, "0 or more")
        _check_count(self, "gradient_accumulation_steps", 1, MOST_WIDTH)
        _check(self, "loss_weighting", self.loss_weighting in LOSS_WEIGHTINGS, f"one of {LOSS_WEIGHTINGS}")
        _check(
            self,
            "task_weights",
            all(_is_finite(weight) and weight >= 0 for weight in self.task_weights)
            and (not self.task_weights or any(self.task_weights)),
            "finite numbers, 0 or more each, not all 0",
        )
        _check(
            self,
            "task_weights",
            self.loss_weighting == "fixed" or not self.task_weights,
            f"left out where loss_weighting={self.loss_weighting!r} weighs the tasks",
        )
        _check(self, "counterfactual", self.counterfactual in COUNTERFACTUALS, f"one of {COUNTERFACTUALS}")
        _check(
            self,
            "counterfactual",
            self.counterfactual == "none" or self.loss_weighting not in BALANCED,
            f"none with loss_weighting={self.loss_weighting!r}, which balances the losses of the tasks alone",
        )
        _check(self, "in_batch_weight", self.in_batch_weight >= 0, "0 or more")
        _check(
            self,
            "in_batch_weight",
            not self.in_batch_weight or self.loss_weighting not in BALANCED,
            f"0 with loss_weighting={self.loss_weighting!r}, which balances the losses of the tasks alone",
        )
        _check(self, "counterfactual_weight", self.counterfactual_weight > 0, "positive")
        _check(self, "max_inverse_propensity", self.max_inverse_propensity >= 1, "1 or more")
        _check(
            self,
            "precision",
            self.loss_weighting not in BALANCED or self.precision != "mixed_float16",
            f"float32 or mixed_bfloat16 with loss_weighting={self.loss_weighting!r}, which reads gradients unscaled",
        )
        _check(
            self,
            "gradient_accumulation_steps",
            self.loss_weighting != "famo" or self.gradient_accumulation_steps == 1,
            "1 with loss_weighting='famo', which compares the losses before and after every step",
        )
        _check(self, "precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")
        if self.embedding_optimizer != "same":
            rows = f"where embedding_optimizer={self.embedding_optimizer!r} updates single rows"
            _check(
                self,
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps == 1,
                f"1 {rows}; a larger batch_size takes its place",
            )
            _check(self, "precision", self.precision != "mixed_float16", f"float32 or mixed_bfloat16 {rows}")
            _check(self, "loss_weighting", self.loss_weighting not in BALANCED, f"fixed or uncertainty {rows}")
        _check(
            self,
            "xla",
            not (self.xla and self.deterministic),
            "off where `deterministic` is on, for which Keras has no XLA; add --no-deterministic",
        )
        _check_count(self, "steps_per_execution", 1, MOST_WIDTH)
        _check_count(self, "patience", 0, MOST_EPOCHS)
        _check_count(self, "checkpoint_steps", 0, MOST_EPOCHS)
        _check_count(self, "monitor_images_epochs", 0, MOST_EPOCHS)
        _check(self, "seed", 0 <= self.seed < 2**31, "in [0, 2**31)")

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Does nothing if the settings that have one entry per task fit these tasks.

        Raises:
            ConfigError: If one has another number of entries.
        """
        fits = len(self.task_weights) in (0, len(tasks))
        _check(self, "task_weights", fits, f"left out, or a weight for each of the tasks {tuple(tasks)}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of one run."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        if self.model.tasks:
            self.check_tasks(self.model.tasks)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Does nothing if every setting that has one entry per task fits these tasks.

        Raises:
            ConfigError: If one has another number of entries.
        """
        self.model.check_tasks(tasks)
        self.training.check_tasks(tasks)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; `RunConfig.from_dict` reads it back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, `{"section.setting": value}`."""
        return {
            f"{section}.{field.name}": getattr(getattr(self, section), field.name)
            for section, cls in SECTIONS.items()
            for field in dataclasses.fields(cls)
            if getattr(getattr(self, section), field.name) != field.default
        }

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """Reads what `to_dict` wrote; a section or setting that is absent keeps its default, and so does the format.

        Raises:
            ConfigError: If a section or a setting is unknown or invalid, or the format is another one.
        """
        if isinstance(values, dict):
            version = values.get("format", FORMAT)
            if version != FORMAT:
                raise ConfigError(f"Expected settings of format {FORMAT}. Received: format {version!r}")
            if "data" in values:
                raise ConfigError(
                    "Settings have no section 'data' any more: a TOML file, which --data names, declares the dataset. "
                    "Leave the section out."
                )
            values = {
                key: from_dict(SECTIONS[key], value) if key in SECTIONS else value
                for key, value in values.items()
                if key != "format"
            }
        return from_dict(cls, values)


SECTIONS = {"model": ModelConfig, "training": TrainingConfig}
