"""Small mixed problems for tests, and the objective as a loop over tasks and labels in float64."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn import functional as F

from mtrain.balance import Equal
from mtrain.balance.base import Facts
from mtrain.config import HeadConfig, ObjectiveConfig, TargetsConfig, TrainConfig, check_config
from mtrain.data.batch import Batch, Pairs
from mtrain.data.statistics import with_statistics
from mtrain.model.heads import HeadBank
from mtrain.model.kinds import Binary, Multiclass, Poisson, Quantile, Regression
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.tasks import Task, TaskTable
from mtrain.train.balancing import Balancing
from mtrain.train.objective import Objective, coefficients
from mtrain.train.step import Stepper, Totals, count
from mtrain.train.task_gradients import make_task_gradients

KINDS = [
    Regression(),
    Binary(),
    Regression(loss="mae"),
    Multiclass(),
    Binary(pos_weight=3.0),
    Poisson(),
    Multiclass(label_smoothing=0.1),
    Regression(loss="huber", delta=0.5),
    Binary(pos_weight="balanced"),
    Quantile(levels=(0.25, 0.5)),
    Binary(),
    Multiclass(),
    Multiclass(label_smoothing=0.1),
    Regression(),
]
NUM_CLASSES = {3: 3, 6: 5, 11: 7, 12: 2}
D = 6


def make_tasks(rng, rows=200, kinds=KINDS):
    """A table of mixed tasks with the statistics of random training labels."""
    tasks = [
        Task(f"t{t}", kind, f"t{t}", tuple("abcdefg"[: NUM_CLASSES.get(t, 0)]), weight=1 + t % 3)
        for t, kind in enumerate(kinds)
    ]
    table = TaskTable(tuple(tasks))
    task = rng.integers(len(tasks), size=rows * len(tasks))
    return with_statistics(table, task, draw_labels(rng, table, task), TargetsConfig(), False)


def draw_labels(rng, tasks, task_P):
    """Labels in original units."""
    y = rng.normal(size=len(task_P))
    for t, task in enumerate(tasks):
        at = task_P == t
        if task.kind.family == "multiclass":
            y[at] = rng.integers(len(task.classes), size=at.sum())
        elif task.kind.family == "binary":
            y[at] = rng.random(at.sum()) < 0.3
        elif isinstance(task.kind, Poisson):
            y[at] = rng.poisson(2, size=at.sum())
    return y


def make_batch(rng, tasks, layout, rows=24, weighted=False, missing=0.4, absent=1):
    """A batch of labels in standardised units; its inputs are the row numbers."""
    if layout == "routed":
        task, row = rng.integers(len(tasks) - 2, size=rows), np.arange(rows)  # two tasks are absent
    else:
        row, task = (a.ravel() for a in np.indices((rows, len(tasks))))
        keep = (rng.random(len(row)) > missing) & (task != absent)
        row, task = row[keep], task[keep]
    y = (draw_labels(rng, tasks, task) - tasks.stats["center"][task]) / tasks.stats["scale"][task]
    weight = rng.random(rows)[row] if layout == "grid" else rng.random(len(row))  # a grid has weights of rows
    weight_P = torch.from_numpy(weight + 0.2).float() if weighted else None
    row_P, task_P, y_P = torch.from_numpy(row), torch.from_numpy(task), torch.from_numpy(y).float()
    labels = Pairs.of(row_P, task_P, y_P, weight_P, rows, len(tasks))
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(rows), labels.grid() if layout == "grid" else labels)


def label_loss(kind, logits, y, pos_weight):
    """The loss of one label, `logits` [O] without padding, as formulas."""
    if isinstance(kind, Regression):
        r = (logits[0] - y).abs()
        if kind.loss == "mse":
            return r**2
        if kind.loss == "mae":
            return r
        return r**2 / 2 if float(r.detach()) <= kind.delta else kind.delta * (r - kind.delta / 2)
    if isinstance(kind, Binary):
        return -(pos_weight * y * F.logsigmoid(logits[0]) + (1 - y) * F.logsigmoid(-logits[0]))
    if isinstance(kind, Multiclass):
        log_prob, e = logits - logits.logsumexp(0), kind.label_smoothing
        return -(1 - e) * log_prob[int(y)] - e * log_prob.mean()
    if isinstance(kind, Poisson):
        return 2 * ((y * math.log(y) if y else 0.0) - y * logits[0] - y + logits[0].exp())
    r = y - logits
    q = torch.tensor(kind.levels, dtype=r.dtype)
    return torch.where(r > 0, q * r, (q - 1) * r).sum()


def naive_objective(tasks, modules, z, batch, config, sampling_T=None, num_labels=None, balance_T=None):
    """J as one loop over labels; `modules` are separate heads by name, `z` features, both float64."""
    labels = batch.labels.pairs()
    coefficient_T = coefficients(tasks, config, sampling_T)
    total = z.new_zeros(())
    weights = [1.0] * len(labels.y_P) if labels.weight_P is None else labels.weight_P.tolist()
    for row, t, y, weight in zip(labels.row_P.tolist(), labels.task_P.tolist(), labels.y_P.tolist(), weights, strict=True):
        task = tasks[t]
        pos_weight = tasks.stats["pos_weight"][t] if "pos_weight" in task.kind.param_names else 1.0
        loss = label_loss(task.kind, modules[task.name](z[row]), y, pos_weight)
        total = total + weight * coefficient_T[t] * (1.0 if balance_T is None else balance_T[t]) * loss
    return total / (num_labels or len(labels.y_P))


class Rows(nn.Module):
    """A trunk whose parameters are the features of each row."""

    def __init__(self, rows):
        super().__init__()
        self.z = nn.Parameter(torch.randn(rows, D, generator=torch.Generator().manual_seed(5)))

    def forward(self, x, keys=None):
        return self.z[x[:, 0].long()]


class Recorder:
    """Stands for an optimizer: keeps the gradients that it was given."""

    def __init__(self, model=None):
        self.model, self.grads, self.steps = model, [], 0

    def step(self, updates=None):
        self.steps += 1
        self.grads = [p.grad.clone() for p in self.model.parameters()] if updates is None else updates

    def zero_grad(self, set_to_none=True):
        for p in self.model.parameters() if self.model is not None else ():
            p.grad = None


def fake_accelerator(mixed_precision="no"):
    return SimpleNamespace(autocast=nullcontext, no_sync=lambda model: nullcontext(), mixed_precision=mixed_precision)


def make_bank(tasks, hidden=(), **options):
    keys = [task.kind.group_key for task in tasks]
    return HeadBank(tasks.names, tasks.num_outputs_T.tolist(), D, hidden=hidden, keys=keys, **options)


def make_stepper(
    tasks,
    bank,
    model,
    trunk_optimizer,
    head_optimizer,
    config=None,
    sampling_T=None,
    balancer=None,
    precision="no",
    layout="pairs",
    **train,
):
    config = config or ObjectiveConfig()
    head = HeadConfig(**{k: train.pop(k) for k in list(train) if k.startswith("toward")})
    shard, device = Shard.replicated(World(), tasks.names), torch.device("cpu")
    share_T = torch.full((len(tasks),), 1 / len(tasks))
    balancer, gradients = balancer or Equal(), None
    if balancer.needs != "losses" or config.balancing.affinity:
        products = balancer.needs == "gram" or config.balancing.affinity
        gradients = make_task_gradients(
            "balancer", products, model, bank, shard, layout == "routed", layout == "grid", config.balancing, 24
        )
    facts = Facts(tasks.names, torch.zeros(len(tasks), dtype=torch.bool), share_T, device)
    return Stepper(
        fake_accelerator(precision),
        model,
        bank,
        shard,
        Objective(tasks, bank, torch.device("cpu")),
        torch.tensor(coefficients(tasks, config, sampling_T), dtype=torch.float32),
        Balancing(balancer, facts, config.balancing, gradients, shard),
        trunk_optimizer,
        head_optimizer,
        TrainConfig(**train),
        head,
        tasks.stats["train_labels"],
    )


def totals_of(tasks):
    return Totals(len(tasks), torch.device("cpu"))


def run_step(stepper, batch, step, totals, pieces=1):
    """Train on a batch, in so many micro-batches of consecutive rows."""
    sizes = [len(rows) for rows in np.array_split(np.arange(len(batch.row_B)), pieces)]
    parts = zip(batch.x_BF.split(sizes), batch.row_B.split(sizes), batch.labels.split(sizes), strict=True)
    micro = [Batch(*part) for part in parts]
    num_labels, num_rows = count(micro)
    assert (num_labels, num_rows) == (len(batch.labels.pairs().y_P), len(batch.row_B))
    stepper(micro, step, totals, num_labels, num_rows)


def head_gradients(bank, updates):
    """Gradients of each task's head by name, without padding; absent heads are missing."""
    found = {}
    for update in updates:
        group = bank.groups[update.group]
        active = range(len(group.names)) if update.active_A is None else update.active_A.tolist()
        layers = len(group.weights)
        for a, local in enumerate(active):
            size = int(group.sizes[local])
            grads = [grad[local if update.dense else a] for grad in update.grads]
            grads[layers - 1], grads[-1] = grads[layers - 1][:size], grads[-1][:size]
            found[group.names[local]] = [g for pair in zip(grads[:layers], grads[layers:], strict=True) for g in pair]
    return found


def rows_as_inputs(batch):
    """The same batch with inputs that `Rows` turns into the row's own features."""
    return Batch(batch.row_B[:, None].float(), batch.row_B, batch.labels)


INPUTS = [f"x{i}" for i in range(5)]
TASKS = {"r0": "regression", "r1": "regression", "b0": "binary", "b1": "binary", "c0": "multiclass", "n0": "poisson"}


def mixed_rows(rows=90):
    """Inputs and learnable labels of six tasks of four kinds; a third of the labels is missing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, len(INPUTS)))
    s = x @ rng.normal(size=(len(INPUTS), len(TASKS)))
    y = {
        "r0": s[:, 0] * 3 + 10,
        "r1": s[:, 1] + 0.1 * rng.normal(size=rows),
        "b0": (s[:, 2] > 0.5) * 1.0,
        "b1": (s[:, 3] > 0) * 1.0,
        "c0": np.digitize(s[:, 4], [-1, 1]) * 1.0,
        "n0": rng.poisson(np.exp(np.clip(s[:, 5], -3, 2))) * 1.0,
    }
    for values in y.values():
        values[rng.random(rows) < 0.33] = np.nan
    return x, y


def grid_table():
    x, y = mixed_rows()
    return pa.table({f"x{i}": x[:, i] for i in range(5)} | {name: pa.array(v, from_pandas=True) for name, v in y.items()})


def long_table():
    """One row per label: for the layouts routed and pairs."""
    x, y = mixed_rows()
    row, task = np.nonzero(~np.isnan(np.stack(list(y.values()), 1)))
    columns = {"row": row, "task": np.array(list(y))[task], "y": np.stack(list(y.values()), 1)[row, task]}
    return pa.table(columns | {f"x{i}": x[row, i] for i in range(5)})


def run_config(layout, **sections):
    """A config of the mixed problem; sections are merged into the defaults."""
    data = {"path": "python:problems.grid_table", "layout": "grid"}
    if layout != "grid":
        data = {"path": "python:problems.long_table", "layout": layout, "task": "task", "label": "y", "key": "row"}
    tree = {
        "data": data,
        "inputs": {"x*": "Numeric"},
        "tasks": {"by_name": {name: {"kind": kind} for name, kind in TASKS.items()}},
        "split": {"parts": {"train": 0.6, "valid": 0.2, "test": 0.2}},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [16], "dropout": 0.2}}},
        "train": {"epochs": 4, "global_batch": 16, "lr": 0.01, "log_every": 3, "decay": "cosine", "warmup": 0.1},
        "select": {"metric": "skill", "reduce": "mean"},
    }
    if layout == "grid":
        tree["tasks"]["labels"] = list(TASKS)
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
    return check_config(tree, "test")


class OwnTrunk(nn.Module):
    """A user's trunk with torch's own dropout and batch norm."""

    def __init__(self, in_features: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4))

    def forward(self, x):
        return self.layers(x)


class SometimesInfinite(Regression):
    """A user's kind: infinite for labels far above the mean."""

    def losses(self, logits, y, params):
        return torch.where(y > 1.0, torch.inf, super().losses(logits, y, params))
