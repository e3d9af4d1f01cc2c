"""Gradients of tasks inside a step: what is kept of each micro-batch, and their norms and inner products over a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mtrain.balance.gradients import (
    SKETCH,
    Sketch,
    check_vectors,
    gram,
    gram_cost,
    gram_of_rows,
    grid_factors,
    grid_sums,
    make_sketch,
    neck_inputs,
    norms2,
    project,
    projected_gram,
    routed_factors,
    task_gradients,
    unbiased_grid,
    unbiased_rows,
)
from mtrain.components import is_own
from mtrain.config import BalancingConfig
from mtrain.data.batch import Deal
from mtrain.errors import UserError
from mtrain.model.heads import HeadBank
from mtrain.model.trunks import SharedModel
from mtrain.parallel.shard import Shard
from mtrain.train.objective import Piece

EXACT_COST = 5e9  # multiply-adds of a Gram matrix up to which it is computed exactly
SLICE = 2**24  # numbers of a block of projected labels

Taps = Sequence[tuple[Piece, Tensor]]


class Layer:
    """A linear layer of the trunk, and what went through it last while it was `wanted`."""

    def __init__(self, module: nn.Linear):
        self.has_bias, self.in_features = module.bias is not None, module.in_features
        self.wanted = False
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.wanted and torch.is_grad_enabled():
            self.h_BI, self.output = inputs[0].detach(), output

    def must_give(self, shared: SharedModel) -> None:
        """Refuse the layer in its first step where its output is not what the shared network gives."""

        def check(module: nn.Module, inputs: tuple[Tensor, ...], features_BD: Tensor) -> None:
            if self.wanted and torch.is_grad_enabled():
                hook.remove()
                same = self.output.shape == features_BD.shape
                if not (same and torch.allclose(self.output.float(), features_BD.float(), 0, 0, equal_nan=True)):
                    raise UserError(
                        "model.trunk: its `neck`, where gradients per task are taken, does not give what forward returns; let "
                        "forward return its output, give the attribute another name, or set objective.balancing.level: features"
                    )

        hook = shared.register_forward_hook(check)

    @property
    def width(self) -> int:
        return self.in_features + self.has_bias

    def inputs(self, shard: Shard, deal: Deal | None) -> Tensor:
        """Its inputs, with ones for the bias, of the rows that this rank's heads read."""
        return neck_inputs(shard.to_heads(self.h_BI, deal), self.has_bias)


class TaskGradients:
    """Norms, and where `products` are wanted inner products, of the tasks' gradients over the micro-batches of a window.

    Attributes:
        error: standard error of projected inner products, relative to |g_s| |g_t|; None while they are exact.
    """

    def __init__(self, products: bool, layers: list[Layer], bank: HeadBank, shard: Shard, config: BalancingConfig):
        self.products, self.layers, self.bank, self.shard, self.config = products, layers, bank, shard, config
        self.num_tasks = len(shard.plan.names)
        self.error: float | None = None

    def start(self, step: int, wanted: bool) -> None:
        """A window begins, in which gradients are `wanted` or not."""
        self.step = step
        for layer in self.layers:
            layer.wanted = wanted

    def add(self, features_BD: Tensor, taps: Taps, deal: Deal | None, factor: float) -> None:
        """Gradients at the taps of a micro-batch's pieces, which are those of the tasks' terms times `factor`."""
        raise NotImplementedError

    def finish(self, task_A: Tensor) -> tuple[Tensor, Tensor | None]:
        """Squared norms `[A]`, and inner products `[A, A]`, of the active tasks on all ranks."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of the features."""
        return self.bank.in_features

    def _slots(self, task_A: Tensor) -> Tensor:
        """The place of each task among the active ones; -1 where it is absent."""
        slot_T = torch.full((self.num_tasks,), -1, device=task_A.device)
        slot_T[task_A] = torch.arange(len(task_A), device=task_A.device)
        return slot_T

    def _vectors(self, units: int, width_x: int, width_y: int) -> int | None:
        """Random vectors of the projection of so many units; None where inner products are exact."""
        if isinstance(self.config.projections, int):
            return self.config.projections
        costly = min(gram_cost(units, self.num_tasks, width_x, width_y)) > EXACT_COST
        return SKETCH if costly and self.config.projections == "auto" else None

    def _everywhere(self, *value_T: Tensor) -> Tensor:
        """Sums over ranks, for all tasks."""
        stacked = torch.stack(value_T)
        return self.shard.everywhere(stacked, stacked.new_zeros(()))[0]

    def _projected(self, y_TF: Tensor, sketch: Sketch, task_A: Tensor) -> Tensor:
        """Inner products from `project` of this rank's tasks; of hot ones, the part that is here."""
        world = self.shard.world
        if self.shard.hot.any():
            hot = torch.from_numpy(self.shard.hot).to(y_TF.device)
            y_TF[hot] = world.sum(y_TF[hot])
        counts = torch.from_numpy(self.shard.counts).to(y_TF.device)
        task_N, y_NF = (world.gather_rows(value[counts]) for value in (self.shard.own_on(y_TF.device), y_TF))
        gram_AA, error = projected_gram(y_NF[torch.argsort(task_N)][task_A], sketch)
        self.error = float(error)
        return gram_AA


class GridGradients(TaskGradients):
    """Where every head reads every row: sums over rows for each first unit of the heads.

    At the features (no layer) the sums are over no rows, and micro-batches stand side by side.

    Args:
        batch: about the rows of a window.
    """

    def __init__(self, products: bool, layers: list[Layer], bank: HeadBank, shard: Shard, config: BalancingConfig, batch: int):
        super().__init__(products, layers, bank, shard, config)
        self.vectors: int | None = None
        """Of the projection; None where inner products are exact."""
        if products:
            (units,) = shard.world.sum_numbers(sum(group.weights[0].shape[:2].numel() for group in bank.groups))
            self.vectors = self._vectors(int(units), layers[0].width if layers else batch, self.width)

    def start(self, step: int, wanted: bool) -> None:
        super().start(step, wanted)
        self.sketch: Sketch | None = None
        self.micro = 0
        self.rows = [0, 0] if self.config.unbiased else [0]
        self.sums: dict[int, tuple[Piece, list[Tensor]]] = {}

    def add(self, features_BD: Tensor, taps: Taps, deal: Deal | None, factor: float) -> None:
        total = _rows_of_heads(features_BD, deal)
        x = self._inputs(features_BD, deal, total)
        halves = [slice(0, total // 2), slice(total // 2, total)] if self.config.unbiased else [slice(0, total)]
        self.rows = [rows + len(range(total)[half]) for rows, half in zip(self.rows, halves, strict=True)]
        for piece, grad in taps:
            g_AHB = grad.view(len(piece.task_A), -1, grad.shape[-1])
            if factor != 1.0:
                g_AHB = g_AHB / factor
            found = [g_AHB.clone() if x is None else grid_sums(g_AHB[..., half], x[half]) for half in halves]
            if piece.number in self.sums:
                before = self.sums[piece.number][1]
                found = [torch.cat([b, c], -1) if x is None else b + c for b, c in zip(before, found, strict=True)]
            self.sums[piece.number] = piece, found

    def _inputs(self, features_BD: Tensor, deal: Deal | None, rows: int) -> Tensor | None:
        """What the gradients at the first units are multiplied with; None: nothing."""
        if self.layers:
            x_HI = self.layers[0].inputs(self.shard, deal)
            if self.vectors is None:
                return x_HI
            if self.sketch is None:  # exact along the mean row, which holds most of the gradients behind a ReLU
                self.sketch = make_sketch(x_HI.shape[1], self.width, self.step, x_HI, self.vectors, x_HI.mean(0)[:, None])
            return x_HI @ self.sketch.x_IR
        if self.vectors is None:
            return None
        sketch = make_sketch(rows, self.width, self.step * 1_000_003 + self.micro, features_BD.float(), self.vectors)
        self.micro += 1
        self.sketch = sketch if self.sketch is None else replace(sketch, y_DK=self.sketch.y_DK)
        return sketch.x_IR

    def finish(self, task_A: Tensor) -> tuple[Tensor, Tensor | None]:
        statistic = self._norms2 if not self.products else self._gram if self.vectors is None else self._project
        found = statistic(task_A, 1)
        if self.config.unbiased:
            found = unbiased_grid(found, statistic(task_A, -1), *self.rows)
        return (found.diagonal(), found) if self.products else (found, None)

    def _sums(self, sign: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each head group its tasks, sums (of the halves, or their difference) and weights of the first units."""
        for piece, halves in self.sums.values():
            c_AHI = halves[0] if len(halves) == 1 else halves[0] + sign * halves[1]
            yield piece.task_A, c_AHI, piece.group.first_weight()

    def _norms2(self, task_A: Tensor, sign: int) -> Tensor:
        norm2_T = torch.zeros(len(self.shard.own), device=task_A.device)
        for task_a, c_AHI, v_AHD in self._sums(sign):
            norm2_T[task_a] = norms2(grid_factors(c_AHI, v_AHD))
        return self._everywhere(norm2_T)[0, task_A]

    def _gram(self, task_A: Tensor, sign: int) -> Tensor:
        device = task_A.device
        width = self.layers[0].width if self.layers else sum(self.rows)
        x, y = [torch.zeros(0, width, device=device)], [torch.zeros(0, self.width, device=device)]  # of a rank without tasks
        slot = [torch.zeros(0, dtype=torch.int64, device=device)]
        slot_T = self._slots(task_A)[self.shard.own_on(device)]
        for task_a, c_AHI, v_AHD in self._sums(sign):
            factors = grid_factors(c_AHI, v_AHD)
            x.append(factors.x_NI)
            y.append(factors.y_ND)
            slot.append(slot_T[task_a].repeat_interleave(v_AHD.shape[1]))
        x_NI, y_ND, slot_N = (self.shard.world.gather_rows(torch.cat(parts)) for parts in (x, y, slot))
        there = slot_N >= 0
        return gram(routed_factors(x_NI[there], y_ND[there], slot_N[there], len(task_A)))

    def _project(self, task_A: Tensor, sign: int) -> Tensor:
        assert self.sketch is not None
        like = self.sketch.x_IR
        none = project(like.new_zeros(0, 1, like.shape[1]), like.new_zeros(0, 1, self.width), self.sketch)
        y_TF = none.new_zeros(len(self.shard.own), none.shape[1])  # also where this rank has no tasks
        for task_a, c_AHR, v_AHD in self._sums(sign):
            y_TF[task_a] = project(c_AHR, v_AHD, self.sketch)
        return self._projected(y_TF, self.sketch, task_A)


@dataclass(frozen=True)
class _Labels:
    """P labels: what multiplies at each layer, `x_PI` and `y_PD`, or at the features `y_PD` alone; task and row of each."""

    x: list[Tensor]
    y: list[Tensor]
    task_P: Tensor
    row_P: Tensor


class LabelGradients(TaskGradients):
    """Where a head reads the rows of its labels: each label's gradient is an outer product at every layer.

    Args:
        by_task: whether a row belongs to one task.
    """

    def __init__(
        self, products: bool, layers: list[Layer], bank: HeadBank, shard: Shard, config: BalancingConfig, by_task: bool
    ):
        super().__init__(products, layers, bank, shard, config)
        self.by_task = by_task

    def start(self, step: int, wanted: bool) -> None:
        super().start(step, wanted)
        self.found: list[_Labels] = []
        self.rows = 0

    def add(self, features_BD: Tensor, taps: Taps, deal: Deal | None, factor: float) -> None:
        deltas, rows, tasks = [], [], []
        for piece, grad in taps:
            assert piece.route is not None
            delta_PD = piece.group.widened(grad.index_select(0, piece.route.place_P).float())
            deltas.append(delta_PD if factor == 1.0 else delta_PD / factor)
            rows.append(piece.route.row_P)
            tasks.append(piece.task_A[piece.route.slot_P])
        none = features_BD.new_zeros(0)
        delta_PD = torch.cat([none.float().view(0, self.width), *deltas])
        row_P, task_P = (torch.cat([none.long(), *parts]) for parts in (rows, tasks))
        total = _rows_of_heads(features_BD, deal)
        x, y = [], [delta_PD]
        if len(self.layers) == 1:
            x = [self.layers[0].inputs(self.shard, deal)[row_P]]
        elif self.layers:
            grad_HD = delta_PD.new_zeros(total, self.width).index_add_(0, row_P, delta_PD)
            grad_BD = self.shard.from_heads(grad_HD, deal).to(features_BD.dtype)
            outputs = [layer.output for layer in self.layers]
            grads = torch.autograd.grad(features_BD, outputs, grad_BD, retain_graph=True)
            x = [layer.inputs(self.shard, deal)[row_P] for layer in self.layers]
            y = [self.shard.to_heads(grad.float(), deal)[row_P] for grad in grads]
        self.found.append(_Labels(x, y, task_P, row_P + self.rows))
        self.rows += total

    def finish(self, task_A: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = self.found[0]
        if len(self.found) > 1:
            x, y = (
                [torch.cat(parts) for parts in zip(*of_micro, strict=True)]
                for of_micro in ([found.x for found in self.found], [found.y for found in self.found])
            )
            task_P, row_P = (torch.cat([getattr(found, name) for found in self.found]) for name in ("task_P", "row_P"))
            labels = _Labels(x, y, task_P, row_P)
        if not self.products:
            return self._norms2(labels, task_A), None
        gram_AA = self._gram(labels, task_A)
        return gram_AA.diagonal(), gram_AA

    def _norms2(self, labels: _Labels, task_A: Tensor) -> Tensor:
        num_tasks, task_P = len(self.shard.own), labels.task_P
        if not labels.x:
            alone = torch.arange(len(task_P)) if self.by_task else labels.row_P
            norm2_T = gram_of_rows(labels.y[0], alone.to(task_P.device), task_P, num_tasks, norms=True)
            return self._everywhere(norm2_T)[0, task_A]
        layers = list(zip(labels.x, labels.y, strict=True))
        norm2_T = torch.stack([self._layer_norms2(x_PI, y_PD, task_P) for x_PI, y_PD in layers]).sum(0)
        if not self.config.unbiased:
            return self._everywhere(norm2_T)[0, task_A]
        own_T = torch.zeros_like(norm2_T)
        for x_PI, y_PD in layers:
            own_T.index_add_(0, task_P, x_PI.square().sum(1) * y_PD.square().sum(1))
        count_T = torch.bincount(task_P, minlength=num_tasks).to(own_T)
        norm2_A, own_A, count_A = self._everywhere(norm2_T, own_T, count_T)[:, task_A]
        return unbiased_rows(norm2_A, own_A, count_A**2, count_A)

    def _layer_norms2(self, x_PI: Tensor, y_PD: Tensor, task_P: Tensor) -> Tensor:
        """For each of this rank's tasks; hot tasks, of which ranks have some labels each, count on the first."""
        norm2_T = norms2(routed_factors(x_PI, y_PD, task_P, len(self.shard.own)))
        if self.shard.hot.any():
            hot = torch.from_numpy(self.shard.hot).to(task_P.device)
            slot_T = torch.cumsum(hot, 0) - 1
            mine = hot[task_P]
            factors = routed_factors(x_PI[mine], y_PD[mine], slot_T[task_P[mine]], int(hot.sum()))
            gradient_ADI = self.shard.world.sum(task_gradients(factors))
            norm2_T[hot] = gradient_ADI.square().sum((1, 2)) * self.shard.world.is_first
        return norm2_T

    def _gram(self, labels: _Labels, task_A: Tensor) -> Tensor:
        world, device = self.shard.world, task_A.device
        slot_P = self._slots(task_A)[self.shard.own_on(device)[labels.task_P]]
        there = slot_P >= 0
        slot_N, row_N = world.gather_rows(slot_P[there]), world.gather_rows(labels.row_P[there])
        if self.by_task:
            row_N = torch.arange(len(slot_N), device=device)
        if not labels.x:
            return gram_of_rows(world.gather_rows(labels.y[0][there]), row_N, slot_N, len(task_A))
        gram_AA = task_A.new_zeros(len(task_A), len(task_A), dtype=torch.float32)
        own_AA = torch.zeros_like(gram_AA)
        for x_PI, y_PD in zip(labels.x, labels.y, strict=True):
            if (vectors := self._vectors(len(slot_N), x_PI.shape[1], y_PD.shape[1])) is not None:
                gram_AA += self._project(x_PI, y_PD, labels.task_P, vectors, task_A)
            else:
                x_NI, y_ND = world.gather_rows(x_PI[there]), world.gather_rows(y_PD[there])
                gram_AA += gram(routed_factors(x_NI, y_ND, slot_N, len(task_A)))
            if self.config.unbiased:
                size_P1 = x_PI.square().sum(1, keepdim=True).sqrt()
                own_AA += gram_of_rows(world.gather_rows((size_P1 * y_PD)[there]), row_N, slot_N, len(task_A))
        if not self.config.unbiased:
            return gram_AA
        count_A = torch.bincount(slot_N, minlength=len(task_A)).float()
        common_AA = gram_of_rows(torch.ones(len(slot_N), 1, device=device), row_N, slot_N, len(task_A))
        return unbiased_rows(gram_AA, own_AA, count_A[:, None] * count_A, common_AA)

    def _project(self, x_PI: Tensor, y_PD: Tensor, task_P: Tensor, vectors: int, task_A: Tensor) -> Tensor:
        mean_I1 = self.shard.world.sum(x_PI.sum(0))[:, None]
        sketch = make_sketch(len(mean_I1), y_PD.shape[1], self.step, x_PI, vectors, mean_I1)
        c_PR = x_PI @ sketch.x_IR
        size = max(1, SLICE // (sketch.num_random * 8 + y_PD.shape[1]))
        y_TF: Tensor | None = None
        for c, y, task in zip(c_PR.split(size), y_PD.split(size), task_P.split(size), strict=True):
            part = project(c[:, None], y[:, None], sketch)
            y_TF = part.new_zeros(len(self.shard.own), part.shape[1]) if y_TF is None else y_TF
            y_TF.index_add_(0, task, part)
        assert y_TF is not None
        return self._projected(y_TF, sketch, task_A)


def _rows_of_heads(features_BD: Tensor, deal: Deal | None) -> int:
    """How many rows the heads of this rank read."""
    return len(features_BD) if deal is None or deal.heads is None else len(deal.heads)


def make_task_gradients(
    name: str,
    products: bool,
    shared: SharedModel,
    bank: HeadBank,
    shard: Shard,
    by_task: bool,
    grid: bool,
    config: BalancingConfig,
    batch: int,
    whole_trunk: bool = True,
) -> TaskGradients:
    """The gradients that a balancer (or the affinity of tasks) needs, at the level that the config says.

    Args:
        name: of what needs them, for messages.
        products: whether inner products are needed, beside norms.
        shared: the shared network before it is wrapped.
        by_task: whether a row belongs to one task.
        grid: whether every head reads every row: the labels of layout pairs may be dense as well.
        batch: rows of a global batch.
        whole_trunk: whether the trunk runs as it is, neither compiled nor sharded.

    Raises:
        UserError: the level cannot be had with this trunk or layout, or an option is out of range.
    """
    at = "objective.balancing"
    neck = shared.linear_neck
    if not any(p.requires_grad for p in shared.parameters()):
        raise UserError(f"objective.balancer: {name} needs the tasks' gradients at the trunk, but the trunk is frozen")
    if shared.members > 1:
        raise UserError(f"objective.balancer: {name} needs gradients that all heads share, but the trunk has several members")
    if (why := bank.beyond_taps(grid)) is not None:
        raise UserError(f"objective.balancer: {name} needs the gradient of each task at the features, but {why}")
    if config.level == "neck" and neck is None:
        raise UserError(
            f"objective.balancer: {name} needs the tasks' gradients at a linear neck, but the trunk does not end in one; set "
            f"{at}.level to features, or, where the trunk gives one feature, model.neck to a width"
        )
    if config.unbiased and (not config.smoothing or config.level == "features"):
        found = "level is features" if config.level == "features" else "smoothing is 0"
        raise UserError(
            f"{at}.unbiased: {found}; expected level neck or trunk, and smoothing above 0, as one estimate is noisy"
        )
    if isinstance(config.projections, int):
        check_vectors(config.projections, f"{at}.projections")
        if not products:
            raise UserError(f"{at}.projections: {config.projections} vectors for inner products, but {name} needs norms only")
    layers = [neck] if neck is not None and config.level == "neck" else []
    if config.level == "trunk":
        layers = _linear_layers(shared, f"{at}.level: trunk")
        if not by_task:
            raise UserError(
                f"{at}.level: trunk needs rows of one task each, as of layouts routed and files; use neck or features"
            )
        if not whole_trunk:
            raise UserError(
                f"{at}.level: trunk needs a trunk that is neither compiled nor sharded by FSDP; use neck or features"
            )
    kept = [Layer(layer) for layer in layers]
    if config.level == "neck" and is_own(shared.trunk):
        kept[0].must_give(shared)
    if grid:
        return GridGradients(products, kept, bank, shard, config, batch)
    return LabelGradients(products, kept, bank, shard, config, by_task)


def refuse_unused(name: str, config: BalancingConfig) -> None:
    """Refuse options of gradients where there are none to take.

    Raises:
        UserError: one of them is not as it is by default.
    """
    usual = BalancingConfig()
    for option in ("every", "smoothing", "projections", "level", "unbiased"):
        if getattr(config, option) != getattr(usual, option):
            raise UserError(
                f"objective.balancing.{option}: {name} takes no gradients of tasks; leave it out, choose a balancer that does, "
                "or set affinity"
            )


def _linear_layers(shared: SharedModel, at: str) -> list[nn.Linear]:
    """All linear layers; the parameters of layer norms, which are few, are left out."""
    layers = []
    for name, module in shared.named_modules():
        if isinstance(module, nn.Linear):
            layers.append(module)
        elif any(True for _ in module.parameters(recurse=False)) and not isinstance(module, nn.LayerNorm):
            raise UserError(
                f"{at} needs a trunk of linear layers, but {name} is a {type(module).__name__}; use neck or features"
            )
    if not layers:
        raise UserError(f"{at} needs a trunk with a linear layer, but it has none; use features")
    return layers
