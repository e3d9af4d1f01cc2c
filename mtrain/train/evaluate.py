"""Score a part of the data: deviances against the constant predictor, and the metrics of each kind, all tasks at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrain.data.batch import Grid
from mtrain.data.inputs import Inputs
from mtrain.data.loader import Part
from mtrain.errors import UserError, nearest
from mtrain.model.heads import HeadBank
from mtrain.model.kinds import Kind
from mtrain.model.metrics import METRICS, Scored, ScoreOptions, best_f1_threshold, summarize
from mtrain.parallel.shard import Shard
from mtrain.tasks import TaskTable
from mtrain.train.objective import SCALE_FLOOR, Objective, Piece, pieces, routes

EVAL_ROWS = 2048  # rows of a forward pass
SKILL_FLOOR = -1.0  # skill has no lower bound: the mean over tasks clips here
HIGHER_IS_BETTER = {name: metric.higher_is_better for family in METRICS.values() for name, metric in family.items()} | {
    "skill": True,
    "deviance": False,
}
PERFECT = 1e-10  # deviance of a label from which on a constant is perfect: the task has no skill then


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Metrics of one part: `per_task[name]` is `[T]` with NaN where a task could not be scored."""

    per_task: dict[str, NDArray[np.float64]]
    summary: dict[str, dict[str, float | int | None]]
    label_count_T: NDArray[np.int64]
    threshold_T: NDArray[np.float64] | None

    def value(self, metric: str, reduce: str) -> float:
        """What a checkpoint is selected by; NaN where no task could be scored."""
        found = self.summary.get(metric, {}).get(reduce)
        return float("nan") if found is None else float(found)


@dataclass(frozen=True)
class Counted:
    """Of a rank's labels: sums by task of deviances and of the constant's, numbers of labels; and by family of metrics the
    task, row, label, prediction, and where they are kept the deviance and the constant's, of each."""

    deviance_T: NDArray[np.float64]
    constant_T: NDArray[np.float64]
    count_T: Ints
    collected: dict[str, list[tuple[NDArray[Any], ...]]]


def check_metric(name: str, tasks: TaskTable) -> None:
    """Raises UserError for a `select.metric` that no task of the table has."""
    families = {task.kind.family for task in tasks}
    known = ["skill", "deviance", *(metric for family in families for metric in METRICS[family])]
    if name not in known:
        raise UserError(f"select.metric: '{name}' is not a metric of these tasks{nearest(name, known)}")


class Evaluator:
    """Scores parts with the model as it is. Every rank takes part and gets the scores.

    Args:
        tasks: all tasks.
        model: shared network, `model(x_BF)` to `z_BD`.
        bank, objective: of this rank's tasks.
        shard: which tasks those are.
        by_task: whether a row belongs to one task.
        min_per_class: fewest positives and negatives of a task for its ranking metrics.
    """

    def __init__(
        self,
        tasks: TaskTable,
        model: nn.Module,
        bank: HeadBank,
        objective: Objective,
        shard: Shard,
        by_task: bool,
        min_per_class: int,
        device: torch.device,
    ):
        self.tasks, self.model, self.bank, self.objective = tasks, model, bank, objective
        self.shard, self.by_task, self.min_per_class, self.device = shard, by_task, min_per_class, device
        width = int(tasks.num_outputs_T.max())
        constant_TO = np.zeros((len(shard.own), width), dtype=np.float32)
        for row, logits in zip(constant_TO, tasks.stats["constant"][shard.own], strict=True):
            row[: len(logits)] = np.nan_to_num(logits)
        self.constant_TO = torch.from_numpy(constant_TO).to(device)
        self.center_T, self.scale_T = tasks.stats["center"], tasks.stats["scale"]

    def score(
        self,
        inputs: Inputs,
        part: Part,
        only: Collection[str] | None = None,
        threshold_T: NDArray[np.float64] | None = None,
        choose_threshold: bool = False,
        keep: Callable[[pa.Table], None] | None = None,
    ) -> Scores:
        """Metrics of a part.

        Args:
            only: names of the metrics to compute; None: all.
            threshold_T: thresholds of F1; NaN or None: 0.5.
            choose_threshold: choose them here instead, and return them.
            keep: gets `predictions` of the part, on rank 0.
        """
        counted = self.shard.world.gather_to_first(self._count(inputs, part, keep is not None))
        scores = None
        if counted is not None:
            scores = scores_of(counted, self.tasks, self.min_per_class, only, threshold_T, choose_threshold)
            if keep is not None:
                keep(predictions(counted, self.tasks))
        return self.shard.world.from_first(scores)  # type: ignore[return-value]

    def _count(self, inputs: Inputs, part: Part, keep: bool) -> Counted:
        """What this rank's heads give on a part."""
        deviance_T, constant_T = np.zeros((2, len(self.tasks)))
        count_T = np.zeros(len(self.tasks), dtype=np.int64)
        collected: dict[str, list[tuple[NDArray[Any], ...]]] = defaultdict(list)
        for piece, row_P, task_P, at, original_P in self._run(inputs, part):
            kind = self.objective.kinds[piece.group]
            constant = replace(piece, logits=self._constant_logits(piece))
            kept = []
            for total_T, which in ((deviance_T, piece), (constant_T, constant)):
                deviance = self.objective.deviances(which)
                total_T[self.shard.own[piece.task_A.cpu().numpy()]] += piece.sum(deviance.double()).cpu().numpy()
                if keep:
                    kept.append(deviance[at].float().cpu().numpy())
            count_T += np.bincount(task_P, minlength=len(self.tasks))
            prediction = self.objective.predict(piece)
            if kind.family != "multiclass":
                prediction = kind.point(prediction)
            pred_P = prediction[at].double().cpu().numpy()
            y_P = piece.y[at].double().cpu().numpy()
            if kind.standardized:
                pred_P = pred_P * self.scale_T[task_P] + self.center_T[task_P]
                assert original_P is not None
                y_P = original_P
            collected[kind.family].append((task_P, row_P, y_P, pred_P, *kept))
        return Counted(deviance_T, constant_T, count_T, dict(collected))

    def predict(self, z_BD: Tensor) -> Iterator[tuple[Kind, Tensor, Tensor]]:
        """Predictions of every row for every task in original units, group by group: its kind, task ids `[A]`, values
        `[B, A, O]` in float64. The modules are in the mode that they are in."""
        labels = Grid(z_BD.new_zeros(1, len(self.tasks)))
        center_T, scale_T = (torch.tensor(value_T, device=z_BD.device) for value_T in (self.center_T, self.scale_T))
        for piece in self._averaged(list(pieces(self.bank, z_BD, labels, []))):
            kind, value_BAO = self.objective.kinds[piece.group], self.objective.predict(piece).double()
            if kind.standardized:
                value_BAO = value_BAO * scale_T[piece.task_A, None] + center_T[piece.task_A, None]
            yield kind, piece.task_A, value_BAO

    def _run(self, inputs: Inputs, part: Part) -> Iterator[tuple[Piece, Ints, Ints, Any, NDArray[np.float64] | None]]:
        """Pieces of all batches; of each label the row, the task, where it is in the piece, and its original value."""
        with _evaluating(self.model, self.bank), torch.no_grad():
            for batch, original in part.batches(inputs, EVAL_ROWS, self.shard, self.by_task):
                needed = routes(self.bank, batch.labels)
                row_of_H = (batch.row_B if batch.row_H is None else batch.row_H).numpy()
                batch = batch.to(self.device)
                z_HD = self.shard.to_heads(self.model(*batch.arguments()).float(), batch.deal)
                for i, piece in enumerate(self._averaged(list(pieces(self.bank, z_HD, batch.labels, needed)))):
                    if piece.present is not None:
                        row_P, slot_P = piece.present.nonzero(as_tuple=True)
                        at: Any = (row_P, slot_P)
                    else:
                        assert piece.slot_P is not None
                        row_P, slot_P, at = needed[i].row_P, piece.slot_P, slice(None)
                    row_P, task_P = row_P.cpu(), piece.task_A[slot_P].cpu()
                    y_P = None
                    if isinstance(original, Grid):
                        y_P = original.y_BT[row_P, task_P].numpy()
                    elif original is not None:
                        y_P = original.y_P[needed[i].label_P % len(original.y_P)].numpy()
                    yield piece, row_of_H[row_P.numpy()], self.shard.own[task_P.numpy()], at, y_P

    def _averaged(self, found: list[Piece]) -> list[Piece]:
        """The pieces of an ensemble's members, which follow each other, as one with the mean of their logits."""
        members = len(self.bank.names) // max(1, len(self.shard.own))
        if members <= 1:
            return found
        groups = len(found) // members
        logits = [torch.stack([piece.logits for piece in found[i::groups]]).mean(0) for i in range(groups)]
        return [replace(piece, logits=mean) for piece, mean in zip(found, logits, strict=False)]

    def _constant_logits(self, piece: Piece) -> Tensor:
        logits_AO = self.constant_TO[piece.task_A][:, : piece.logits.shape[-1]]
        return piece.spread(logits_AO).expand(piece.logits.shape)


def scores_of(
    counted: Collection[Counted],
    tasks: TaskTable,
    min_per_class: int,
    only: Collection[str] | None = None,
    threshold_T: NDArray[np.float64] | None = None,
    choose_threshold: bool = False,
) -> Scores:
    """The scores of what all ranks counted; arguments as of `Evaluator.score`."""
    sums = [(one.deviance_T, one.constant_T, one.count_T) for one in counted]
    deviance_T, constant_T, count_T = (np.sum(of_ranks, 0) for of_ranks in zip(*sums, strict=True))
    collected: dict[str, list[tuple[NDArray[Any], ...]]] = defaultdict(list)
    for family, found in (item for one in counted for item in one.collected.items()):
        collected[family] += found
    typical_T = np.maximum(np.nan_to_num(tasks.stats["typical_loss"], nan=1.0), SCALE_FLOOR)
    with np.errstate(invalid="ignore", divide="ignore"):
        skill_T = np.where(constant_T > PERFECT * count_T, 1 - deviance_T / constant_T, np.nan)
        per_task = {"skill": skill_T, "deviance": deviance_T / count_T}
        pooled_skill = 1 - (deviance_T / typical_T).sum() / (constant_T / typical_T).sum()
        pooled_deviance = deviance_T.sum() / count_T.sum()
    summary = {
        "skill": summarize(np.maximum(skill_T, SKILL_FLOOR), float(pooled_skill), True),
        "deviance": summarize(per_task["deviance"], float(pooled_deviance), False),
    }
    pooled: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for family, found in collected.items():
        scored = _scored(found, len(tasks))
        if not len(scored.y_P):
            continue  # no task of this family has a label in the part
        if family == "binary" and choose_threshold:
            threshold_T = best_f1_threshold(scored)
        options = ScoreOptions(min_per_class, threshold_T)
        ranked = int(np.count_nonzero(scored.count_T))
        for name, metric in METRICS[family].items():
            if only is not None and name not in only:
                continue
            value_T = metric.per_task(scored, options)
            if value_T is not None:
                before = per_task.get(name)
                per_task[name] = value_T if before is None else np.where(np.isnan(before), value_T, before)
            pooled[name].append((metric.pooled(scored, options), len(scored.y_P), ranked))
    for name, values in pooled.items():
        together = float(np.average([value for value, _, _ in values], weights=[labels for _, labels, _ in values]))
        num_ranked = sum(ranked for _, _, ranked in values)
        summary[name] = summarize(per_task.get(name), together, HIGHER_IS_BETTER[name], num_ranked)
    return Scores(per_task, summary, count_T, threshold_T)


def predictions(counted: Collection[Counted], tasks: TaskTable) -> pa.Table:
    """Every scored label of a part, by task and row: row of the inputs, task, label (a class's number), prediction (a
    probability, a value in original units, or the likeliest class's number, with `probabilities` of all classes), and the
    deviances of model and constant, whose sums give skill."""
    blocks = []
    for one in counted:
        for family, found in one.collected.items():
            for task_P, row_P, y_P, pred_P, deviance_P, constant_P in found:
                columns = {"row": row_P, "task": task_P, "label": y_P, "deviance": deviance_P, "constant": constant_P}
                probabilities = pa.nulls(len(task_P), pa.list_(pa.float32()))
                if family == "multiclass":
                    own_PO = np.arange(pred_P.shape[1]) < tasks.num_outputs_T[task_P, None]
                    offsets = np.cumsum([0, *own_PO.sum(1)], dtype=np.int32)
                    probabilities = pa.ListArray.from_arrays(offsets, pa.array(pred_P[own_PO], pa.float32()))
                    pred_P = pred_P.argmax(1)
                numbers = {name: values.astype(np.float32) for name, values in columns.items() if name not in ("row", "task")}
                numbers["prediction"] = pred_P.astype(np.float32)
                places = {name: columns[name].astype(np.int32) for name in ("row", "task")}
                blocks.append(pa.table({**places, **numbers, "probabilities": probabilities}))
    table = pa.concat_tables(blocks).sort_by([("task", "ascending"), ("row", "ascending")]).combine_chunks()
    named = pa.DictionaryArray.from_arrays(table["task"].combine_chunks(), pa.array(tasks.names, pa.string()))
    return table.set_column(1, "task", named)


def _scored(found: list[tuple[NDArray[Any], ...]], num_tasks: int) -> Scored:
    preds = [pred for _, _, _, pred, *_ in found]
    width = max((pred.shape[1] for pred in preds if pred.ndim == 2), default=0)
    padded = [np.pad(pred, ((0, 0), (0, width - pred.shape[1]))) if width else pred for pred in preds]
    task_P, row_P, y_P = (np.concatenate([entry[i] for entry in found]) for i in range(3))
    return Scored(task_P=task_P, y_P=y_P, pred=np.concatenate(padded), num_tasks=num_tasks, row_P=row_P)


class _evaluating:
    """Both modules in evaluation mode inside the block."""

    def __init__(self, *modules: nn.Module):
        self.before = {module: module.training for module in modules}

    def __enter__(self) -> None:
        for module in self.before:
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self.before.items():
            module.train(training)


def flatten(summary: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """`prefix/metric/reduction` to number, without the missing ones."""
    return {
        f"{prefix}/{metric}/{name}": value
        for metric, values in summary.items()
        for name, value in values.items()
        if value is not None
    }
