"""All heads of all tasks as a handful of stacked tensors.

Heads of one kind and of similar output size form a `HeadGroup`: for each layer one weight `[T_g, out, in]` and one bias
`[T_g, out]`. Two kernels compute the same function:

- *grid*: every head on every row. All heads read the same input, so the first layer is one GEMM with a `[T_g*out, in]`
  view of its weight; deeper layers are batched products over tasks.
- *routed*: every row (or label) belongs to one task. Rows are sorted by task and padded to segments; each layer is a
  batched product over the *active* tasks only.

A trainer's step is: `bank.route`, then for each route `group.gather` and `group.routed`, the loss, one
`torch.autograd.grad` with respect to `z` and the gathered parameters, and `HeadAdamW.step` with the gradients.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mtrain.errors import UserError, nearest
from mtrain.model.dropout import keyed_dropout, mix64, unit_constants

Activation = Literal["relu", "elu", "gelu", "silu", "tanh"]

# In place where the derivative needs the output only.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module]]] = {
    "relu": (torch.relu_, nn.ReLU),
    "elu": (F.elu_, nn.ELU),
    "gelu": (F.gelu, nn.GELU),
    "silu": (F.silu, nn.SiLU),
    "tanh": (torch.tanh_, nn.Tanh),
}

MAX_WASTE = 0.3  # of a group's output parameters may be padding


def stable_hash(*parts: object) -> int:
    """63 bits of BLAKE2 of `parts`' text: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def group_by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Positions of `sizes` in groups that, padded to their largest member, waste at most `MAX_WASTE`.

    Greedy from the largest size down, whole sizes at a time: each group spans at least a factor of 1 / (1 - MAX_WASTE),
    so their number grows with the logarithm of the largest size, not with the number of tasks.
    """
    groups: list[list[int]] = []
    largest = used = count = 0
    for size in sorted(set(sizes), reverse=True):
        members = [i for i, s in enumerate(sizes) if s == size]
        used, count = used + size * len(members), count + len(members)
        if not groups or used < (1 - MAX_WASTE) * largest * count:
            groups.append([])
            largest, used, count = size, size * len(members), len(members)
        groups[-1] += members
    return [sorted(group) for group in groups]


@dataclass(frozen=True)
class Segment:
    """Active heads `start:stop` of a route, each padded to `size` rows, which begin at row `offset`."""

    start: int
    stop: int
    size: int
    offset: int

    @property
    def heads(self) -> slice:
        return slice(self.start, self.stop)

    def rows(self, x_NI: Tensor) -> Tensor:
        """This segment's rows of the padded layout `[N, I]`, as a view `[heads, size, I]`."""
        heads = self.stop - self.start
        return x_NI.narrow(0, self.offset, heads * self.size).view(heads, self.size, -1)


@dataclass(frozen=True)
class Route:
    """Which rows the active heads of one group read, computed once for a batch by `HeadBank.route`.

    P labels are sorted by active head; active heads are ordered by segment (similar numbers of labels), then by id.
    """

    group: int
    label_P: Tensor  # positions in the batch's label arrays
    row_P: Tensor  # rows of z
    slot_P: Tensor  # the active head of each label, ascending
    active_A: Tensor  # ids of the active heads inside the group
    task_A: Tensor  # ids of the active heads in the bank
    counts_A: Tensor  # labels of each active head
    segments: tuple[Segment, ...]
    padded_row_N: Tensor  # rows of z in the padded layout; padding repeats the head's own first row
    padded_head_N: Tensor  # the head (id inside the group) of each padded row
    place_P: Tensor  # position of each label in the padded layout

    def to(self, device: torch.device | str) -> Route:
        """The same route with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def plan_route(group: int, local_P: Tensor, row_P: Tensor, label_P: Tensor, task_ids: Tensor, smallest: int) -> Route:
    """The `Route` of one group's labels. `local_P` are task ids inside the group, `label_P` positions in the batch;
    segments hold up to `smallest * 2**k` rows a head."""
    active_A, slot_P, counts_A = torch.unique(local_P, return_inverse=True, return_counts=True)
    bucket_A = (counts_A.double() / smallest).clamp(min=1).log2().ceil().long()
    bucket_A, order_A = torch.sort(bucket_A, stable=True)
    slot_P, order_P = torch.sort(torch.argsort(order_A)[slot_P], stable=True)
    active_A, counts_A, row_P = active_A[order_A], counts_A[order_A], row_P[order_P]
    size_A = torch.empty_like(counts_A)
    segments, start, offset = [], 0, 0
    for heads in torch.bincount(bucket_A).tolist():
        if heads:
            size = int(counts_A[start : start + heads].max())
            segments.append(Segment(start, start + heads, size, offset))
            size_A[start : start + heads] = size
            start, offset = start + heads, offset + heads * size
    first_A, padded_first_A = counts_A.cumsum(0) - counts_A, size_A.cumsum(0) - size_A
    place_P = torch.arange(len(slot_P)) + (padded_first_A - first_A)[slot_P]
    padded_row_N = row_P[first_A].repeat_interleave(size_A)
    padded_row_N[place_P] = row_P
    return Route(
        group=group,
        label_P=label_P[order_P],
        row_P=row_P,
        slot_P=slot_P,
        active_A=active_A,
        task_A=task_ids[active_A],
        counts_A=counts_A,
        segments=tuple(segments),
        padded_row_N=padded_row_N,
        padded_head_N=active_A.repeat_interleave(size_A),
        place_P=place_P,
    )


class _PaddedRows(torch.autograd.Function):
    """Rows of z in a route's padded layout; the gradients of padding are never read."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.rows = route, len(z_BD)
        return z_BD.index_select(0, route.padded_row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        grad_PD = grad_ND.index_select(0, ctx.route.place_P)
        return grad_ND.new_zeros(ctx.rows, grad_ND.shape[1]).index_add_(0, ctx.route.row_P, grad_PD), None


class _SegmentLinear(torch.autograd.Function):
    """`x_n @ weight_a^T + bias_a` for each row n of active head a in the padded layout: x `[N, I]`, weight `[A, O, I]`,
    bias `[A, O]`, result `[N, O]`. The seam for other kernels (`F.grouped_mm`): padded `baddbmm` for each segment here.

    By hand because autograd's own backward of a split over segments copies the gradient of all weights once more.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        ctx.save_for_backward(x_NI, weight)
        ctx.segments = segments
        out_NO = x_NI.new_empty(len(x_NI), weight.shape[1])
        for s in segments:
            torch.baddbmm(bias[s.heads, None], s.rows(x_NI), weight[s.heads].mT, out=s.rows(out_NO))
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_NI, weight = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
        for s in ctx.segments:
            grad = s.rows(grad_NO)
            if grad_x is not None:
                torch.bmm(grad, weight[s.heads], out=s.rows(grad_x))
            torch.bmm(grad.mT, s.rows(x_NI), out=grad_weight[s.heads])
            torch.sum(grad, 1, out=grad_bias[s.heads])
        return grad_x, grad_weight, grad_bias, None


class _RowsFirst(torch.autograd.Function):
    """`[T, O, B]` to `[B, T, O]`, contiguous in both directions: batched products of permuted gradients are slow."""

    @staticmethod
    def forward(ctx: Any, x_TOB: Tensor) -> Tensor:
        return x_TOB.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> Tensor:
        return grad_BTO.permute(1, 2, 0).contiguous()


class HeadGroup(nn.Module):
    """Heads of one kind, stacked; outputs padded to the largest head with zeros that never move.

    Args:
        names: the tasks' names.
        sizes: number of outputs of each.
        task_ids: their positions in the bank.
        widths: input, hidden and (padded) output widths.

    Attributes:
        weights, biases: for each layer a stack `[T_g, out, in]` and `[T_g, out]`; `parameters()` gives weights first.
        pad_TO: true at outputs that are padding; None where there is none.
    """

    task_ids: Tensor
    sizes: Tensor
    pad_TO: Tensor | None

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        task_ids: Sequence[int],
        widths: Sequence[int],
        activation: Activation,
        dropout: float,
        seed: int,
    ):
        super().__init__()
        self.names, self.outputs = list(names), widths[-1]
        self.activation, self.dropout = activation, dropout
        self.register_buffer("task_ids", torch.tensor(task_ids, dtype=torch.int64), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.int64), persistent=False)
        pad_TO = torch.arange(self.outputs) >= self.sizes[:, None]
        self.register_buffer("pad_TO", pad_TO if pad_TO.any() else None, persistent=False)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for d_in, d_out in pairwise(widths):
            self.weights.append(nn.Parameter(torch.zeros(len(names), d_out, d_in)))
            self.biases.append(nn.Parameter(torch.zeros(len(names), d_out)))
        self.reset_parameters(seed)
        for layer, width in enumerate(widths[1:-1] if dropout else ()):
            salt_T = torch.tensor([stable_hash("dropout", name, layer) for name in names], dtype=torch.int64)
            self.register_buffer(f"constants_{layer}", unit_constants(salt_T, width), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Each head as `nn.Linear` begins: uniform within 1/sqrt(fan_in), seeded by (seed, name, layer) alone."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            last = layer == len(self.weights) - 1
            bound = weight.shape[2] ** -0.5
            for head, name in enumerate(self.names):
                out = int(self.sizes[head]) if last else weight.shape[1]
                generator = torch.Generator().manual_seed(stable_hash(seed, name, layer))
                weight[head, :out].uniform_(-bound, bound, generator=generator)
                bias[head, :out].uniform_(-bound, bound, generator=generator)

    def gather(self, active_A: Tensor) -> list[Tensor]:
        """The parameters of the heads `active_A` `[A, ...]`, to differentiate by: detached copies, or the parameters
        themselves where all heads are active in order. (Autograd through `index_select` would write zeros for all.)"""
        stacks: list[Tensor] = list(self.parameters())
        heads = len(self.names)
        if len(active_A) == heads and torch.equal(active_A, torch.arange(heads, device=active_A.device)):
            return stacks
        return [stack.detach().index_select(0, active_A).requires_grad_() for stack in stacks]

    def _hidden(self, x: Tensor, layer: int, keys: Tensor | None, heads: Tensor | slice, shape: Sequence[int]) -> Tensor:
        """Activation and dropout after hidden layer `layer`, by the unit constants of `heads`, viewed as `shape`."""
        x = ACTIVATIONS[self.activation][0](x)
        if keys is None or not self.training or not self.dropout:
            return F.dropout(x, self.dropout, self.training)
        constants = self.get_buffer(f"constants_{layer}")[heads].view(shape)
        return keyed_dropout(x, mix64(keys + layer), constants, self.dropout)

    def grid_first(self, z_BD: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The first layer of all heads on every row, before its activation: `[A * H, B]`, task-major."""
        return torch.addmm(params[len(self.weights)].reshape(-1, 1), params[0].flatten(0, 1), z_BD.t())

    def grid_rest(self, x: Tensor, params: Sequence[Tensor], keys_B: Tensor | None, heads: Tensor | slice) -> Tensor:
        """Logits `[B, A, O]` from what `grid_first` gives."""
        layers, rows = len(self.weights), x.shape[-1]
        weights, biases = params[:layers], params[layers:]
        for layer in range(1, layers):
            x = self._hidden(x, layer - 1, keys_B, heads, (*x.shape[:-1], 1)).view(*biases[layer - 1].shape, rows)
            x = torch.baddbmm(biases[layer][:, :, None], weights[layer], x)
        logits_BAO = _RowsFirst.apply(x.view(*biases[-1].shape, rows))
        return logits_BAO if self.pad_TO is None else logits_BAO.masked_fill(self.pad_TO[heads], 0)

    def grid(
        self,
        z_BD: Tensor,
        params: Sequence[Tensor] | None = None,
        keys_B: Tensor | None = None,
        active_A: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, A, O]` of every row for the heads `active_A` (all without it), whose `params` may stand in.

        Everything is kept task-major, `[A, H, B]`: then each product of every layer, forward and backward, reads
        contiguous matrices in `nn.Linear`'s orientation.
        """
        heads = slice(None) if active_A is None else active_A
        if params is None:
            stacks = list(self.parameters())
            params = stacks if active_A is None else [stack.index_select(0, active_A) for stack in stacks]
        return self.grid_rest(self.grid_first(z_BD, params), params, keys_B, heads)

    def routed(
        self, z_BD: Tensor, route: Route, params: Sequence[Tensor] | None = None, keys_B: Tensor | None = None
    ) -> Tensor:
        """Logits `[P, O]` of each label's row for its own head, in the route's order; `params` as `gather` gives."""
        return self.routed_rest(self.routed_first(z_BD, route), route, params, keys_B)

    def routed_first(self, z_BD: Tensor, route: Route) -> Tensor:
        """The rows that each head reads, in the padded layout: `[N, D]`."""
        return _PaddedRows.apply(z_BD, route)

    def routed_rest(self, x: Tensor, route: Route, params: Sequence[Tensor] | None, keys_B: Tensor | None) -> Tensor:
        """Logits `[P, O]` from what `routed_first` gives."""
        if params is None:
            params = [stack.index_select(0, route.active_A) for stack in self.parameters()]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, params = x.to(dtype), [stack.to(dtype) for stack in params]
        keys_N1 = None if keys_B is None else keys_B[route.padded_row_N, None]
        layers = len(self.weights)
        for layer in range(layers):
            if layer:
                x = self._hidden(x, layer - 1, keys_N1, route.padded_head_N, x.shape)
            x = _SegmentLinear.apply(x, params[layer], params[layers + layer], route.segments)
        logits_PO = x.index_select(0, route.place_P)
        return logits_PO if self.pad_TO is None else logits_PO.masked_fill(self.pad_TO[route.active_A[route.slot_P]], 0)


class HeadBank(nn.Module):
    """The heads of all tasks: `Linear(in, h_1), activation, [dropout], ..., Linear(h_n, outputs)` for each.

    As a plain module it takes the place of an `nn.ModuleList` of heads: `bank(z_BD)` computes every head on every row,
    `bank(z_BD, task_B)` each row's own head, both with ordinary autograd.

    Args:
        names: the tasks' names, distinct; a head's initial values depend on `seed` and its name only.
        outputs: number of outputs of each task.
        in_features: width of the features z.
        hidden: widths of the heads' hidden layers.
        activation: after each hidden layer.
        dropout: probability of zeroing a hidden unit in training.
        keys: the kind of each task; only tasks of equal keys share a group.
        seed: of the initial values.
        here: positions in `names` of the heads to hold, ascending; None: all. Groups and their padding are those of all
            tasks, so that they correspond on every rank; a group may hold no head. `names` are then the held ones.

    Attributes:
        groups: the `HeadGroup`s. `group.task_ids` are positions in `names`.
        group_T, local_T: each task's group, and its place in that group.

    Raises:
        UserError: where names repeat, or a number of outputs or an option cannot be.
    """

    groups: Sequence[HeadGroup]
    group_T: Tensor
    local_T: Tensor

    def __init__(
        self,
        names: Sequence[str],
        outputs: Sequence[int],
        in_features: int,
        *,
        hidden: Sequence[int] = (),
        activation: Activation = "relu",
        dropout: float = 0.0,
        keys: Sequence[Hashable] | None = None,
        seed: int = 0,
        here: Sequence[int] | None = None,
    ):
        super().__init__()
        self.names, self.outputs, self.in_features = list(names), list(outputs), in_features
        self.hidden, self.activation, self.dropout = tuple(hidden), activation, dropout
        keys = [None] * len(self.names) if keys is None else keys
        if not len(self.names) == len(self.outputs) == len(keys):
            raise UserError(
                f"{len(self.names)} names, {len(self.outputs)} numbers of outputs and {len(keys)} keys: "
                "expected as many of each"
            )
        if len(set(self.names)) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise UserError(f"task '{twice}' is named twice: expected distinct names")
        for name, size in zip(self.names, self.outputs, strict=True):
            if size < 1:
                raise UserError(f"task '{name}' has {size} outputs: expected at least 1")
        if activation not in get_args(Activation):
            raise UserError(f"activation '{activation}' is unknown{nearest(activation, get_args(Activation))}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}: expected a probability, at least 0 and below 1")
        members = [[i for i, k in enumerate(keys) if k == key] for key in dict.fromkeys(keys)]
        grouped = [[ids[i] for i in group] for ids in members for group in group_by_size([self.outputs[i] for i in ids])]
        widths = (in_features, *self.hidden)
        largest = [max(ids, key=lambda i: self.outputs[i]) for ids in grouped]
        self.seed, self._largest = seed, [(self.names[i], self.outputs[i]) for i in largest]
        if here is not None:
            place = {i: place for place, i in enumerate(here)}
            grouped = [[place[i] for i in ids if i in place] for ids in grouped]
            self.names, self.outputs = [self.names[i] for i in here], [self.outputs[i] for i in here]
        groups = (
            HeadGroup(
                [self.names[i] for i in ids], [self.outputs[i] for i in ids], ids, (*widths, out), activation, dropout, seed
            )
            for ids, out in zip(grouped, [out for _, out in self._largest], strict=True)
        )
        self.groups = cast(Sequence[HeadGroup], nn.ModuleList(groups))
        group_T, local_T = torch.empty(2, len(self.names), dtype=torch.int64)
        for index, ids in enumerate(grouped):
            group_T[ids] = index
            local_T[ids] = torch.arange(len(ids))
        # plain attributes, not buffers: routes are computed on the CPU
        self.ids = [torch.tensor(ids, dtype=torch.int64) for ids in grouped]
        self.group_T, self.local_T = group_T, local_T

    def common_start(self, number: int) -> list[Tensor]:
        """How the largest head of a group begins, on whichever rank it is: what heads that are pulled together start from."""
        group, (name, outputs) = self.groups[number], self._largest[number]
        widths = (self.in_features, *self.hidden, outputs)
        one = HeadGroup([name], [outputs], [0], widths, self.activation, 0.0, self.seed)
        device = group.weights[0].device
        return [stack[0].detach().to(device) for stack in one.parameters()]

    def route(self, task_P: Tensor, row_P: Tensor | None = None) -> list[Route]:
        """A `Route` for each group that has labels. `task_P`: each label's task (position in `names`); `row_P`: its row
        of z (by default label i reads row i). Both int64 [P] on the CPU. Cost grows with P, not with T."""
        row_P = torch.arange(len(task_P)) if row_P is None else row_P
        group_P, local_P = self.group_T[task_P], self.local_T[task_P]
        routes = []
        for index, group in enumerate(self.groups):
            label_P = torch.arange(len(task_P)) if len(self.groups) == 1 else (group_P == index).nonzero().squeeze(1)
            if len(label_P):
                first_width = group.weights[0].shape[1]
                smallest = min(8, 1 << first_width.bit_length() - 1)
                routes.append(plan_route(index, local_P[label_P], row_P[label_P], label_P, self.ids[index], smallest))
        return routes

    def forward(self, z_BD: Tensor, task_B: Tensor | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Logits `[B, T, O_max]` of all heads, or with `task_B` (each row's task) `[B, O_max]` of each row's own head.

        Logits beyond a task's outputs are 0 and pass no gradient. `keys_B` (`dropout.row_keys`) keys the dropout masks.
        """
        width = max(self.outputs)
        if task_B is None:
            parts = [F.pad(group.grid(z_BD, None, keys_B), (0, width - group.outputs)) for group in self.groups]
            if len(parts) == 1:
                return parts[0]
            order_T = torch.argsort(torch.cat([group.task_ids for group in self.groups]))
            return torch.cat(parts, 1).index_select(1, order_T)
        routes = [route.to(z_BD.device) for route in self.route(task_B.cpu())]
        if not routes:
            return z_BD.new_zeros(0, width) + z_BD.sum()
        groups = [self.groups[route.group] for route in routes]
        parts = [
            F.pad(group.routed(z_BD, route, None, keys_B), (0, width - group.outputs))
            for group, route in zip(groups, routes, strict=True)
        ]
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat([route.label_P for route in routes])))

    @classmethod
    def from_modules(cls, heads: nn.ModuleList | nn.ModuleDict) -> HeadBank:
        """The bank of separately built heads, with copies of their weights: each an `nn.Linear` or an
        `nn.Sequential(Linear, activation, [Dropout], ..., Linear)`, all of the same widths but for their outputs.

        Raises:
            UserError: naming the first head that is something else or does not fit the others.
        """
        named = list(heads.items() if isinstance(heads, nn.ModuleDict) else ((str(i), head) for i, head in enumerate(heads)))
        shapes = [_head_shape(name, head) for name, head in named]
        if not shapes:
            raise UserError("there are no heads to convert: expected at least one")
        (widths, activation, dropout), first = shapes[0], named[0][0]
        for (name, _), shape in zip(named, shapes, strict=True):
            if (shape[0][:-1], *shape[1:]) != (widths[:-1], activation, dropout):
                raise UserError(
                    f"head '{name}' has (widths, activation, dropout) {shape}, head '{first}' has {shapes[0]}: "
                    "expected to differ in their outputs only"
                )
        names, outputs = [name for name, _ in named], [shape[0][-1] for shape in shapes]
        bank = cls(names, outputs, widths[0], hidden=widths[1:-1], activation=activation or "relu", dropout=dropout)
        bank.to(next(named[0][1].parameters()))
        with torch.no_grad():
            for (_, head), (weights, biases) in zip(named, bank._heads(), strict=True):
                for linear, weight, bias in zip(_linears(head), weights, biases, strict=True):
                    weight.copy_(linear.weight)
                    bias.copy_(linear.bias)
        return bank

    @torch.no_grad()
    def to_modules(self) -> nn.ModuleDict:
        """Each head as an `nn.Sequential` (an `nn.Linear` without hidden layers) with a copy of its weights, by name.

        Raises:
            UserError: naming a task that `nn.ModuleDict` cannot hold (with a dot, empty, or one of its own attributes).
        """
        modules = nn.ModuleDict()
        for name, (weights, biases) in zip(self.names, self._heads(), strict=True):
            layers: list[nn.Module] = []
            for weight, bias in zip(weights, biases, strict=True):
                if layers:
                    layers.append(ACTIVATIONS[self.activation][1]())
                    layers += [nn.Dropout(self.dropout)] if self.dropout else []
                linear = nn.utils.skip_init(
                    nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype
                )
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
                layers.append(linear)
            try:
                modules[name] = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
            except KeyError as error:
                raise UserError(f"task '{name}' cannot name a module of an nn.ModuleDict: {error.args[0]}") from None
        return modules

    @torch.no_grad()
    def copy_heads(self, other: HeadBank, names: Collection[str] | None = None) -> list[str]:
        """Copy from another bank the heads of tasks (of `names`, where given) with the same name and layer shapes; returns
        the names of the copied heads."""
        theirs = dict(zip(other.names, other._heads(), strict=True))
        copied = []
        for name, own in zip(self.names, self._heads(), strict=True):
            if name not in theirs or (names is not None and name not in names):
                continue
            pairs = [pair for stacks in zip(own, theirs[name], strict=True) for pair in zip_longest(*stacks)]
            if all(a is not None and b is not None and a.shape == b.shape for a, b in pairs):
                for mine, given in pairs:
                    mine.copy_(given)
                copied.append(name)
        return copied

    def _heads(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Each task's own weights and biases by layer, without padding, as views, in the order of `names`."""
        for name_group, local, outputs in zip(self.group_T.tolist(), self.local_T.tolist(), self.outputs, strict=True):
            group = self.groups[name_group]
            weights, biases = [w[local] for w in group.weights], [b[local] for b in group.biases]
            yield [*weights[:-1], weights[-1][:outputs]], [*biases[:-1], biases[-1][:outputs]]


def _linears(head: nn.Module) -> list[nn.Linear]:
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def _letter(layer: nn.Module) -> str:
    """L, A or D for a linear layer, an activation of ours or dropout, else a question mark."""
    if isinstance(layer, nn.Linear):
        return "L" if layer.bias is not None else "?"
    if type(layer) in {module for _, module in ACTIVATIONS.values()}:
        ours = getattr(layer, "alpha", 1.0) == 1.0 and getattr(layer, "approximate", "none") == "none"
        return "A" if ours else "?"
    return "D" if type(layer) is nn.Dropout else "?"


def _head_shape(name: str, head: nn.Module) -> tuple[tuple[int, ...], Activation | None, float]:
    """(widths from input to output, activation, dropout) of a separately built head."""
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    linears = _linears(head)
    acts = {key for key, (_, module) in ACTIVATIONS.items() for layer in layers if type(layer) is module}
    drops = {layer.p for layer in layers if isinstance(layer, nn.Dropout)}
    chained = all(a.out_features == b.in_features for a, b in pairwise(linears))
    if not re.fullmatch("L(AL)*|L(ADL)*", "".join(map(_letter, layers))) or not chained or max(len(acts), len(drops)) > 1:
        raise UserError(
            f"head '{name}' is {head}: expected nn.Linear or nn.Sequential(Linear, activation, [Dropout], ..., Linear) "
            f"with biases and one activation of {', '.join(ACTIVATIONS)}"
        )
    widths = (linears[0].in_features, *(linear.out_features for linear in linears))
    return widths, cast(Activation, acts.pop()) if acts else None, drops.pop() if drops else 0.0
