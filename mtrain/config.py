"""What a run is: typed, documented, validated. One YAML file, overridden key by key on the command line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mtrain.components import Spec, first_problem, worst
from mtrain.errors import UserError, nearest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        given = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in given) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("expected another type than true or false")
        return value


class DataConfig(Section):
    """Where the table is and how its labels come."""

    path: str | list[str] | dict[str, str | list[str]] = ""
    """File, list of files, files by split name (`{train: a.csv, test: b.csv}`), glob, folder, hub id, or
    `python:package.module.function` that returns a table (`function(rows=100)` gives it arguments); relative files are
    looked for in `root`, in the working directory, then beside the config. files: a folder or glob in which each file is a
    task."""
    layout: Literal["grid", "routed", "pairs", "files"]
    """grid: a column per task; routed: a task column, each row belongs to one task; pairs: (key, task, label) rows;
    files: a data set for each task."""
    table: str | None = None
    """files: a CSV, Parquet, YAML or JSON file with a row for each task: name, kind, data, config, split, format, inputs,
    label, weight."""
    streaming: bool | Literal["auto"] = "auto"
    """Read inputs from the files by the chunk while training (true), or memory-map them first (false); auto: true for local
    files that are together larger than 2 GB."""
    memory_gb: float = Field(2.0, gt=0, le=1e6)
    """Memory for encoded inputs: where all of them take more, or stream, they are read by the chunk, and what fits stays."""
    chunk_rows: int = Field(4096, ge=1)
    """Rows that are read by the chunk, and shuffled, together; a row group of a Parquet file is never divided."""
    fit_rows: int = Field(100_000, ge=1)
    """Inputs by the chunk: at least so many training rows (or all) are read to fit scalers and vocabularies."""
    retries: int = Field(3, ge=0)
    """How often a failed read is tried again, after growing delays."""
    on_error: Literal["stop", "skip_task"] = "stop"
    """files: what a task does whose data cannot be read: stop the run, or be left out and counted."""
    root: str | None = None
    """Folder of relative paths; default $MTRAIN_DATA, else the working directory."""
    format: Literal["csv", "json", "parquet", "arrow"] | None = None
    """Default: by the file's ending."""
    name: str | None = None
    """Configuration of a hub data set."""
    source_split: str | None = None
    """Split of a hub data set, `train+test` joins two; default: all of them."""
    in_memory: bool = False
    """Copy the table to memory in place of memory-mapping it."""
    key: str | None = None
    """Column that says which rows are the same entity (a molecule, a customer). They stay in one part, unless split.by is
    within_task, time, column or sources."""
    task: str | None = None
    """routed, pairs: the column with the task's name."""
    label: str | None = None
    """routed, pairs: the column with the label; files: of every task whose table row names none."""
    weight: str | None = None
    """Column of sample weights."""
    missing_labels: list[Annotated[float, AllowInfNan()] | str] = Field(default_factory=list)
    """Label values that mean 'missing', beside NaN, null and empty text (in CSV also NA, N/A, None, null and nan)."""
    max_invalid: float = Field(0.05, ge=0, le=1)
    """Largest share of rows that `on_invalid: skip` may leave out."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes that compute cached features."""

    @field_validator("path")
    @classmethod
    def _some_path(cls, value: Any) -> Any:
        if value == "":
            return value  # layout files with a task table
        for path in value.values() if isinstance(value, dict) else [value]:
            if not path or (isinstance(path, list) and not all(path)):
                raise ValueError("expected a file, folder, glob or hub id")
        if not value:
            raise ValueError("expected files by split name, such as {train: a.csv, test: b.csv}")
        return value

    @property
    def by_task(self) -> bool:
        """Whether a row belongs to one task, and rows are drawn by task."""
        return self.layout in ("routed", "files")

    @model_validator(mode="after")
    def _source(self) -> DataConfig:
        if self.layout == "files":
            if bool(self.path) == bool(self.table):
                raise ValueError("data: layout files needs data.table or data.path (a folder or glob), one of the two")
            if not isinstance(self.path, str):
                raise ValueError("data.path: layout files needs one folder or glob; name single files in data.table")
            if self.in_memory:
                raise ValueError("data.in_memory is for layouts of one table; layout files reads from disk, see data.memory_gb")
            if self.task is not None:
                raise ValueError("data.task is for layouts routed and pairs; in files each file is a task")
        else:
            if not self.path:
                raise ValueError("data.path is missing: expected a file, folder, glob or hub id")
            if self.table is not None:
                raise ValueError(f"data.table is for layout files; layout {self.layout} reads data.path")
            if self.on_error == "skip_task":
                raise ValueError(f"data.on_error: skip_task is for layout files; layout {self.layout} has one table")
        for one, other in combinations(("task", "label", "key", "weight"), 2):
            if (name := getattr(self, one)) is not None and name == getattr(self, other):
                raise ValueError(f"data.{one} and data.{other} are both '{name}', expected different columns; mend one")
        return self

    @field_validator("missing_labels", mode="before")
    @classmethod
    def _one_value(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]


class Selection(Section):
    """Columns by name or glob pattern."""

    include: list[str] = Field(default_factory=lambda: ["*"])
    exclude: list[str] = Field(default_factory=list)


def _hidden_width(value: int | str) -> int | str:
    if not re.fullmatch(r"[1-9]\d*x?" if isinstance(value, str) else r"[1-9]\d*", str(value)):
        raise ValueError("expected a positive whole number, or a multiple of the task's outputs such as 2x")
    return int(value) if str(value).isdigit() else value


HiddenWidth = Annotated[int | str, AfterValidator(_hidden_width)]


class TaskOptions(Section):
    """Options of the tasks whose names match a pattern."""

    kind: Spec | None = None
    weight: float | None = Field(None, ge=0)
    reads: list[str] | None = None
    """What the head reads: a feature of the trunk by name, and `task:NAME`, the logits of another task for the same row, or
    these alone; default: the only feature, or the experts of `model.head.gate`."""
    combine: list[float] | None = None
    """Fixed weights of the tasks that the head reads: its logits are the weighted sum of theirs."""
    experts: list[Annotated[int, Field(ge=0)]] | None = None
    """The experts that its gate may choose from, counted from 0; default: all."""
    hidden: list[HiddenWidth] | None = None
    """As `model.head.hidden`, for these tasks."""

    @field_validator("reads", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("reads", "experts", "combine")
    @classmethod
    def _each_once(cls, value: list[Any] | None, info: ValidationInfo) -> Any:
        if value is not None and not value:
            raise ValueError("expected at least one")
        if value is not None and info.field_name != "combine" and len(set(value)) < len(value):
            raise ValueError("expected each once")
        if value is not None and info.field_name == "combine" and not any(value):
            raise ValueError("expected weights, not only zeros")
        return value


class DerivedTask(Section):
    """A further task on labels that are there."""

    label: str
    """The task whose labels it has; grid: or a column, also one that is no task itself."""
    one_against_rest: bool = False
    """A binary task for each class of a multiclass label; `{class}` in the name stands for the class."""


class TasksConfig(Section):
    """Which tasks there are and of which kind."""

    labels: Selection = Field(default_factory=Selection)
    """grid: the label columns, a list of names and patterns or {include, exclude}; routed, pairs: the tasks to keep."""
    kind: Spec | None = None
    """Kind of all tasks; default: inferred from the labels."""
    by_name: dict[str, TaskOptions] = Field(default_factory=dict)
    """Options by name or pattern; later entries win."""
    others: Literal["leave_out", "refuse"] = "leave_out"
    """routed, pairs: what rows of tasks that `labels` does not select do: be left out and counted, or stop the run."""
    derived: dict[str, DerivedTask] = Field(default_factory=dict)
    """grid, pairs: further tasks by name, made when labels are read: `{second: {label: y}}` has the labels of y,
    `{"is_{class}": {label: y, one_against_rest: true}}` makes a binary task for each class of y."""

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        return {"include": names} if isinstance(names, list) else value


class SplitConfig(Section):
    """Which rows (pairs: labels) train, validate and test.

    by
        random       rows (whole keys if there is a key that repeats) in a random order
        stratified   at random within each class of `column`, whole keys
        group        whole groups of `column` (or of the key)
        scaffold     whole Bemis-Murcko scaffolds of the SMILES in `column`: the largest first, so to train
        time         by `column`, the oldest to train
        within_task  at random within each task, each task keeping at least one training row
        kfold        test is fold `fold` of `folds` (whole keys), valid the next one
        column       the values of `column` name the part
        sources      the sources' own splits name the part (as `column` does)
    parts
        random ... within_task: a fraction each, which sum to 1; {} is 0.8, 0.1, 0.1.
        kfold: {}, or {valid: share}: that share of the other folds' units at random in place of the next fold.
        column, sources: a value or a list of values each ("" is a missing value); a number is that share of `train`'s
        rows, drawn at random. Every value that occurs must be named: what is to be left out gets a part of its own,
        such as `unused: [x]`, and is counted there. {} for sources: each source's split is a part of that name.
    balanced
        scaffold: in a random order, but scaffolds larger than half the smallest part first.
    """

    by: Literal["random", "column", "stratified", "group", "scaffold", "time", "within_task", "kfold", "sources"] = "random"
    """What is dealt out; `sources`: the data's own splits (a hub data set's, or the names in `data.path`)."""
    parts: dict[str, float | str | list[str]] = Field(default_factory=dict)
    """Share of each part, default 0.8, 0.1, 0.1; with `by: column` or `sources` the values that form it (a share is then
    taken from train)."""
    column: str | None = None
    """Column of `column`, `stratified`, `group`, `time`; the SMILES column of `scaffold`."""
    folds: int = Field(5, ge=2)
    """kfold: number of folds."""
    fold: int = Field(0, ge=0)
    """kfold: the fold that is the test part; the next one validates."""
    balanced: bool = False
    """scaffold: groups in random order in place of the largest first."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    """One run a seed; several report mean and standard deviation."""
    refit: bool = False
    """After selection train again on train + valid for the selected time, before the test part is scored."""
    eval_rows: int | None = Field(None, ge=1)
    """Most labels of a task that the valid and the test part each keep, drawn at random; default: all."""

    @field_validator("parts", mode="before")
    @classmethod
    def _values_as_text(cls, value: Any) -> Any:
        """Values of a column are text: `[0, 1]` are '0' and '1', a bare true is 'true'; a bare number is a share."""
        if not isinstance(value, dict):
            return value

        def spell(one: Any, in_list: bool) -> Any:
            if isinstance(one, list):
                return [spell(each, True) for each in one]
            if isinstance(one, bool):
                return str(one).lower()
            return str(one) if in_list and isinstance(one, int | float) else one

        return {name: spell(given, False) for name, given in value.items()}

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("expected different seeds")
        return value


class GateConfig(Section):
    """A mixture of experts for each task."""

    experts: str
    """The feature `[B, E, D]` whose E experts are mixed."""
    by: str
    """The feature from which each task's gate weighs them."""


class HeadConfig(Section):
    """The task's own layers."""

    hidden: list[HiddenWidth] = Field(default_factory=list)
    """Widths of hidden layers, `2x` for twice the task's outputs; none: a linear head."""
    gate: GateConfig | None = None
    """`{experts: NAME, by: NAME}`: each head reads a mixture of experts, weighed by a softmax gate of its own."""
    scale_shift: bool = False
    """Scale and shift what a head reads by parameters of its own, one for each feature, that start at 1 and 0."""
    activation: Literal["relu", "elu", "gelu", "silu", "tanh"] = "relu"
    dropout: float = Field(0.0, ge=0, lt=1)
    bias: Literal["random", "constant"] = "random"
    """Start of the last layer's bias: as nn.Linear, or the logits of the best constant predictor (rare labels)."""
    toward_shared: float = Field(0.0, ge=0)
    """Pull of a head's weights towards the mean of its group's heads, in rows: as strong as that many rows of its task.
    Heads then start equal."""
    toward_shared_bias: float | None = Field(None, ge=0)
    """The same for biases, which often differ more between tasks; default: as `toward_shared`."""


class ModelConfig(Section):
    trunk: Spec = Field(default_factory=lambda: Spec(class_path="MLP"))
    """Shared network: MLP, Linear, Identity, Conv, TextEncoder, GraphNet, NodeGraph, FeatureFusion, ModelFusion, TaskStems,
    MMoE, CGC, or the import path of an nn.Module."""
    neck: int | None = Field(None, ge=1)
    """Width of a last shared linear layer behind a trunk with one feature."""
    inputs: dict[str, list[str]] | None = None
    """Names of a trunk's inputs, each with the column or pattern, or a list of them, whose features it holds; default: the keys
    of `inputs`. For trunks with several inputs."""
    head: HeadConfig = HeadConfig()

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [patterns] if isinstance(patterns, str) else patterns for name, patterns in value.items()}


class TargetsConfig(Section):
    """How regression and quantile labels are standardised, from training rows; predictions are in original units."""

    center: Literal["task", "pooled", "none"] = "task"
    scale: Literal["task", "pooled", "none"] = "task"
    shrink: float | None = Field(None, ge=0)
    """Rows by which a task's own centre and scale are shrunk towards the pool; default 5 where tasks share a label
    column (routed, pairs), else 0."""


class BalancingConfig(Section):
    """What holds for every balancer."""

    warmup: int = Field(0, ge=0)
    """Steps at the start in which every weight is 1."""
    min: float | None = Field(None, ge=0, le=1)
    """Least weight, as a ratio to the mean over active tasks."""
    max: float | None = Field(None, ge=1)
    """Largest weight, likewise."""
    normalize: bool = False
    """Divide weights by their mean over active tasks."""
    every: int = Field(1, ge=1)
    """Steps between gradient statistics; weights stay in between."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the old value in the moving averages of squared norms and inner products."""
    projections: Literal["auto", "never"] | int = "auto"
    """Random vectors that stand for exact inner products of gradients; auto: where exact ones cost too much."""
    level: Literal["neck", "features", "trunk"] = "neck"
    """Where gradients are taken: at the weights of the last shared linear layer; at the features themselves (any trunk,
    cheaper, a bound); or at all linear layers of the trunk (routed, files)."""
    unbiased: bool = False
    """Leave out of norms and inner products what rows have with themselves, the noise of small batches; needs smoothing."""
    affinity: bool = False
    """Average the cosines of the tasks' gradients over steps: `affinity.parquet` says which tasks help or hurt one another."""


class ObjectiveConfig(Section):
    """J = 1/N * sum over labels of weight * w_t * share_t * loss / scale_t."""

    share: Literal["rows", "tasks"] = "rows"
    """rows: every label counts the same; tasks: every task does, by training labels or sampling probability."""
    scale: Literal["none", "kind", "constant"] = "kind"
    """Divisor of a task's loss: nothing, its kind's typical loss, or the loss of the best constant predictor."""
    balancer: Spec = Field(default_factory=lambda: Spec(class_path="equal"))
    balancing: BalancingConfig = BalancingConfig()
    targets: TargetsConfig = TargetsConfig()


class TrainConfig(Section):
    epochs: float | None = Field(None, gt=0)
    """Length in passes over the training rows; give this or `steps`; default 30."""
    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps."""
    global_batch: int = Field(128, ge=1)
    """Rows of one optimizer step, over all processes and micro-batches."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows of one forward pass over all processes; smaller than the global batch: gradients accumulate."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of the trunk."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    head_lr: float | None = Field(None, gt=0)
    """Learning rate of the heads; default `lr`."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled decay of the trunk."""
    head_weight_decay: float | None = Field(None, ge=0)
    """The same for the heads; default `weight_decay`."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the training during which the learning rate rises from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, down to 0 at the end."""
    clip: float | None = Field(None, gt=0)
    """Largest global norm of the trunk's gradient."""
    head_clip: float | None = Field(None, gt=0)
    """Largest norm of one head's gradient."""
    precision: Literal["no", "bf16", "fp16"] | None = None
    """Mixed precision; default: what `accelerate launch` says."""
    compile: bool = False
    """torch.compile the trunk."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, order and dropout; the split has its own."""
    seed_with_split: bool = False
    """Add the split's seed to `seed`: so `split.seeds` repeat the training where the split is given, and is always the same."""
    eval_every: float = Field(1.0, gt=0)
    """Epochs between evaluations on the validation part."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of metrics.jsonl."""
    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; default: one at each evaluation only."""
    keep_checkpoints: int = Field(1, ge=1)
    """How many of the latest checkpoints stay, beside the best."""
    timeout_minutes: float = Field(30.0, gt=0)
    """How long processes wait for each other before they give up."""
    max_bad_steps: int = Field(20, ge=0)
    """Steps with a non-finite loss or gradient that are left out before the run stops."""

    @model_validator(mode="after")
    def _length(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps are both given; give one")
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise ValueError(f"train.micro_batch is larger than train.global_batch ({self.global_batch})")
        return self


class SelectConfig(Section):
    """Which checkpoint is the best, by the validation part."""

    metric: str = "skill"
    """A metric of per_task.parquet: skill, roc_auc, mse, ..."""
    reduce: Literal["mean", "median", "worst_decile", "pooled"] = "median"
    min_per_class: int = Field(1, ge=1)
    """Fewest positives and negatives of a task in a part for its ranking metrics to be scored."""
    checkpoint: Literal["best", "last"] = "best"
    """best: of the best evaluation; last: of the last step, for a learning rate that decays to 0."""
    patience: int | None = Field(None, ge=1)
    """Evaluations without improvement before training stops; default: never."""
    predictions: int = Field(5_000_000, ge=0)
    """Most labels of a part whose predictions the run keeps, of rows drawn at random, some 15 bytes each: `mtrain report` needs
    them for intervals and to compare runs; 0: none."""


class Config(Section):
    """A run."""

    data: DataConfig
    inputs: dict[str, list[Spec]] = Field(default_factory=dict)
    """Features by column name or pattern; none: every column that is not a label, key, task or weight, by its type."""
    tasks: TasksConfig = TasksConfig()
    split: SplitConfig = SplitConfig()
    sampler: Spec = Field(default_factory=lambda: Spec(class_path="Capped"))
    """routed, files: rows per task and step: Capped, Proportional, Temperature, Sqrt, Equal, UniMax, or an import path."""
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    select: SelectConfig = SelectConfig()
    tracker: Spec = Field(default_factory=lambda: Spec(class_path="none"))
    """none, wandb (offline unless `mode: online` or WANDB_MODE says otherwise), tensorboard, or an import path."""
    run_dir: str | None = None
    """Place of the run; default runs/<name of the config>."""
    init_from: str | None = None
    """A run whose trunk, and heads of tasks with the same name, kind, classes and layers, are the start."""
    freeze: list[Literal["trunk", "heads"]] = Field(default_factory=list)
    """Parts that are not trained."""

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {column: specs if isinstance(specs, list) else [specs] for column, specs in value.items()}

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _layout(self) -> Config:
        layout = self.data.layout
        for field in ("task", "label"):
            given = getattr(self.data, field) is not None
            if layout == "grid" and given:
                raise ValueError(f"data.{field} is for layouts routed and pairs; grid has its label columns in tasks.labels")
            if layout in ("routed", "pairs") and not given:
                raise ValueError(f"data.{field} is missing: layout {layout} needs the column's name")
        if self.tasks.others == "refuse" and layout not in ("routed", "pairs"):
            raise ValueError(f"tasks.others is for layouts routed and pairs, where rows name their task; layout is {layout}")
        if self.tasks.derived and self.data.by_task:
            raise ValueError(
                f"tasks.derived: layout {layout} has one task for each row; further tasks on the same rows need grid or pairs"
            )
        if self.tasks.derived and self.split.by == "within_task":
            raise ValueError(
                "tasks.derived: split.by within_task deals out each task's labels by itself, so a label could train under one "
                "name and test under another; use random, which keeps the rows of a key together"
            )
        if layout == "pairs" and self.data.key is None:
            raise ValueError("data.key is missing: layout pairs needs the column that says which input row is meant")
        if layout in ("grid", "pairs") and self.sampler != Config.model_fields["sampler"].get_default(
            call_default_factory=True
        ):
            raise ValueError(
                f"sampler is for layouts routed and files, where rows are drawn by task; layout is {layout}: leave sampler out"
            )
        return self

    def of_split(self, seed: int) -> Config:
        """The run on one of its split seeds."""
        train = self.train
        if train.seed_with_split:
            train = train.model_copy(update={"seed": train.seed + seed, "seed_with_split": False})
        return self.model_copy(update={"split": self.split.model_copy(update={"seeds": [seed]}), "train": train})


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a YAML config.

    Args:
        path: the file.
        overrides: command line words `--section.key value` or `--section.key=value`; values are YAML.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest is named), a value is of a wrong type.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}, expected a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"config {path}, line {mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not a YAML text file: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UserError(f"config {path}: found {found}, expected keys such as data, tasks, model")
    return check_config(tree, str(path), override(tree, overrides))


def override(tree: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Put command line words `--section.key value` into a tree; returns the values by key. A length in steps takes the place
    of one in epochs, and the other way round."""
    given = dict(_overrides(words))
    for key, value in given.items():
        _put(tree, key, value)
    for unit, other in (("steps", "epochs"), ("epochs", "steps")):
        if f"train.{unit}" in given and f"train.{other}" not in given:
            tree["train"].pop(other, None)
    return given


def check_config(tree: dict[str, Any], source: str, overridden: Iterable[str] = ()) -> Config:
    """A tree of plain values as a checked Config; `source`, or the overridden key, begins the message of an error."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        loc = [str(part) for part in worst(error)["loc"]]
        at = ".".join(loc)
        if any(f"{at}.".startswith(f"{key}.") for key in overridden):
            source = "command line"
        raise UserError(f"{source}: {first_problem(error, '', _fields_beside(loc))}") from None


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every configuration key with its documentation and default, for `--help` and for the nearest known key."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield prefix + name, field.description or "", default


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config, ignore: Sequence[str] = ()) -> list[str]:
    """`key: old -> new` for each key that differs; `ignore` names keys, or sections, that may."""
    lines = []
    for key, _, _ in keys():
        if any(key == skip or key.startswith(skip + ".") for skip in ignore):
            continue
        before, after = old, new
        for part in key.split("."):
            before, after = getattr(before, part), getattr(after, part)
        if before != after:
            lines.append(f"{key}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2's floats: `1e-3` is a number, not text. A key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' occurs twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word[2:].startswith(("-", "=")) or word == "--":
            raise UserError(f"'{word}': expected an override such as --train.epochs 10")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UserError(f"--{key}: a value is missing")
            text = remaining.pop(0)
        try:
            yield key, yaml.load(text, Loader=YamlLoader)
        except yaml.YAMLError:
            yield key, text


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = tree
    for i, part in enumerate(path):
        child = node.setdefault(part, {})
        if isinstance(child, str):  # a bare class name that gets options
            child = node[part] = {"class_path": child}
        elif child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            known = nearest(key, (k for k, _, _ in keys()))
            raise UserError(f"--{key}: {'.'.join(path[: i + 1])} is not a section{known}")
        node = child
    node[last] = value


def _fields_beside(loc: Sequence[str]) -> dict[str, Any]:
    """The fields of the section in which the last part of `loc` stands."""
    section: Any = Config
    for part in loc[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue  # a name in a mapping, or a position in a list
        candidates = [field.annotation, *get_args(field.annotation)]
        candidates += [inner for c in candidates for inner in get_args(c)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    fields = dict(getattr(section, "model_fields", {}))
    elsewhere = {key.split(".")[-1]: key for key, _, _ in keys()}
    if loc and loc[-1] in elsewhere and not difflib.get_close_matches(loc[-1], fields, n=1, cutoff=0.5):
        return {elsewhere[loc[-1]]: None}
    return fields
