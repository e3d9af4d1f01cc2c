"""One run on one split: train, evaluate, select, refit if asked, score the test part once."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, DistributedType
from numpy.typing import NDArray
from rich.console import Console

from mtrain import __version__
from mtrain.balance import BALANCERS
from mtrain.balance.base import Balancer, Facts
from mtrain.components import build
from mtrain.config import Config, TrainConfig
from mtrain.data.batch import Grid, Pairs
from mtrain.data.loader import Loader, Part, build_streams
from mtrain.data.prepare import Prepared
from mtrain.data.samplers import SAMPLERS, Equal, Sampler, draw
from mtrain.errors import UserError, some
from mtrain.model.head_options import forms_by_name, head_forms, head_gate, of_members
from mtrain.model.heads import HeadBank
from mtrain.model.trunks import SharedModel, check_features, check_tasks, shared_network
from mtrain.parallel.plan import make_plan
from mtrain.parallel.shard import Shard
from mtrain.parallel.workload import workload
from mtrain.parallel.world import World
from mtrain.parallel.wrap import prepare
from mtrain.report.affinity import affinity_tables
from mtrain.report.progress import TrainingProgress
from mtrain.report.say import say
from mtrain.tasks import TaskTable
from mtrain.train.balancing import LEVELS, Balancing, quantiles
from mtrain.train.checkpoint import Saved, Snapshot
from mtrain.train.evaluate import HIGHER_IS_BETTER, Evaluator, Scores, check_metric, flatten
from mtrain.train.objective import Objective, coefficients, expected_share
from mtrain.train.optim import HeadAdamW
from mtrain.train.run_dir import RunDir
from mtrain.train.state import by_task, head_stacks, trunk_tensors
from mtrain.train.step import Stepper, Totals, count
from mtrain.train.stop import Preempted, stop_signals
from mtrain.train.task_gradients import make_task_gradients, refuse_unused
from mtrain.train.tracker import Tracker

DEFAULT_EPOCHS = 30.0
MEMBER = ", member "  # between a task's name and the number of a member, in the names of an ensemble's heads


def build_bank(tasks: TaskTable, config: Config, shared: SharedModel, own: NDArray[np.int64] | None = None) -> HeadBank:
    """The heads of all tasks, or of a rank's `own`; for a trunk with several members, of all these tasks and members."""
    head, members = config.model.head, range(shared.members)
    bank = HeadBank(
        [name if m == 0 else f"{name}{MEMBER}{m}" for m in members for name in tasks.names],
        tasks.num_outputs_T.tolist() * len(members),
        shared.features,
        activation=head.activation,
        dropout=head.dropout,
        keys=[(m, task.kind.group_key) for m in members for task in tasks],
        seed=config.train.seed,
        here=None if own is None else [int(m * len(tasks) + t) for m in members for t in own],
        forms=of_members(head_forms(tasks.names, config), shared.members),
        gate=head_gate(config),
        scale_shift=head.scale_shift,
    )
    if own is not None:
        tasks = tasks.take(own)
    with torch.no_grad():
        for number, group in enumerate(bank.groups):
            if group.fixed:
                continue
            if head.toward_shared:
                for stack, start in zip(group.parameters(), bank.common_start(number), strict=True):
                    stack.copy_(start.expand_as(stack))
                for stack, pad in zip(group.parameters(), group.padding(), strict=True):
                    if pad is not None:
                        stack.masked_fill_(pad, 0)
            if head.bias == "constant":
                constants = [tasks.stats["constant"][int(t) % len(tasks)] for t in group.task_ids]
                for bias, logits in zip(group.biases[-1], constants, strict=True):
                    bias[: len(logits)] = torch.from_numpy(np.nan_to_num(logits))
    return bank


def build_sampler(config: Config, steps: int) -> Sampler:
    """How often each task is drawn in a run of so many steps."""
    return build(config.sampler, SAMPLERS, "sampler", budget=steps * config.train.global_batch)


def sampling_probabilities(prepared: Prepared, config: Config) -> NDArray[np.float64] | None:
    """Probability of each task in the first training batches; None where rows are not drawn by task."""
    if not config.data.by_task:
        return None
    part = prepared.parts["train"]
    rows_T = part.labels.count_T().numpy()
    steps = training_steps(config.train, part.num_rows)
    return draw(build_sampler(config, steps), rows_T)


def build_loader(
    prepared: Prepared, config: Config, part: Part, device: torch.device | None = None, shard: Shard | None = None
) -> Loader:
    """The training batches of a part: drawn by task where a row belongs to one. Without a shard, of one process."""
    by_task = config.data.by_task
    size, seed = config.train.global_batch, config.train.seed
    if not by_task:
        size = min(size, part.num_rows)
    streams = build_streams(part, prepared.inputs, prepared.tasks.names if by_task else None, seed)
    steps = training_steps(config.train, part.num_rows)
    return Loader(
        prepared.inputs,
        part,
        streams,
        build_sampler(config, steps) if by_task else Equal(),
        size,
        seed,
        shard=shard,
        micro_batches=-(-size // (config.train.micro_batch or size)),
        device=device,
        skip_changed=config.data.on_error == "skip_task",
    )


def joined(parts: list[Part], num_tasks: int) -> Part:
    """Parts as one: the training rows of a refit."""
    rows = torch.cat([part.row_R for part in parts])
    row_R, position = torch.unique(rows, return_inverse=True)
    pairs = [part.labels.pairs() for part in parts]
    offsets = np.cumsum([0, *(part.num_rows for part in parts)])
    row_P = torch.cat([position[p.row_P + int(offset)] for p, offset in zip(pairs, offsets, strict=False)])
    weights = [p.weight_P for p in pairs if p.weight_P is not None]
    labels = Pairs.of(
        row_P,
        torch.cat([p.task_P for p in pairs]),
        torch.cat([p.y_P for p in pairs]),
        torch.cat(weights) if weights else None,
        len(row_R),
        num_tasks,
    )
    return Part(row_R, labels.grid() if not isinstance(parts[0].labels, Pairs) else labels)


@dataclass
class Selection:
    """The best evaluation so far."""

    higher_is_better: bool
    value: float = math.nan
    step: int = 0
    steps_per_epoch: int = 1
    misses: int = 0

    def improves(self, value: float) -> bool:
        """Record an evaluation's value; NaN counts as no improvement."""
        better = math.isnan(self.value) or (value > self.value if self.higher_is_better else value < self.value)
        if better and not math.isnan(value):
            self.value, self.misses = value, 0
            return True
        self.misses += 1
        return False


@dataclass
class Phase:
    """A stretch of training: `fit` selects on the validation part, `refit` repeats it on train + valid."""

    name: str
    part: Part
    offset: int
    """Steps of the run before this phase."""
    total_steps: int
    """End of the learning rate's course."""
    stop_step: int
    eval_every: int
    steps_per_epoch: int
    loader: Loader = field(repr=False)


class Trainer:
    """Everything of one run on one split. `run()` trains (or continues) and returns the summary. Every rank has one.

    `asked` gives the number of a signal that asks to stop, if one came.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: Config,
        run_dir: RunDir,
        accelerator: Accelerator,
        world: World,
        tracker: Tracker,
        console: Console,
        asked: Callable[[], int | None] = lambda: None,
    ):
        self.prepared, self.config, self.run_dir = prepared, config, run_dir
        self.accelerator, self.world, self.tracker, self.console = accelerator, world, tracker, console
        self.tasks, self.asked = prepared.tasks, asked
        self.sampling_T = sampling_probabilities(prepared, config)
        self.run_id: str | None = None
        self.seconds = self.waited = self.in_steps = 0.0
        self.rows = 0
        check_metric(config.select.metric, self.tasks)
        self._build(anew=not run_dir.has_trained)
        self.selection = Selection(HIGHER_IS_BETTER[config.select.metric])

    def _build(self, anew: bool) -> None:
        """Model, optimizers and step at their start, where a refit begins again; `anew`: no checkpoint is put in after it."""
        config, train, device = self.config, self.config.train, self.accelerator.device
        self.accelerator.free_memory()
        self.bad_steps = 0
        self.shared: SharedModel = shared_network(config, self.prepared.widths, self.tasks.names)
        check_features(self.shared, [item.feature for item in self.prepared.features], self.prepared.inputs)
        self.work = workload(self.tasks, self.prepared.parts["train"].labels, config, self.shared, self.sampling_T)
        self.plan = make_plan(self.work, self.world.size)
        self.shard = Shard(self.world, self.plan)
        self.bank = build_bank(self.tasks, config, self.shared, self.shard.own).to(device)
        if config.init_from and anew:
            self.taken = load_start(RunDir(Path(config.init_from)), config, self.tasks, self.shared, self.bank)
        if "trunk" in config.freeze:
            self.shared.requires_grad_(False).eval()
        parameters = [p for p in self.shared.parameters() if p.requires_grad]
        self.trunk_optimizer = None
        if parameters:
            self.trunk_optimizer = torch.optim.AdamW(
                parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
            )
        self.head_optimizer = None
        if "heads" in config.freeze:
            self.bank.eval()
        else:
            decay = train.head_weight_decay
            self.head_optimizer = HeadAdamW(
                self.bank,
                lr=train.head_lr or train.lr,
                betas=train.betas,
                weight_decay=train.weight_decay if decay is None else decay,
                max_norm=train.head_clip,
            )
        if self.trunk_optimizer is None and self.head_optimizer is None:
            raise UserError("freeze: trunk and heads are both frozen or empty; nothing is left to train")
        if self.trunk_optimizer is not None:
            model, self.trunk_optimizer = prepare(self.accelerator, self.shared, self.trunk_optimizer)
        else:
            model = self.shared.to(device)
        if train.compile:
            model = torch.compile(model)
        own_tasks = self.tasks if self.shard.has_all else self.tasks.take(self.shard.own)
        self.objective = Objective(own_tasks, self.bank, device)
        balancing = self._balancing()
        coefficient_T = coefficients(self.tasks, config.objective, self.sampling_T)
        self.stepper = Stepper(
            self.accelerator,
            model,
            self.bank,
            self.shard,
            self.objective,
            torch.tensor(coefficient_T, dtype=torch.float32, device=device),
            balancing,
            self.trunk_optimizer,
            self.head_optimizer,
            train,
            config.model.head,
            own_tasks.stats["train_labels"],
            self.shared.members,
            self.shared.takes_step,
        )
        self.optimizers = [o for o in (self.trunk_optimizer, self.head_optimizer) if o is not None]
        self.base_lrs = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self.evaluator = Evaluator(
            self.tasks, model, self.bank, self.objective, self.shard, config.data.by_task, config.select.min_per_class, device
        )

    def _balancing(self) -> Balancing:
        """The balancer of the config, with what it needs.

        Raises:
            UserError: it is not one, or needs gradients that this model does not give.
        """
        config, device = self.config.objective, self.accelerator.device
        balancer = build(config.balancer, BALANCERS, "objective.balancer")
        name = config.balancer.class_path
        if not isinstance(balancer, Balancer):
            raise UserError(f"objective.balancer: '{name}' is not a mtrain.balance.base.Balancer; derive it from that class")
        facts = Facts(
            self.tasks.names,
            torch.tensor([task.kind.standardized for task in self.tasks], device=device),
            torch.tensor(expected_share(self.tasks, config, self.sampling_T), dtype=torch.float32, device=device),
            device,
        )
        gradients, needs = None, balancer.needs
        if needs != "losses" or config.balancing.affinity:
            gradients = make_task_gradients(
                name if needs != "losses" else "balancing.affinity",
                needs == "gram" or config.balancing.affinity,
                self.shared,
                self.bank,
                self.shard,
                self.config.data.by_task,
                isinstance(self.prepared.parts["train"].labels, Grid),
                config.balancing,
                self.config.train.global_batch,
                whole_trunk=not (self.config.train.compile or self.accelerator.distributed_type is DistributedType.FSDP),
            )
        else:
            refuse_unused(name, config.balancing)
        return Balancing(balancer, facts, config.balancing, gradients, self.shard)

    def run(self, start: Saved | None = None) -> dict[str, Any]:
        """Train from a checkpoint of this run, or from the start."""
        state = None if start is None else start.state
        if "trunk" in self.config.freeze and not self.config.init_from and list(self.shared.parameters()):
            say(self.console, "note: freeze: without init_from the trunk stays as it was built, random or as it loaded itself")
        if self.config.init_from and state is None:
            fresh = len(self.tasks) - len(self.taken)
            self.console.print(f"init_from: trunk and {len(self.taken)} heads taken over, heads that start fresh: {fresh}")
        if state is not None:
            vars(self.selection).update(state["selection"])
            there = self.world.from_first(self.selection.step in self.run_dir.checkpoints.steps())
            if set(state["tasks"]) != set(self.tasks.names) or not there:
                # what was selected has no heads of new tasks, or is in another run directory: select anew
                self.selection.value, self.selection.misses = math.nan, 0
            self.seconds, self.rows, self.run_id = state["seconds"], state["rows"], state["run_id"]
            self.waited, self.in_steps = state["waited"], state["in_steps"]
        config = self.config.model_dump(mode="json") | {"versions": {"mtrain": __version__, "torch": torch.__version__}}
        self.run_id = self.world.from_first(self.tracker.start(self.accelerator, self.run_dir.path, config, self.run_id))
        try:
            summary = self._run(start)
            self.tracker.complete()
            return summary
        finally:
            self.tracker.finish()

    def _run(self, start: Saved | None) -> dict[str, Any]:
        parts, inputs = self.prepared.parts, self.prepared.inputs
        in_refit = start is not None and start.state["phase"] == "refit"
        steps = start.state["offset"] if start is not None and in_refit else 0
        if not in_refit:
            steps = self._train(self._phase("fit", parts["train"], 0), start)
        if self.selection.step != steps or in_refit:
            self._load_model(self.run_dir.checkpoints.at(self.selection.step))
        scores: dict[str, Scores] = {}
        if "valid" in parts:
            scores["valid"] = self.evaluator.score(inputs, parts["valid"], choose_threshold=True, keep=self._keep("valid"))
        if self.config.split.refit:
            self._build(anew=not in_refit)
            phase = self._phase("refit", joined([parts["train"], parts["valid"]], len(self.tasks)), steps)
            steps = self._train(phase, start if in_refit else None)
        if "test" in parts:
            threshold_T = scores["valid"].threshold_T if scores else None
            scores["test"] = self.evaluator.score(inputs, parts["test"], threshold_T=threshold_T, keep=self._keep("test"))
        return self._finish(scores, steps)

    def _keep(self, part: str) -> Callable[[pa.Table], None] | None:
        """What keeps the predictions of a part."""
        most = self.config.select.predictions
        return partial(self.run_dir.save_predictions, part, most) if most else None

    def _phase(self, name: str, part: Part, offset: int) -> Phase:
        train = self.config.train
        loader = build_loader(self.prepared, self.config, part, self.accelerator.device, self.shard)
        per_epoch = loader.steps_per_epoch
        total = training_steps(train, part.num_rows)
        stop = total
        if name == "refit":  # as many passes as the selected step had, on the same course of the learning rate
            growth = 1.0 if train.steps else per_epoch / self.selection.steps_per_epoch
            stop = max(1, round(self.selection.step * growth))
        return Phase(name, part, offset, total, stop, max(1, round(train.eval_every * per_epoch)), per_epoch, loader)

    def _train(self, phase: Phase, start: Saved | None) -> int:
        """Train a phase to its end; returns the number of its last step.

        Raises:
            Preempted: a signal asked to stop; the step was finished and a checkpoint written.
        """
        step, select, every = 0, self.config.select, self.config.train.save_every
        totals = Totals(len(self.tasks), self.accelerator.device)
        if start is not None:
            step = start.state["step"]
            self._load_state(start, phase, totals)
            left_out = list(phase.loader.dropped)
            without = f" without {len(left_out)} tasks that are left out: {some(left_out)}" if left_out else ""
            say(self.console, f"continuing at step {step} of {phase.stop_step}{without}")
        for line in self.run_dir.cut_log(phase.offset + step):
            if start is not None:  # a tracker may have lost what it had not written yet when a process was killed
                self.tracker.log({k: v for k, v in line.items() if isinstance(v, int | float)}, line["step"])
        evaluates = phase.name == "fit" and "valid" in self.prepared.parts
        title = {"fit": "training", "refit": "refitting"}[phase.name]
        metric = f"{select.reduce} {select.metric}" if evaluates else ""
        saved, checkpoints = time.monotonic(), self.run_dir.checkpoints
        with (
            closing(phase.loader),
            TrainingProgress(self.console, title, step, phase.stop_step, metric) as progress,
            stop_signals("SIGINT") as interrupted,
        ):
            while step < phase.stop_step and not (evaluates and self._out_of_patience()):
                started = time.monotonic()
                known = len(phase.loader.dropped)
                batch = phase.loader.batch(step)
                totals.waited += time.monotonic() - started
                if len(phase.loader.dropped) > known:
                    self._print_dropped(phase.loader.dropped, known, phase.offset + step)
                signals = self.world.sum_numbers(*count(batch), bool(self.asked() or interrupted()), checkpoints.writing)
                num_labels, num_rows, stop, writing = map(int, signals)
                if checkpoints.in_flight and not writing:
                    self._report(checkpoints.commit())
                self._set_lr(step, phase.total_steps)
                self.stepper(batch, step, totals, num_labels, num_rows)
                totals.seconds += time.monotonic() - started
                step += 1
                progress.update(step)
                due = step % phase.eval_every == 0 or step == phase.stop_step
                if due and evaluates:
                    self._evaluate(phase, step, progress)
                last = step == phase.stop_step or (evaluates and self._out_of_patience())
                if step % self.config.train.log_every == 0 or last:
                    self._log(phase, step, totals, progress)
                    totals = Totals(len(self.tasks), self.accelerator.device)
                if due or stop or (every is not None and step % every == 0):
                    self.seconds += time.monotonic() - saved
                    saved = time.monotonic()
                    if last and phase.name == "fit" and not evaluates:
                        self.selection.step, self.selection.steps_per_epoch = step, phase.steps_per_epoch
                    self._save(phase, step, totals, last)
                if stop:
                    self._leave(phase.offset + step, self.asked() or interrupted())
            if any(self.world.sum_numbers(bool(self.asked() or interrupted()))):  # a signal came in the last step or evaluation
                self._leave(phase.offset + step, self.asked() or interrupted())
        if (failure := checkpoints.finish()) is not None:
            raise UserError(f"{failure}; free space and start again")
        if left_out := list(phase.loader.dropped):
            self.prepared.notes.append(f"{len(left_out)} tasks were left out while {title}: {some(left_out)}")
        return phase.offset + step

    def _leave(self, step: int, number: int | None) -> None:
        """Stop because a signal came, here or on another rank."""
        failure = self.run_dir.checkpoints.finish()
        number = max(self.world.gather_objects(number or 0))
        if failure is not None:
            raise UserError(f"{failure}; free space and start again")
        say(self.console, f"step {step} is saved; the same command continues the run")
        raise Preempted(number, step)

    def _report(self, failure: str | None) -> None:
        if failure is not None:
            say(self.console, f"{failure}; training goes on")

    def _print_dropped(self, dropped: dict[str, int], known: int, step: int) -> None:
        names, reasons = list(dropped)[known:], self.prepared.inputs.notes()
        why = f"; {reasons[-1]}" if reasons else ""
        say(
            self.console,
            f"step {step}: {len(names)} tasks are left out from here on, {len(dropped)} in all: {some(names)}{why}",
        )

    def _out_of_patience(self) -> bool:
        patience = self.config.select.patience
        return patience is not None and self.selection.misses >= patience

    def _evaluate(self, phase: Phase, step: int, progress: TrainingProgress) -> None:
        select = self.config.select
        scores = self.evaluator.score(self.prepared.inputs, self.prepared.parts["valid"], only={select.metric})
        value = scores.value(select.metric, select.reduce)
        if self.selection.improves(value) or select.checkpoint == "last":
            self.selection.step, self.selection.steps_per_epoch = step, phase.steps_per_epoch
        elif math.isnan(self.selection.value):
            raise UserError(
                f"select.metric: no task of the valid part can be scored by {select.metric} ({select.reduce}); "
                "choose another metric or a larger part"
            )
        values = flatten(scores.summary, "valid")
        self.run_dir.log({"step": phase.offset + step, "phase": phase.name, **values})
        self.tracker.log(values, phase.offset + step)
        self._log_tasks(scores, phase.offset + step)
        progress.evaluated(step, value, scores.per_task["skill"], self.tasks.names)

    def _log_tasks(self, scores: Scores, step: int) -> None:
        """Keep an evaluation's values of each task."""
        none_T = np.full(len(self.tasks), np.nan)
        columns = {
            "task": np.array(self.tasks.names, dtype=object),
            "skill": scores.per_task["skill"],
            "metric": scores.per_task.get(self.config.select.metric, none_T),
            "loss": scores.per_task["deviance"],
            "weight": self.stepper.balancing.weight_T.double().cpu().numpy(),
        }
        self.run_dir.add_history(step, columns)
        for name in ("skill", "weight"):
            self.tracker.log_histogram(f"tasks/{name}", columns[name], step)
        worst_first = np.argsort(columns["skill"])
        self.tracker.log_table("tasks/valid", {name: values[worst_first] for name, values in columns.items()}, step)

    def _log(self, phase: Phase, step: int, totals: Totals, progress: TrainingProgress) -> None:
        """Write a line of the curve, and stop where too many steps were not finite."""
        loss = float(totals.loss) / max(totals.steps, 1)
        line: dict[str, Any] = {
            "step": phase.offset + step,
            "phase": phase.name,
            "epoch": step / phase.steps_per_epoch,
            "loss": loss if math.isfinite(loss) else None,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "rows_per_second": totals.rows / totals.seconds if totals.seconds else 0.0,
            "data_wait": totals.waited / totals.seconds if totals.seconds else 0.0,
        }
        line |= self.stepper.balancing.summary()
        labels = totals.labels_T.double() / max(totals.steps, 1)
        line |= {f"labels_{name}": value for name, value in zip(LEVELS, quantiles(labels), strict=True)}
        self.rows += totals.rows
        self.waited, self.in_steps = self.waited + totals.waited, self.in_steps + totals.seconds
        bad_task_steps, num_bad = int(totals.bad_T.max()), int((totals.bad_T > 0).sum())
        if bad_task_steps or totals.skipped:
            line |= {"bad_task_steps": bad_task_steps, "bad_tasks": num_bad, "skipped_steps": totals.skipped}
            worst = self.tasks[int(totals.bad_T.argmax())].name + (f"' and {num_bad - 1} more" if num_bad > 1 else "'")
            for what, count in ((f"the loss of task '{worst}", bad_task_steps), ("the trunk's gradient", totals.skipped)):
                if count:
                    say(
                        self.console,
                        f"step {phase.offset + step}: {what} was not finite in {count} of the last {totals.steps} steps "
                        "and was left out",
                    )
        self.run_dir.log(line)
        self.tracker.log({k: v for k, v in line.items() if isinstance(v, int | float)}, phase.offset + step)
        self.tracker.log_histogram("tasks/labels_per_step", labels.cpu().numpy(), phase.offset + step)
        progress.update(
            step,
            loss=loss,
            rows=line["rows_per_second"],
            wait=line["data_wait"],
            memory=peak_memory_mb(self.accelerator.device),
        )
        self.bad_steps += bad_task_steps + totals.skipped
        if self.bad_steps > self.config.train.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} steps had a loss or gradient that was not finite, more than "
                f"train.max_bad_steps ({self.config.train.max_bad_steps}); lower train.lr or set train.clip"
            )

    def _set_lr(self, step: int, total: int) -> None:
        factor = lr_factor(step, total, self.config.train.warmup, self.config.train.decay)
        for optimizer, lrs in zip(self.optimizers, self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor

    def _load_model(self, saved: Saved) -> None:
        saved.copy_into(trunk_tensors(self.shared))
        saved.copy_heads(head_stacks(self.bank))

    def _save(self, phase: Phase, step: int, totals: Totals, last: bool) -> None:
        state = {
            "phase": phase.name,
            "step": step,
            "offset": phase.offset,
            "total_steps": phase.total_steps,
            "tasks": self.tasks.names,
            "totals": vars(totals),
            "bad_steps": self.bad_steps,
            "stepper": self.stepper.state_dict(),
            "loader": phase.loader.state_dict(),
            "selection": vars(self.selection),
            "seconds": self.seconds,
            "waited": self.waited,
            "in_steps": self.in_steps,
            "rows": self.rows,
            "run_id": self.run_id,
        }
        snapshot = Snapshot(
            trunk_tensors(self.shared, self.trunk_optimizer),
            head_stacks(self.bank, self.head_optimizer, self.shard),
            state,
        )
        about = {
            "phase": phase.name,
            "best": self.selection.step or None,
            "final": phase.offset + step if last and phase.name == "refit" else None,
        }
        self._report(self.run_dir.checkpoints.save(phase.offset + step, snapshot, about))

    def _load_state(self, saved: Saved, phase: Phase, totals: Totals) -> None:
        state = saved.state
        if phase.name == "refit" and state["total_steps"] != phase.total_steps:
            raise UserError(
                f"train.epochs or train.steps: {state['total_steps']} -> {phase.total_steps} steps, but this run has been "
                "refitted with what was selected; start a new run"
            )
        names, now = state["tasks"], self.tasks.names
        check_tasks(self.shared, names, now)
        saved.copy_into(trunk_tensors(self.shared, self.trunk_optimizer))
        saved.copy_heads(head_stacks(self.bank, self.head_optimizer))
        totals.load_state_dict(by_task(state["totals"], names, now))
        self.bad_steps = state["bad_steps"]
        self.stepper.load_state_dict(by_task(state["stepper"], names, now), names == now)
        if phase.loader.load_state_dict(state["loader"], set(names) == set(now)):
            say(self.console, "with other tasks other rows have labels: the epoch begins anew")

    def _finish(self, scores: dict[str, Scores], step: int) -> dict[str, Any]:
        """Write per_task.parquet and summary.json, after the last step."""
        tasks, prepared = self.tasks, self.prepared
        columns: dict[str, Any] = {
            "task": tasks.names,
            "kind": [task.kind.name for task in tasks],
            "train_labels": tasks.stats["train_labels"],
            "expected_share": expected_share(tasks, self.config.objective, self.sampling_T),
            "weight": self.stepper.balancing.weight_T.double().cpu().numpy(),
        }
        if scores and (valid := scores.get("valid")) is not None and valid.threshold_T is not None:
            columns["threshold"] = valid.threshold_T
        for part, found in scores.items():
            columns[f"{part}_labels"] = found.label_count_T
            columns |= {f"{part}_{name}": value_T for name, value_T in found.per_task.items()}
        self.run_dir.save_table("per_task.parquet", pa.table(columns))
        balancing = self.stepper.balancing
        if balancing.cosine_TT is not None and balancing.steps_TT is not None:
            pairs, groups = affinity_tables(tasks.names, balancing.cosine_TT.cpu().numpy(), balancing.steps_TT.cpu().numpy())
            self.run_dir.save_table("affinity.parquet", pairs)
            self.run_dir.save_table("affinity_groups.parquet", groups)
        summary: dict[str, Any] = {part: found.summary for part, found in scores.items()} | {
            "tasks": len(tasks),
            "rows": {part: p.num_rows for part, p in prepared.parts.items()},
            "labels": {part: int(p.labels.count_T().sum()) for part, p in prepared.parts.items()},
            "inputs": prepared.inputs.width,
            "parameters": {"trunk": _size(self.shared), "heads": int(self.work.head_params_T.sum())},
            "processes": self.world.size,
            "selected_step": self.selection.step,
            "selected_value": None if math.isnan(self.selection.value) else self.selection.value,
            "seconds": self.seconds,
            "rows_per_second": self.rows / self.seconds if self.seconds else None,
            "data_wait": self.waited / self.in_steps if self.in_steps else None,
            "peak_memory_mb": peak_memory_mb(self.accelerator.device),
            "test_inputs_seen_in_training": prepared.overlap,
            "split_hash": prepared.split_hash,
            "notes": [*prepared.notes, *prepared.inputs.notes()],
        }
        self.run_dir.save_json("summary.json", summary)
        self.tracker.log_table("tasks/final", columns, step)
        for part in list(scores)[-1:]:
            final = flatten(scores[part].summary, f"final/{part}")
            self.tracker.log({name: value for name, value in final.items() if name.endswith(("/mean", "/median"))}, step)
        return summary


def steps_per_epoch(config: TrainConfig, num_rows: int) -> int:
    return -(-num_rows // config.global_batch)


def training_steps(config: TrainConfig, num_rows: int) -> int:
    """Length of a training on so many rows, in steps."""
    return config.steps or max(1, round((config.epochs or DEFAULT_EPOCHS) * steps_per_epoch(config, num_rows)))


def lr_factor(step: int, total: int, warmup: float, decay: str) -> float:
    """Learning rate of a step as a share of its peak: a linear rise, then constant, or linear or cosine down to 0."""
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, total - rise)
    if decay == "linear":
        return max(0.0, 1 - progress)
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process, on the accelerator where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def load_start(run: RunDir, config: Config, tasks: TaskTable, shared: SharedModel, bank: HeadBank) -> list[str]:
    """Start from another run: its trunk, and where heads have the same layers those of tasks with the same name, kind and
    classes; returns the tasks whose heads were taken over.

    Of a run of several split seeds it is the split of the same seed, and the model before a refit: the same seed keeps the same
    rows of the same data apart, so neither has been trained on what this run validates and tests on.

    Raises:
        UserError: the trunks differ; the first differing parameters are named.
    """
    splits = run.by_seed(run.config().split.seeds)
    one = splits.get(config.split.seeds[0], next(iter(splits.values())))
    saved, head, theirs = one.best(), config.model.head, one.config().model.head
    try:
        check_tasks(shared, one.tasks().names, tasks.names)
        saved.copy_into(trunk_tensors(shared))
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    options = ("activation", "gate", "scale_shift")
    if any(getattr(head, option) != getattr(theirs, option) for option in options):
        return []
    forms, forms_there = forms_by_name(tasks.names, config), forms_by_name(one.tasks().names, one.config())
    like = {task.name: (task.kind.name, task.classes) for task in one.tasks()}
    same = {task.name for task in tasks if like.get(task.name) == (task.kind.name, task.classes)}
    same = {name for name in same if forms[name] == forms_there[name]}
    stacks = head_stacks(bank)
    for each in stacks:
        each.names = [name if name.split(MEMBER)[0] in same else "" for name in each.names]
    saved.copy_heads(stacks)
    return sorted(same)


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
