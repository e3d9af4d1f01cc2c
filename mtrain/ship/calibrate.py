"""Calibration of probabilities, fitted on the validation part for all tasks at once and shrunk to the pool.

Binary tasks: Platt scaling (Platt 1999), `sigmoid(slope * log-odds + intercept)`. Multiclass tasks: temperature scaling (Guo et
al. 2017, arXiv:1706.04599, section 4.2), `softmax(log p / temperature)`. Slope and temperature are positive, so that a task's
ranking of rows stays. All tasks together give the pooled parameters; each task's own ones minimise its log loss on its
validation rows plus that of `strength` rows like those of the pool, in its second order at the pooled parameters. So a task
with few rows has about the pooled ones.

Whether that helps is asked of the validation part alone: its rows are dealt into five folds, all labels of a row into one, and
each fold is calibrated as the other four say. Binary tasks, or multiclass ones, are calibrated where that lowers the log loss
over all their labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mtrain.data.order import mix
from mtrain.errors import UserError
from mtrain.model.metrics import METRICS, Floats, Ints, Scored, ScoreOptions
from mtrain.report.say import say
from mtrain.tasks import TaskTable
from mtrain.train.run_dir import RunDir

FILE = "calibration.json"
LEAST_STRENGTH = 1e-3
STRENGTH = 100.0  # rows
FOLDS = 5
SMALLEST, LARGEST = 1e-30, 1 - 2**-24  # of a float32 probability whose log-odds are taken
PARAMETERS = ("slope", "intercept", "temperature")
_PARTS = {"cross_validated": f"valid, by {FOLDS} folds", "test": "test"}
_STEPS, _CLOSE = 100, 1e-8
_RIDGE = 1e-6  # curvature of a row of the pool where all its rows are certain

# Parameters [T, D] to each task's log loss [T], its gradient [T, D] and its expected second derivative [T, D, D].
Loss = Callable[[Floats], tuple[Floats, Floats, NDArray[np.float64]]]

# Log loss and calibration error of each task before and after, [T], and of all labels together at the end, [T + 1].
Effect = dict[str, Floats]


@dataclass(frozen=True)
class Calibration:
    """Parameters by task, `[T]`: 1, 0 and 1 where a task is not of the kind or has no validation rows of any task.

    Attributes:
        selected_step: of the model that it was fitted for.
        about: what else the file says: strength, pooled parameters, and the effect by family, cross-validated on the validation
            part and on the test part.
    """

    tasks: list[str]
    slope: Floats
    intercept: Floats
    temperature: Floats
    selected_step: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def none(tasks: Sequence[str]) -> Calibration:
        """That changes nothing."""
        one_T = np.ones(len(tasks))
        return Calibration(list(tasks), one_T, 0 * one_T, one_T)

    def of(self, tasks: Sequence[str]) -> Calibration:
        """The same for some tasks, in their order."""
        place = {name: t for t, name in enumerate(self.tasks)}
        at = [place[name] for name in tasks]
        return replace(self, tasks=list(tasks), **{name: getattr(self, name)[at] for name in PARAMETERS})

    def binary(self, p_P: Floats, task_P: Ints) -> Floats:
        """Calibrated probabilities of binary tasks."""
        return _sigmoid(self.slope[task_P] * log_odds(p_P) + self.intercept[task_P])

    def multiclass(self, p_PK: Floats, task_P: Ints) -> Floats:
        """Calibrated probabilities of multiclass tasks; 0 stays 0."""
        with np.errstate(divide="ignore"):
            return _softmax(np.log(p_PK) / self.temperature[task_P, None])

    def applied(self, scored: Scored) -> Scored:
        """The same labels with calibrated probabilities."""
        change = self.multiclass if scored.pred.ndim == 2 else self.binary
        return replace(scored, pred=change(scored.pred, scored.task_P))

    def save(self, run: RunDir) -> None:
        parameters = {name: getattr(self, name).tolist() for name in PARAMETERS}
        run.save_json(FILE, {"selected_step": self.selected_step, "task": self.tasks, **parameters, **self.about})

    @staticmethod
    def load(run: RunDir) -> Calibration | None:
        """That of a run; None where it has none.

        Raises:
            UserError: the run was trained on since.
        """
        if not (run.path / FILE).is_file():
            return None
        found = run.load_json(FILE)
        if found["selected_step"] != run.load_json("summary.json")["selected_step"]:
            raise UserError(
                f"run {run.path}: was trained on since it was calibrated: run mtrain calibrate again, or leave the "
                "calibration off with --no-calibration"
            )
        step, tasks = found.pop("selected_step"), found.pop("task")
        return Calibration(tasks, **{name: np.array(found.pop(name)) for name in PARAMETERS}, selected_step=step, about=found)


def calibrate(path: Path, console: Console, strength: float = STRENGTH, force: bool = False) -> None:
    """Fit the calibration of a run (of each of its split seeds) and show what it does to the validation part, cross-validated,
    and to the test part. It is kept for the families of tasks, binary and multiclass, whose cross-validated log loss over all
    labels is lower with it; where there is none, the run has no calibration afterwards, also where it had one.

    Args:
        force: keep it for all families.

    Raises:
        UserError: the run keeps no predictions of its validation part, or has no tasks with probabilities.
    """
    if not LEAST_STRENGTH <= strength < math.inf:
        raise UserError(f"--strength {strength:g}: expected a number of rows, at least {LEAST_STRENGTH:g}")
    for run in RunDir(path).splits():
        tasks = run.tasks()
        valid = _scored(run, "valid", tasks)
        if valid is None:
            raise UserError(
                f"run {run.path}: keeps no predictions of a validation part to fit calibration on; train with a valid part and "
                "with select.predictions above 0"
            )
        if not valid:
            raise UserError(f"run {run.path}: has no binary or multiclass tasks, so there are no probabilities to calibrate")
        fitted = fit(tasks.names, valid, strength)
        parts: dict[str, dict[str, Effect]] = {
            "cross_validated": {family: _effect(scored, cross_validated(scored, strength)) for family, scored in valid.items()}
        }
        if (test := _scored(run, "test", tasks)) is not None:
            parts["test"] = {family: _effect(scored, fitted.applied(scored)) for family, scored in test.items()}
        _show(valid, fitted, parts, console)
        kept = [family for family, of in parts["cross_validated"].items() if force or _lowers(of)]
        if left := [family for family in valid if family not in kept]:
            say(
                console,
                f"not kept for {' and '.join(left)} tasks: the cross-validated log loss over all labels of the valid part is "
                "not lower with it; --force keeps it",
            )
        if not kept:
            earlier = "; the calibration that it had is removed" if (run.path / FILE).is_file() else ""
            (run.path / FILE).unlink(missing_ok=True)
            say(console, f"run {run.path}: predict and export use the model's own probabilities{earlier}")
            continue
        of_kept = fit(tasks.names, {family: valid[family] for family in kept}, strength)
        about = {
            part: {f: {name: _plain(value) for name, value in of.items()} for f, of in by_family.items() if f in kept}
            for part, by_family in parts.items()
        }
        step = run.load_json("summary.json")["selected_step"]
        replace(of_kept, selected_step=step, about=of_kept.about | about).save(run)
        say(console, f"kept for {' and '.join(kept)} tasks in {run.path / FILE}: predict and export use it")


def cross_validated(scored: Scored, strength: float) -> Scored:
    """The same labels, with probabilities from calibration that has not seen their rows: each of `FOLDS` folds of rows by the
    fit of the others. Tasks with a prediction that is not finite are absent."""
    scored = scored.sound()
    assert scored.row_P is not None
    rows, place_P = np.unique(scored.row_P, return_inverse=True)
    fold_R = np.empty(len(rows), dtype=np.int64)
    fold_R[np.argsort(mix(rows.astype(np.uint64)))] = np.arange(len(rows)) % FOLDS
    fold_P, pred = fold_R[place_P], scored.pred.copy()
    family = "multiclass" if pred.ndim == 2 else "binary"
    names = [str(t) for t in range(scored.num_tasks)]
    for fold in range(FOLDS):
        held, rest = (
            Scored(scored.task_P[at], scored.y_P[at], scored.pred[at], scored.num_tasks)
            for at in (fold_P == fold, fold_P != fold)
        )
        pred[fold_P == fold] = fit(names, {family: rest}, strength).applied(held).pred
    return replace(scored, pred=pred)


def fit(tasks: Sequence[str], valid: dict[str, Scored], strength: float) -> Calibration:
    """The calibration of all tasks from their validation labels, by family."""
    parameters = {name: getattr(Calibration.none(tasks), name) for name in PARAMETERS}
    pool: dict[str, float] = {}
    if "binary" in valid:
        (slope_T, parameters["intercept"]), (slope, pool["intercept"]) = _platt(valid["binary"], strength)
        parameters["slope"], pool["slope"] = slope_T, slope
    if "multiclass" in valid:
        parameters["temperature"], pool["temperature"] = _temperature(valid["multiclass"], strength)
    return Calibration(list(tasks), **parameters, about={"strength": strength, "pool": pool})


def log_odds(p: Floats) -> Floats:
    p = np.clip(p, SMALLEST, LARGEST)
    return np.log(p) - np.log1p(-p)


def log_loss(scored: Scored) -> Floats:
    """Mean of -log(probability of what was observed) of each task [T]."""
    p = np.clip(scored.pred, SMALLEST, 1)
    if p.ndim == 2:
        return scored.mean_T(-np.log(p[np.arange(len(p)), scored.truth_P]))
    return scored.mean_T(np.where(scored.truth_P > 0, -np.log(p), -np.log1p(-np.clip(p, 0, LARGEST))))


def _platt(scored: Scored, strength: float) -> tuple[tuple[Floats, Floats], tuple[float, float]]:
    """Slope and intercept of each task, and the pooled ones."""

    def loss_of(scored: Scored) -> Loss:
        z_P, y_P, t_P = log_odds(scored.pred), scored.truth_P, scored.task_P

        def loss(theta_T2: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
            az_P = np.exp(theta_T2[t_P, 0]) * z_P
            u_P = az_P + theta_T2[t_P, 1]
            p_P = _sigmoid(u_P)
            rest_P, w_P = p_P - y_P, p_P * (1 - p_P)
            value_T = scored.sum_T(np.logaddexp(0, u_P) - y_P * u_P)
            gradient_T2 = np.stack([scored.sum_T(rest_P * az_P), scored.sum_T(rest_P)], -1)
            mixed_T = scored.sum_T(w_P * az_P)
            second_T4 = np.stack([scored.sum_T(w_P * az_P**2), mixed_T, mixed_T, scored.sum_T(w_P)], -1)
            return value_T, gradient_T2, second_T4.reshape(-1, 2, 2)

        return loss

    theta_T2, pool_2 = _shrunk(loss_of, scored, 2, strength)
    return (np.exp(theta_T2[:, 0]), theta_T2[:, 1]), (float(np.exp(pool_2[0])), float(pool_2[1]))


def _temperature(scored: Scored, strength: float) -> tuple[Floats, float]:
    """Temperature of each task, and the pooled one."""

    def loss_of(scored: Scored) -> Loss:
        with np.errstate(divide="ignore"):
            log_PK = np.log(scored.pred)
        truth_P = np.maximum(log_PK[np.arange(len(log_PK)), scored.truth_P], np.log(SMALLEST))
        finite_PK = np.where(np.isfinite(log_PK), log_PK, 0)

        def loss(theta_T1: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
            a_P = np.exp(theta_T1[scored.task_P, 0])
            u_PK = a_P[:, None] * log_PK
            p_PK = _softmax(u_PK)
            mean_P = (p_PK * finite_PK).sum(1)
            variance_P = (p_PK * (finite_PK - mean_P[:, None]) ** 2).sum(1)
            value_T = scored.sum_T(np.logaddexp.reduce(u_PK, axis=1) - a_P * truth_P)
            gradient_T1 = scored.sum_T(a_P * (mean_P - truth_P))[:, None]
            return value_T, gradient_T1, scored.sum_T(a_P**2 * variance_P)[:, None, None]

        return loss

    theta_T1, pool_1 = _shrunk(loss_of, scored, 1, strength)
    return np.exp(-theta_T1[:, 0]), float(np.exp(-pool_1[0]))


def _shrunk(loss_of: Callable[[Scored], Loss], scored: Scored, size: int, strength: float) -> tuple[Floats, Floats]:
    """Parameters `[T, D]` of each task, pulled to the pooled ones `[D]`, which are pulled to 0: the model as it is."""
    scored = scored.sound()
    pooled, rows = loss_of(scored.pooled()), max(1, len(scored.y_P))

    def prior(at_1D: Floats) -> Floats:
        return strength * (pooled(at_1D)[2][0] / rows + _RIDGE * np.eye(size))

    start = np.zeros((1, size))
    pool_1D = _minimised(pooled, start, prior(start))
    every_TD = np.tile(pool_1D, (scored.num_tasks, 1))
    return _minimised(loss_of(scored), every_TD, prior(pool_1D)), pool_1D[0]


def _minimised(loss: Loss, center_TD: Floats, prior_DD: Floats) -> Floats:
    """The minimum of `loss` plus half the square of the distance from `center_TD` in `prior_DD`, for each task: Newton's steps
    with the expected second derivative, halved where a task's objective would rise."""

    def objective(theta_TD: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
        value_T, gradient_TD, second_TDD = loss(theta_TD)
        away_TD = theta_TD - center_TD
        pull_TD = away_TD @ prior_DD
        return value_T + (away_TD * pull_TD).sum(-1) / 2, gradient_TD + pull_TD, second_TDD + prior_DD

    theta_TD = center_TD
    value_T, gradient_TD, second_TDD = objective(theta_TD)
    length_T = np.ones(len(theta_TD))
    for _ in range(_STEPS):
        step_TD = length_T[:, None] * np.linalg.solve(second_TDD, gradient_TD[..., None])[..., 0]
        tried = objective(theta_TD - step_TD)
        falls_T = tried[0] <= value_T
        length_T = np.where(falls_T, 1.0, length_T / 2)
        theta_TD = np.where(falls_T[:, None], theta_TD - step_TD, theta_TD)
        value_T = np.where(falls_T, tried[0], value_T)
        gradient_TD = np.where(falls_T[:, None], tried[1], gradient_TD)
        second_TDD = np.where(falls_T[:, None, None], tried[2], second_TDD)
        if np.abs(step_TD).max(initial=0) < _CLOSE:
            break
    return theta_TD


def _scored(run: RunDir, part: str, tasks: TaskTable) -> dict[str, Scored] | None:
    """Labels and predictions of a part that the run keeps, by family."""
    table = run.predictions(part)
    if table is None:
        return None
    code_T = pa.array(tasks.names)
    task_P = pc.index_in(table["task"].cast(pa.string()), code_T).to_numpy().astype(np.int64)
    family_T = np.array([task.kind.family for task in tasks])
    found = {}
    for family in ("binary", "multiclass"):
        rows = np.flatnonzero(family_T[task_P] == family)
        if not len(rows):
            continue
        pred: Floats = table["prediction"].to_numpy()[rows].astype(np.float64)
        if family == "multiclass":
            lists = table["probabilities"].take(rows).combine_chunks()
            sizes_P = pc.list_value_length(lists).to_numpy().astype(np.int64)
            pred = np.zeros((len(rows), int(sizes_P.max())))
            pred[np.arange(pred.shape[1]) < sizes_P[:, None]] = lists.flatten().to_numpy()
        label_P = table["label"].to_numpy()[rows].astype(np.float64)
        found[family] = Scored(task_P[rows], label_P, pred, len(tasks), table["row"].to_numpy()[rows])
    return found


def _lowers(of: Effect) -> bool:
    return bool(of["log_loss_after"][-1] < of["log_loss_before"][-1])


def _effect(scored: Scored, after: Scored) -> Effect:
    scored, after = scored.sound(), after.sound()
    ece = METRICS["multiclass" if scored.pred.ndim == 2 else "binary"]["ece"]
    found = {}
    for when, which in (("before", scored), ("after", after)):
        with np.errstate(invalid="ignore"):
            found[f"log_loss_{when}"] = np.append(log_loss(which), log_loss(which.pooled()))
        of_tasks = ece.per_task(which, ScoreOptions())
        assert of_tasks is not None
        found[f"ece_{when}"] = np.append(of_tasks, ece.pooled(which, ScoreOptions()))
    return found


def _show(valid: dict[str, Scored], fitted: Calibration, parts: dict[str, dict[str, Effect]], console: Console) -> None:
    pool = ", ".join(f"{name} {value:.3f}" for name, value in sorted(fitted.about["pool"].items(), reverse=True))
    counts = ", ".join(f"{int((s.count_T > 0).sum())} {family} tasks, {len(s.y_P)} labels" for family, s in valid.items())
    say(
        console,
        f"calibrated on the valid part ({counts}); pooled: {pool}; pulled to the pool by {fitted.about['strength']:g} rows",
    )
    for family in valid:
        table = Table(title=family, title_justify="left", box=None, pad_edge=False)
        for i, name in enumerate(("", "pooled before", "after", "mean of tasks before", "after", "tasks better", "worse")):
            table.add_column(name, justify="right" if i else "left")
        for part, by_family in parts.items():
            if (of := by_family.get(family)) is None:
                continue
            for metric, text in (("log_loss", "log loss"), ("ece", "calibration error")):
                before, after = of[f"{metric}_before"], of[f"{metric}_after"]
                better, worse = (int((sign * (before - after)[:-1] > 1e-6).sum()) for sign in (1, -1))
                means = [f"{value:.4f}" for value in (before[-1], after[-1], np.nanmean(before[:-1]), np.nanmean(after[:-1]))]
                table.add_row(f"{_PARTS[part]}: {text}", *means, str(better), str(worse))
        console.print(table)
    if "test" not in parts:
        say(console, "the run keeps no predictions of a test part: the effect on it is not shown")


def _plain(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _sigmoid(u: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.exp(-np.logaddexp(0, -u))


def _softmax(u_PK: Floats) -> Floats:
    return np.exp(u_PK - np.logaddexp.reduce(u_PK, axis=1)[:, None])
