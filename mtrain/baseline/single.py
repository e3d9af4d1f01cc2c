"""A network for each task: the config's trunk and head, trained on the task's rows alone. All networks of a chunk of tasks are
one computation on stacked parameters `[T, out, in]`; nothing of one task touches another, so that each is what training it
alone gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from mtrain.baseline.linear import sources
from mtrain.baseline.problem import Fitted, Problem
from mtrain.baseline.rows import Floats, Ints, TaskRows, chunks, constant_logits, count, in_chunks, kind_params
from mtrain.config import Config
from mtrain.data.order import name_key, shuffled
from mtrain.model.dropout import row_keys
from mtrain.model.fusion import Stacked, keys_of, salts_of
from mtrain.model.head_forms import HeadForm
from mtrain.model.head_options import head_forms
from mtrain.model.heads import stable_hash
from mtrain.model.kinds import Kind
from mtrain.model.trunks import MLP, build_shared
from mtrain.report.progress import ShownProgress
from mtrain.report.say import say
from mtrain.train.evaluate import EVAL_ROWS, HIGHER_IS_BETTER, scores_of
from mtrain.train.loop import lr_factor, steps_per_epoch, training_steps
from mtrain.train.optim import clip_per_head

LEAST_ROWS = 32  # of a task in a step, where it has them


class Network(nn.Module):
    """Trunk, neck and head of one task."""

    def __init__(self, config: Config, in_features: int, name: str, form: HeadForm, outputs: int):
        super().__init__()
        seed, head = stable_hash(config.train.seed, name), config.model.head
        self.shared = build_shared(config.model, in_features, seed)
        *hidden, _ = form.widths(outputs)
        width = self.shared.out_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(seed, "head"))
            self.hidden = MLP(width, hidden, head.activation, dropout=head.dropout) if hidden else None
            self.head = nn.Linear(hidden[-1] if hidden else width, outputs)

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        z_BD = self.shared(x_BF, keys_B)
        if self.hidden is not None:
            z_BD = self.hidden(z_BD, None if keys_B is None else ~keys_B)
        return self.head(z_BD)


def why_not(config: Config) -> str | None:
    """Why there are no networks of single tasks of a config; None: there are."""
    trunk, found = config.model.trunk.class_path, config.model.trunk.init_args
    if trunk not in ("MLP", "Linear", "Identity"):
        return f"trunk {trunk} is not stacked by task, only MLP, Linear and Identity are"
    if found.get("members", 1) != 1:
        return "the trunk has several members"
    if found.get("norm") == "batch":
        return "the trunk has batch normalisation, whose statistics need rows of the same number"
    return None


def fit_single(problem: Problem, console: Console) -> Fitted:
    """Networks of single tasks, each at its best evaluation by the selected metric (skill where it has no value for a task) on
    the validation part; at the last where there is none.

    All take as many steps as the config's run, with its learning rate, on batches of their own rows: such that rows are seen as
    often as in the run, but at least `LEAST_ROWS` a step. Where the run is refitted these are too, to their best step. Says
    what it does, and how far it is.
    """
    tasks, rows = problem.tasks, problem.rows
    logits = {part: torch.zeros(len(rows[part].y_P), int(tasks.num_outputs_T.max())) for part in problem.scored}
    best_step_T, parameters = np.zeros(len(tasks), dtype=np.int64), 0
    forms = head_forms(tasks.names, problem.config)
    groups: dict[tuple[Kind, tuple[int, ...]], list[int]] = {}
    for t, task in enumerate(tasks):
        groups.setdefault((task.kind, forms[t].widths(task.num_outputs)), []).append(t)
    plan: list[tuple[Kind, Ints]] = []
    for (kind, _), in_group in groups.items():
        own = np.array(in_group)
        outputs = tasks[in_group[0]].num_outputs
        one = Network(problem.config, problem.x_NF.shape[1], tasks[in_group[0]].name, forms[in_group[0]], outputs)
        size = sum(p.numel() for p in one.parameters())
        parameters += size * len(own)
        step = 16.0 * problem.config.train.global_batch * (problem.x_NF.shape[1] + one.shared.out_features)
        plan += [(kind, some) for some in chunks(rows["final"], own, 0.0, 24.0 * size + step)]
    train, num_rows, learnt = problem.config.train, problem.parts["train"].num_rows, sources(problem)
    steps, per_epoch = training_steps(train, num_rows), steps_per_epoch(train, num_rows)
    most = f"at most {steps / per_epoch:,.4g} epochs ({steps:,} steps)"
    refitted = ", then again on train + valid" if "final" in learnt else ""
    say(console, f"single: {len(tasks)} networks, {in_chunks(len(plan))}, each for {most}{refitted}")
    with ShownProgress(console, "single", 0, len(plan) * len(learnt) * steps, "step {:,} of at most {:,}") as progress:

        def shown(before: int, note: str, step: int) -> None:
            progress.show(before + step, note)

        for c, (kind, some) in enumerate(plan):
            chunk = Chunk(problem, kind, some, [forms[t] for t in some])
            valid = rows["valid"].take(some) if "valid" in rows else None
            for number, (source, parts) in enumerate(learnt.items()):
                before, note = (c * len(learnt) + number) * steps, f"chunk {c + 1} of {len(plan)}, {len(some)} networks"
                best_step_T[some] = chunk.train(
                    rows[source].take(some),
                    valid,
                    best_step_T[some] if source == "final" else None,
                    partial(shown, before, note),
                )
                for part in parts:
                    found_PO = chunk.logits(rows[part].take(some))
                    logits[part][rows[part].at(some), : found_PO.shape[1]] = found_PO
    return Fitted(logits, {"best_step": best_step_T}, parameters)


class Chunk:
    """Networks of some tasks of one kind and form."""

    def __init__(self, problem: Problem, kind: Kind, own: Ints, forms: Sequence[HeadForm]):
        self.problem, self.config, self.kind, self.forms = problem, problem.config, kind, forms
        self.tasks = problem.tasks.take(own)
        self.params = {name: value_A[:, None] for name, value_A in kind_params(kind, self.tasks).items()}
        self.salts = salts_of(self.tasks.names)
        self.keys = np.array([name_key(name) for name in self.tasks.names], dtype=np.uint64)

    def _build(self) -> Stacked:
        outputs, width = self.tasks[0].num_outputs, self.problem.x_NF.shape[1]
        networks = [
            Network(self.config, width, task.name, form, outputs) for task, form in zip(self.tasks, self.forms, strict=True)
        ]
        stacked = Stacked(networks)
        if self.config.model.head.bias == "constant":
            with torch.no_grad():
                stacked.get_parameter("head/bias").copy_(constant_logits(self.tasks))
        return stacked

    def train(
        self, rows: TaskRows, valid: TaskRows | None, stop_A: Ints | None, shown: Callable[[int], None] = lambda step: None
    ) -> Ints:
        """Train new networks and keep each as it was at its best evaluation, or at step `stop_A`; gives these steps. `shown` is
        called with the number of steps that are done."""
        train, patience = self.config.train, self.config.select.patience or math.inf
        self.model = self._build()
        optimizer, shared, head = self._optimizer()
        lrs = [group["lr"] for group in optimizer.param_groups]
        num_rows = self.problem.parts["train"].num_rows
        per_epoch = steps_per_epoch(train, num_rows)
        total, every = training_steps(train, num_rows), max(1, round(train.eval_every * per_epoch))
        count_A = rows.count_T.numpy()
        size_A = np.minimum(count_A, np.maximum(-(-count_A // per_epoch), LEAST_ROWS))
        best = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        value_A, misses_A, step_A = np.full(len(count_A), np.nan), np.zeros(len(count_A)), np.zeros(len(count_A), np.int64)
        stops = set() if stop_A is None else set(stop_A.tolist())
        for step in range(max(stops, default=total) if stop_A is not None else total):
            factor = lr_factor(step, total, train.warmup, train.decay)
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            self._gradients(rows, size_A, step)
            for parameters, most in ((shared, train.clip), (head, train.head_clip)):
                if most is not None and parameters:
                    clipped = clip_per_head([p.grad for p in parameters if p.grad is not None], most)
                    for p, grad in zip(parameters, clipped, strict=True):
                        p.grad = grad
            optimizer.step()
            now = step + 1
            shown(now)
            if stop_A is not None:
                if now in stops:
                    self._keep(best, stop_A == now)
                continue
            if now % every and now < total:
                continue
            if valid is None:
                better_A = np.full(len(count_A), now == total)
            else:
                new_A = self._value(valid)
                better_A = ((new_A > value_A) | np.isnan(value_A)) & (misses_A < patience)
                value_A = np.where(better_A, new_A, value_A)
                misses_A = np.where(better_A, 0, misses_A + 1)
            self._keep(best, better_A)
            step_A[better_A] = now
            if (misses_A >= patience).all():
                break
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(best[name])
        return step_A if stop_A is None else stop_A

    def _optimizer(self) -> tuple[torch.optim.Optimizer, list[nn.Parameter], list[nn.Parameter]]:
        train, named = self.config.train, list(self.model.named_parameters())
        shared = [p for name, p in named if name.startswith("shared/")]
        head = [p for name, p in named if not name.startswith("shared/")]
        decay = train.weight_decay if train.head_weight_decay is None else train.head_weight_decay
        groups = [{"params": head, "lr": train.head_lr or train.lr, "weight_decay": decay}]
        if shared:
            groups.append({"params": shared, "lr": train.lr, "weight_decay": train.weight_decay})
        return torch.optim.AdamW(groups, betas=train.betas, fused=True), shared, head

    def _gradients(self, rows: TaskRows, size_A: Ints, step: int) -> None:
        """Of each task's mean loss over its batch of a step."""
        count_A = rows.count_T.numpy()
        first_A = np.cumsum(count_A) - count_A
        task_P = np.repeat(np.arange(len(size_A)), size_A)
        slot_P = np.arange(len(task_P)) - np.repeat(np.cumsum(size_A) - size_A, size_A)
        place_P = shuffled(
            self.config.train.seed, self.keys[task_P], step * size_A[task_P] + slot_P, np.maximum(count_A, 1)[task_P]
        )
        at_AB = torch.zeros(len(size_A), int(size_A.max()), dtype=torch.int64)
        at_AB[task_P, slot_P] = torch.from_numpy(first_A[task_P] + place_P)
        present_AB = torch.arange(at_AB.shape[1]) < torch.from_numpy(size_A)[:, None]
        row_AB = rows.row_P[at_AB]
        keys_AB = keys_of(row_keys(self.config.train.seed, step, row_AB.flatten()).view_as(row_AB), self.salts)
        self.model.train()
        logits_ABO = self.model(self.problem.x_NF[row_AB], keys_AB)
        loss_AB = self.kind.losses(logits_ABO, torch.where(present_AB, rows.y_P[at_AB], 0), self.params)
        loss_AB = torch.where(present_AB, loss_AB * rows.weight_P[at_AB], 0)
        self.model.zero_grad()
        (loss_AB.sum(1) / torch.from_numpy(np.maximum(size_A, 1))).sum().backward()

    @torch.no_grad()
    def _keep(self, best: dict[str, Tensor], better_A: NDArray[np.bool_]) -> None:
        better = torch.from_numpy(better_A)
        for name, p in self.model.named_parameters():
            best[name][better] = p[better]

    def _value(self, valid: TaskRows) -> Floats:
        """What evaluations are compared by, higher is better; NaN for a task that cannot be scored."""
        select = self.config.select
        found = scores_of([count(self.tasks, valid, self.logits(valid))], self.tasks, select.min_per_class, {select.metric})
        skill_A = found.per_task["skill"]
        if (value_A := found.per_task.get(select.metric)) is None:
            return skill_A
        return np.where(np.isnan(value_A), skill_A, value_A if HIGHER_IS_BETTER[select.metric] else -value_A)

    @torch.no_grad()
    def logits(self, rows: TaskRows) -> Tensor:
        """Of labels `[P, O]`."""
        self.model.eval()
        at_AR, present_AR = rows.padded()
        logits_PO = torch.zeros(len(rows.y_P), self.tasks[0].num_outputs)
        size = max(1, EVAL_ROWS // len(self.tasks))
        for at_AB, present_AB in zip(at_AR.split(size, 1), present_AR.split(size, 1), strict=True):
            if present_AB.any():
                logits_PO[at_AB[present_AB]] = self.model(self.problem.x_NF[rows.row_P[at_AB]])[present_AB]
        return logits_PO
