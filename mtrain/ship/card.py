"""The model card of an exported model (Mitchell et al. 2019, arXiv:1810.03993), from what the run says of itself."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from datetime import date
from typing import Any

import pandas as pd
import torch

from mtrain.config import Config
from mtrain.errors import some
from mtrain.model.metrics import METRICS
from mtrain.runs import LoadedModel
from mtrain.ship.predictor import INPUT, ONNX, PROGRAM, VALUES
from mtrain.ship.values import Values
from mtrain.train.evaluate import HIGHER_IS_BETTER, SKILL_FLOOR
from mtrain.train.run_dir import RunDir

FEW = 30  # training labels


def model_card(
    run: RunDir, config: Config, model: LoadedModel, values: Values, about: Mapping[str, Any], checked: Mapping[str, float]
) -> str:
    """The card as Markdown.

    Args:
        about: what predictor.json holds.
        checked: largest difference from the model, by backend.
    """
    summary = run.load_json("summary.json")
    per_task = None
    if (run.path / "per_task.parquet").is_file():
        per_task = pd.read_parquet(run.path / "per_task.parquet").set_index("task").reindex(model.tasks.names)
    parts = [
        f"# Model card: {run.path.resolve().name}",
        _what(config, model, values, about, summary),
        _data(config, summary),
        _scores(config, per_task, summary),
        _limits(model, per_task, summary),
        _use(values, about, checked),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(config: Config, model: LoadedModel, values: Values, about: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    kinds = Counter(task.kind.name for task in model.tasks)
    columns = [
        f"- {some([f'`{name}`' for name in item.columns])}: {item.spec.class_path}, {item.feature.width} numbers"
        for item in model.features
    ]
    shared = sum(p.numel() for p in values.shared.parameters())
    heads = sum(p.numel() for p in values.bank.parameters())
    how = ""
    if any(task.kind.family != "regression" for task in model.tasks):
        said = (
            "calibrated on the validation part where that lowers their log loss"
            if values.calibrated
            else "as the model gives them, not calibrated"
        )
        how = f" Probabilities are {said}."
    return "\n".join(
        [
            f"{len(model.tasks)} tasks of {summary['tasks']} that were trained together: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            + f" ({some(model.tasks.names)}).",
            "",
            f"One shared network ({config.model.trunk.class_path}, {shared:,} parameters) and a head for each task ({heads:,} "
            f"parameters).{how} Values of regression tasks are in the units of the labels.",
            "",
            "Inputs:",
            "",
            *columns,
            "",
            f"Exported {date.today().isoformat()} by mtrain {about['mtrain']} with torch {torch.__version__} and Python "
            f"{platform.python_version()}, from step {about['step']} of the run.",
        ]
    )


def _data(config: Config, summary: Mapping[str, Any]) -> str:
    path = config.data.table or config.data.path
    rows = ", ".join(f"{part} {count:,}" for part, count in summary["rows"].items())
    labels = ", ".join(f"{part} {count:,}" for part, count in summary["labels"].items())
    lines = [
        "## Data",
        "",
        f"- Source: `{path}`, layout {config.data.layout}.",
        f"- Split: {config.split.by}, seed {config.split.seeds[0]}, hash {summary['split_hash']}"
        + (", the model was trained again on train and valid" if config.split.refit else "")
        + ".",
        f"- Rows: {rows}. Labels: {labels}.",
    ]
    if (seen := summary.get("test_inputs_seen_in_training")) is not None:
        lines.append(f"- Test inputs that also occur in training: {seen:.1%}.")
    return "\n".join(lines + [f"- {note}." for note in summary.get("notes", [])])


def _scores(config: Config, per_task: pd.DataFrame | None, summary: Mapping[str, Any]) -> str:
    """The metrics of the exported tasks, and the best and worst of them."""
    part = next((part for part in ("test", "valid") if part in summary), None)
    if part is None or per_task is None:
        return "## Scores\n\nThe run scored no part."
    names = ["skill", *dict.fromkeys(name for family in METRICS.values() for name in family)]
    chosen = part == "test" and config.select.checkpoint == "best"
    by = f"; the model was selected by {config.select.metric} ({config.select.reduce}) on the valid part" if chosen else ""
    lines = [
        "## Scores",
        "",
        f"On the {part} part, over the exported tasks, before calibration{by}. `skill` is 1 - deviance / deviance of the best "
        f"constant: 0 is a constant, 1 is perfect; below {SKILL_FLOOR:g} it counts as that in means.",
        "",
        "| metric | mean | median | worst decile | tasks |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        if (column := f"{part}_{name}") not in per_task or not (found := per_task[column].dropna()).size:
            continue
        if name == "skill":
            found = found.clip(lower=SKILL_FLOOR)
        ordered = found.sort_values(ascending=HIGHER_IS_BETTER[name])
        worst = ordered.iloc[: max(1, len(ordered) // 10)].mean()
        lines.append(f"| {name} | {found.mean():.4f} | {found.median():.4f} | {worst:.4f} | {len(found)} |")
    skill = per_task[f"{part}_skill"].dropna().sort_values()
    if len(skill):
        for what, few in (("Least", skill.iloc[:5]), ("Most", skill.iloc[::-1].iloc[:5])):
            lines += ["", f"{what} skill: " + ", ".join(f"{task} {value:.3f}" for task, value in few.items()) + "."]
    return "\n".join(lines)


def _limits(model: LoadedModel, per_task: pd.DataFrame | None, summary: Mapping[str, Any]) -> str:
    lines = [
        "## Limits",
        "",
        "- Scores hold for rows like those of the split above. Other sources, times or ranges of the inputs were not looked "
        "at, nor were groups of people: look at them before decisions rest on the model.",
        "- Missing and unseen values are filled or coded as in training; nothing warns of inputs unlike those of training.",
        "- Thresholds maximise F1 on the validation part. Choose your own where errors differ in cost.",
    ]
    few = [name for name, count in zip(model.tasks.names, model.tasks.stats["train_labels"], strict=True) if count < FEW]
    if few:
        lines.append(f"- {len(few)} tasks have fewer than {FEW} training labels: {some(few)}.")
    if per_task is not None:
        part = next((part for part in ("test", "valid") if part in summary), "test")
        skill = per_task.get(f"{part}_skill", pd.Series(dtype=float))
        poor = skill.index[skill <= 0].tolist()
        if poor:
            lines.append(
                f"- {len(poor)} tasks are no better than a constant on the {part} part: {some(poor)}. Do not use them."
            )
        unscored = skill.index[skill.isna()].tolist()
        if unscored:
            lines.append(f"- {len(unscored)} tasks have no skill that could be computed there: {some(unscored)}.")
    return "\n".join(lines)


def _use(values: Values, about: Mapping[str, Any], checked: Mapping[str, float]) -> str:
    found = ", ".join(f"{backend} {error:.1e}" for backend, error in checked.items())
    numbers = sum(len(output.values) for output in values.outputs)
    onnx = ' or backend="onnx"' if "onnx" in checked else ""
    files = f"`{PROGRAM}`" + (f" and `{ONNX}`" if "onnx" in checked else "")
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            "from mtrain.ship import Predictor",
            "",
            f'predictor = Predictor.load("FOLDER")  # backend="torch"{onnx}',
            "predictions = predictor.predict(table)  # a data frame, an Arrow table, or the path of a Parquet or CSV file",
            "```",
            "",
            f"{files}: `{INPUT}`, float32 [rows, {about['width']}] as `features.json` says, to `{VALUES}`, float64 "
            f"[rows, {numbers}]: their names are in `predictor.json`, the tasks' statistics and thresholds in `tasks.parquet`. "
            f"Largest difference from the trained model on sample rows, of a standard deviation or 1 plus the value: {found}.",
        ]
    )
