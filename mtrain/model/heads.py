"""All heads of all tasks as a handful of stacked tensors.

Heads of one kind, of one form and of similar size form a `HeadGroup`: for each layer one weight `[T_g, out, in]` and one bias
`[T_g, out]`. Two kernels compute the same function:

- *grid*: every head on every row. All heads of a group read the same feature, so the first layer is one GEMM with a
  `[T_g*out, in]` view of its weight; deeper layers are batched products over tasks.
- *routed*: every row (or label) belongs to one task. Rows are sorted by task and padded to segments; each layer is a
  batched product over the *active* tasks only.

Before the first layer a head may mix experts by a gate of its own, scale and shift what it reads, and read the logits of
other heads for the same row (its *parents*), which then run on its rows too.

A trainer's step is: `bank.route`, then for each route `group.gather` and `group.routed`, the loss, one
`torch.autograd.grad` with respect to `z` and the gathered parameters, and `HeadAdamW.step` with the gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import zip_longest
from math import prod
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.errors import UserError, nearest
from mtrain.model.dropout import keyed_dropout, mix64, unit_constants
from mtrain.model.head_forms import Gate, HeadForm, Source, plan_groups
from mtrain.model.head_kernels import PaddedRows, RowsFirst, SegmentLinear, gated_grid, split_columns
from mtrain.model.head_modules import ACTIVATIONS, Activation, common_form, linears, to_module
from mtrain.model.routes import Route, plan_fed_routes, plan_route


def stable_hash(*parts: object) -> int:
    """63 bits of BLAKE2 of `parts`' text: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class HeadGroup(nn.Module):
    """Heads of one kind and form, stacked; layers padded to the largest head with zeros that never move.

    Args:
        names: the tasks' names.
        forms: what each head is.
        sizes: number of outputs of each.
        task_ids: their positions in the bank.
        widths: of the layers, padded.
        source: what the heads read.
        scale_shift: whether each head scales and shifts the features that it reads.

    Attributes:
        weights, biases: for each layer a stack `[T_g, out, in]` and `[T_g, out]`; `parameters()` gives weights first.
        inputs: of the first layer's input, behind these: `scale`, `shift` `[T_g, D]`, `gate_weight` `[T_g, E, D_by]`,
            `gate_bias` `[T_g, E]`, where heads have them.
        pad_TO: true at outputs that are padding; None where there is none.
    """

    task_ids: Tensor
    sizes: Tensor
    pad_TO: Tensor | None
    closed_TE: Tensor | None

    def __init__(
        self,
        names: Sequence[str],
        forms: Sequence[HeadForm],
        sizes: Sequence[int],
        task_ids: Sequence[int],
        widths: Sequence[int],
        source: Source,
        activation: Activation,
        dropout: float,
        seed: int,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.names, self.outputs, self.source = list(names), widths[-1], source
        self.activation, self.dropout = activation, dropout
        self.plain = not (source.parents or source.experts or scale_shift)
        self.register_buffer("task_ids", torch.tensor(task_ids, dtype=torch.int64), persistent=False)
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.int64), persistent=False)
        self.widths = [form.widths(size) for form, size in zip(forms, sizes, strict=True)]
        """Of each head's layers, without padding."""
        self.ragged = any(isinstance(width, str) for form in forms[:1] for width in form.hidden)
        """Whether hidden layers may be padded."""
        self.combine = [form.combine for form in forms]
        self.fixed = any(weights is not None for weights in self.combine)
        """Whether heads have weights that are not trained: all of a group or none."""
        for layer, width in enumerate(widths):
            own_T = torch.tensor([own[layer] for own in self.widths], dtype=torch.int64)
            pad = torch.arange(width) >= own_T[:, None]
            name = "pad_TO" if layer == len(widths) - 1 else f"pad_{layer}"
            self.register_buffer(name, pad if pad.any() else None, persistent=False)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for d_in, d_out in zip((source.in_features, *widths), widths, strict=False):
            self.weights.append(nn.Parameter(torch.zeros(len(names), d_out, d_in)))
            self.biases.append(nn.Parameter(torch.zeros(len(names), d_out)))
        self.inputs = nn.ParameterDict()
        if scale_shift:
            self.inputs["scale"] = nn.Parameter(torch.ones(len(names), source.width))
            self.inputs["shift"] = nn.Parameter(torch.zeros(len(names), source.width))
        if source.experts:
            by = source.by.stop - source.by.start
            self.inputs["gate_weight"] = nn.Parameter(torch.zeros(len(names), source.experts, by))
            self.inputs["gate_bias"] = nn.Parameter(torch.zeros(len(names), source.experts))
        chosen = [range(source.experts) if form.experts is None else form.experts for form in forms]
        closed_TE = torch.tensor([[e not in of_one for e in range(source.experts)] for of_one in chosen], dtype=torch.bool)
        self.register_buffer("closed_TE", closed_TE if closed_TE.any() else None, persistent=False)
        self.reset_parameters(seed)
        for layer, width in enumerate(widths[:-1] if dropout else ()):
            salt_T = torch.tensor([stable_hash("dropout", name, layer) for name in names], dtype=torch.int64)
            self.register_buffer(f"constants_{layer}", unit_constants(salt_T, width), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Each head as `nn.Linear` begins: uniform within 1/sqrt(fan_in), seeded by (seed, name, layer) alone. Scales begin
        at 1, shifts at 0. Fixed heads have the weights that they combine their parents by."""
        if self.fixed:
            for head, (weights, size) in enumerate(zip(self.combine, self.sizes.tolist(), strict=True)):
                start = 0
                for weight, (_, outputs) in zip(weights or (), self.source.parents, strict=True):
                    self.weights[0][head, :size, start : start + size] = weight * torch.eye(size)
                    start += outputs
            return
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            for head, (name, own) in enumerate(zip(self.names, self.widths, strict=True)):
                fan_in = own[layer - 1] if layer else self.source.in_features
                _reset(weight[head, : own[layer], :fan_in], bias[head, : own[layer]], stable_hash(seed, name, layer))
        if self.source.experts:
            for name, weight, bias in zip(self.names, self.inputs["gate_weight"], self.inputs["gate_bias"], strict=True):
                _reset(weight, bias, stable_hash(seed, name, "gate"))

    def padding(self) -> list[Tensor | None]:
        """For each of `parameters()`, true at padding, in a shape that broadcasts; None where there is none."""
        layers = len(self.weights)
        outs = [self.pad_TO if layer == layers - 1 else getattr(self, f"pad_{layer}") for layer in range(layers)]
        weights: list[Tensor | None] = []
        for before, after in zip([None, *outs], outs, strict=False):
            pads = [before[:, None]] if before is not None else []
            pads += [after[..., None]] if after is not None else []
            weights.append(pads[0] | pads[-1] if pads else None)
        return [*weights, *outs, *[None] * len(self.inputs)]

    def first_weight(self) -> Tensor:
        """The first layer's weight as a function of all of z, scales folded in, `[T_g, H, z_width]`."""
        weight = self.weights[0].detach()
        return self.widened(weight * self.inputs["scale"].detach()[:, None] if "scale" in self.inputs else weight)

    def widened(self, x: Tensor) -> Tensor:
        """Values of the columns of z that these heads read, in the last dimension, with 0 for all others."""
        columns, width = self.source.columns, self.source.z_width
        return x if x.shape[-1] == width else F.pad(x, (columns.start, width - columns.stop))

    def gather(self, active_A: Tensor) -> list[Tensor]:
        """The parameters of the heads `active_A` `[A, ...]`, to differentiate by: detached copies, or the parameters
        themselves where all heads are active in order. (Autograd through `index_select` would write zeros for all.)"""
        stacks: list[Tensor] = list(self.parameters())
        heads = len(self.names)
        if len(active_A) == heads and torch.equal(active_A, torch.arange(heads, device=active_A.device)):
            return stacks
        return [stack.detach().index_select(0, active_A).requires_grad_() for stack in stacks]

    def _hidden(
        self, x: Tensor, layer: int, keys: Tensor | None, heads: Tensor | slice, shape: Sequence[int], keep: bool = False
    ) -> Tensor:
        """Activation (in place, unless x is to be kept) and dropout after hidden layer `layer`, by the unit constants of
        `heads`, viewed as `shape`."""
        in_place, module = ACTIVATIONS[self.activation]
        x = module()(x) if keep else in_place(x)
        if keys is None or not self.training or not self.dropout:
            return F.dropout(x, self.dropout, self.training)
        constants = self.get_buffer(f"constants_{layer}")[heads].view(shape)
        return keyed_dropout(x, mix64(keys + layer), constants, self.dropout)

    def _of_inputs(self, params: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.inputs, params[2 * len(self.weights) :], strict=True))

    def _columns(self, z_BD: Tensor) -> Tensor:
        columns = self.source.columns
        return z_BD if columns == slice(0, self.source.z_width) else z_BD[:, columns]

    def grid_first(
        self, z_BD: Tensor, params: Sequence[Tensor], heads: Tensor | slice = slice(None), parents: Sequence[Tensor] = ()
    ) -> Tensor:
        """The first layer of all heads on every row, before its activation: `[A * H, B]`, task-major.

        `parents` are the logits `[A, O_p, B]` that the heads read. Scales and shifts are folded into weight and bias, which
        needs no copy of the features for each task.
        """
        weight, bias = params[0], params[len(self.weights)]
        z_BD = self._columns(z_BD)
        if self.plain:
            return torch.addmm(bias.reshape(-1, 1), weight.flatten(0, 1), z_BD.t())
        source, given, rows = self.source, self._of_inputs(params), z_BD.shape[0]  # len() would be a constant when exported
        own = weight[..., : source.width] if parents else weight
        if "scale" in given:
            bias = torch.baddbmm(bias[..., None], own, given["shift"][..., None]).squeeze(2)
            own = own * given["scale"][:, None]
        if source.experts:
            gate_bias, gate_weight = given["gate_bias"].reshape(-1, 1), given["gate_weight"].flatten(0, 1)
            logits_AEB = torch.addmm(gate_bias, gate_weight, z_BD[:, source.by].t()).view(len(own), source.experts, rows)
            if self.closed_TE is not None:
                logits_AEB = logits_AEB.masked_fill(self.closed_TE[heads][..., None], -torch.inf)
            experts_BED = z_BD[:, source.read].unflatten(1, (source.experts, source.width))
            x = gated_grid(experts_BED, logits_AEB.softmax(1), own, bias)
        else:
            x = torch.addmm(bias.reshape(-1, 1), own.flatten(0, 1), z_BD.t())
        if parents:
            x = torch.baddbmm(x.view(*bias.shape, rows), weight[..., source.width :], torch.cat(list(parents), 1))
        return x.view(bias.numel(), rows)

    def grid_rest(
        self, x: Tensor, params: Sequence[Tensor], keys_B: Tensor | None, heads: Tensor | slice, keep: bool = False
    ) -> Tensor:
        """Logits `[B, A, O]` from what `grid_first` gives, which is overwritten unless it is to be kept."""
        layers, rows = len(self.weights), x.shape[-1]
        weights, biases = params[:layers], params[layers : 2 * layers]
        for layer in range(1, layers):
            x = self._hidden(x, layer - 1, keys_B, heads, (*x.shape[:-1], 1), keep and layer == 1)
            x = x.view(*biases[layer - 1].shape, rows)
            x = torch.baddbmm(biases[layer][:, :, None], weights[layer], x)
        logits_BAO = RowsFirst.apply(x.view(*biases[-1].shape, rows))
        return logits_BAO if self.pad_TO is None else logits_BAO.masked_fill(self.pad_TO[heads], 0)

    def grid(
        self,
        z_BD: Tensor,
        params: Sequence[Tensor] | None = None,
        keys_B: Tensor | None = None,
        active_A: Tensor | None = None,
        parents: Sequence[Tensor] = (),
    ) -> Tensor:
        """Logits `[B, A, O]` of every row for the heads `active_A` (all without it), whose `params` may stand in.

        Everything is kept task-major, `[A, H, B]`: then each product of every layer, forward and backward, reads
        contiguous matrices in `nn.Linear`'s orientation.
        """
        heads = slice(None) if active_A is None else active_A
        if params is None:
            stacks = list(self.parameters())
            params = stacks if active_A is None else [stack.index_select(0, active_A) for stack in stacks]
        return self.grid_rest(self.grid_first(z_BD, params, heads, parents), params, keys_B, heads)

    def routed(
        self, z_BD: Tensor, route: Route, params: Sequence[Tensor] | None = None, keys_B: Tensor | None = None
    ) -> Tensor:
        """Logits `[P, O]` of each label's row for its own head, in the route's order; `params` as `gather` gives."""
        return self.of_labels(self.routed_rest(self.routed_first(z_BD, route), route, params, keys_B), route)

    def routed_first(self, z_BD: Tensor, route: Route) -> Tensor:
        """The rows that each head reads, in the padded layout: `[N, D]`."""
        return PaddedRows.apply(self._columns(z_BD), route)

    def routed_rest(
        self,
        x: Tensor,
        route: Route,
        params: Sequence[Tensor] | None,
        keys_B: Tensor | None,
        parents: Sequence[Tensor] = (),
    ) -> Tensor:
        """Logits `[N, O]` in the padded layout, from what `routed_first` gives and the parents' logits `[N, O_p]`."""
        if params is None:
            params = [stack.index_select(0, route.active_A) for stack in self.parameters()]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, params = x.to(dtype), [stack.to(dtype) for stack in params]
        if not self.plain:
            x = self._routed_input(x, route, self._of_inputs(params), parents)
        keys_N1 = None if keys_B is None else keys_B[route.padded_row_N, None]
        layers = len(self.weights)
        for layer in range(layers):
            if layer:
                x = self._hidden(x, layer - 1, keys_N1, route.padded_head_N, x.shape)
            x = SegmentLinear.apply(x, params[layer], params[layers + layer], route.segments)
        return x

    def of_labels(self, out_NO: Tensor, route: Route) -> Tensor:
        """The logits `[P, O]` of the labels, from those of the padded layout; 0 where they are padding."""
        logits_PO = out_NO.index_select(0, route.place_P)
        return logits_PO if self.pad_TO is None else logits_PO.masked_fill(self.pad_TO[route.active_A[route.slot_P]], 0)

    def _routed_input(self, x_ND: Tensor, route: Route, given: Mapping[str, Tensor], parents: Sequence[Tensor]) -> Tensor:
        """What the first layer reads `[N, I]`, of the padded rows of z."""
        source, read = self.source, x_ND
        if source.experts:
            read, by = split_columns(x_ND, source.read, source.by)
            logits_NE = SegmentLinear.apply(by, given["gate_weight"], given["gate_bias"], route.segments)
            if self.closed_TE is not None:
                logits_NE = logits_NE.masked_fill(self.closed_TE[route.padded_head_N], -torch.inf)
            gate_NE = logits_NE.softmax(1)
            read = torch.bmm(gate_NE.unsqueeze(1), read.unflatten(1, (source.experts, source.width))).squeeze(1)
        if "scale" in given:
            slot_N = route.padded_slot_N
            read = torch.addcmul(given["shift"][slot_N], read, given["scale"][slot_N])
        return torch.cat([read, *(logits.to(read.dtype) for logits in parents)], 1) if parents else read


class HeadBank(nn.Module):
    """The heads of all tasks: `Linear(in, h_1), activation, [dropout], ..., Linear(h_n, outputs)` for each.

    As a plain module it takes the place of an `nn.ModuleList` of heads: `bank(z_BD)` computes every head on every row,
    `bank(z_BD, task_B)` each row's own head, both with ordinary autograd.

    Args:
        names: the tasks' names, distinct; a head's initial values depend on `seed` and its name only.
        outputs: number of outputs of each task.
        in_features: width of the features z; or where they are several side by side, the shape of a row of each by name,
            `(D,)` or `(E, D)`.
        hidden: widths of the heads' hidden layers; "2x" is twice the head's outputs.
        activation: after each hidden layer.
        dropout: probability of zeroing a hidden unit in training.
        keys: the kind of each task; only tasks of equal keys share a group.
        seed: of the initial values.
        here: positions in `names` of the heads to hold, ascending; None: all. Groups and their padding are those of all
            tasks, so that they correspond on every rank; a group may hold no head. `names` are then the held ones.
        forms: what each head is; None: all have hidden layers `hidden` and read the only feature.
        gate: mixes experts for each head that reads them.
        scale_shift: each head scales and shifts the features that it reads, by parameters `[D]` of its own (feature-wise
            transformations: Perez et al. 2018, arXiv:1709.07871, equation 2, with a parameter for each task).

    Attributes:
        groups: the `HeadGroup`s. `group.task_ids` are positions in `names`.
        group_T, local_T: each task's group, and its place in that group.
        order: the numbers of the groups, those of parents before those of their children.
        parents: of each group, for each of its heads' parents: the group that it is in, and ids there `[T_g]`.

    Raises:
        UserError: where names repeat, or a number of outputs, an option or a form cannot be.
    """

    groups: Sequence[HeadGroup]
    group_T: Tensor
    local_T: Tensor

    def __init__(
        self,
        names: Sequence[str],
        outputs: Sequence[int],
        in_features: int | Mapping[str, tuple[int, ...]],
        *,
        hidden: Sequence[int | str] = (),
        activation: Activation = "relu",
        dropout: float = 0.0,
        keys: Sequence[Hashable] | None = None,
        seed: int = 0,
        here: Sequence[int] | None = None,
        forms: Sequence[HeadForm] | None = None,
        gate: Gate | None = None,
        scale_shift: bool = False,
    ):
        super().__init__()
        features = {"features": (in_features,)} if isinstance(in_features, int) else dict(in_features)
        self.names, self.outputs, self.in_features = list(names), list(outputs), sum(map(prod, features.values()))
        self.hidden, self.activation, self.dropout, self.scale_shift = tuple(hidden), activation, dropout, scale_shift
        keys = [None] * len(self.names) if keys is None else keys
        forms = [HeadForm(self.hidden)] * len(self.names) if forms is None else forms
        if not len(self.names) == len(self.outputs) == len(keys) == len(forms):
            raise UserError(
                f"{len(self.names)} names, {len(self.outputs)} numbers of outputs, {len(keys)} keys and {len(forms)} forms: "
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
        plans = plan_groups(self.names, self.outputs, forms, keys, features, gate)
        largest = [max(plan.ids, key=lambda i: self.outputs[i]) for plan in plans]
        self.seed, self._largest = seed, [(self.names[i], forms[i], self.outputs[i]) for i in largest]
        place = {i: place for place, i in enumerate(range(len(self.names)) if here is None else here)}
        grouped = [[place[i] for i in plan.ids if i in place] for plan in plans]
        self.names, self.outputs = [self.names[i] for i in place], [self.outputs[i] for i in place]
        self.forms = [forms[i] for i in place]
        """Of each head; parents are positions among all tasks."""
        groups = (
            HeadGroup(
                [self.names[i] for i in ids],
                [self.forms[i] for i in ids],
                [self.outputs[i] for i in ids],
                ids,
                plan.widths,
                plan.source,
                activation,
                dropout,
                seed,
                scale_shift,
            )
            for ids, plan in zip(grouped, plans, strict=True)
        )
        self.groups = cast(Sequence[HeadGroup], nn.ModuleList(groups))
        group_T, local_T = torch.empty(2, len(self.names), dtype=torch.int64)
        for index, ids in enumerate(grouped):
            group_T[ids] = index
            local_T[ids] = torch.arange(len(ids))
        # plain attributes, not buffers: routes are computed on the CPU
        self.ids = [torch.tensor(ids, dtype=torch.int64) for ids in grouped]
        self.first_ids = [ids[0] if ids else 0 for ids in grouped]
        self.group_T, self.local_T = group_T, local_T
        self.parents: list[list[tuple[int, Tensor]]] = []
        for ids, plan in zip(grouped, plans, strict=True):
            parents = [[place[self.forms[i].parents[k]] for i in ids] for k in range(len(plan.source.parents))]
            of_group = zip(plan.source.parents, parents, strict=True)
            self.parents.append([(number, local_T[torch.tensor(at, dtype=torch.int64)]) for (number, _), at in of_group])
        self.order: list[int] = []
        while len(self.order) < len(plans):
            ready = [n for n, plan in enumerate(plans) if all(parent in self.order for parent, _ in plan.source.parents)]
            self.order += [n for n in ready if n not in self.order]

    def common_start(self, number: int) -> list[Tensor]:
        """How the largest head of a group begins, on whichever rank it is: what heads that are pulled together start from."""
        group, (name, form, outputs) = self.groups[number], self._largest[number]
        widths, source = form.widths(outputs), group.source
        one = HeadGroup([name], [form], [outputs], [0], widths, source, self.activation, 0.0, self.seed, self.scale_shift)
        device = group.weights[0].device
        return [stack[0].detach().to(device) for stack in one.parameters()]

    def route(self, task_P: Tensor, row_P: Tensor | None = None) -> list[Route]:
        """A `Route` for each group that has labels, or feeds one. `task_P`: each label's task (position in `names`); `row_P`:
        its row of z (by default label i reads row i). Both int64 [P] on the CPU. Cost grows with P, not with T."""
        row_P = torch.arange(len(task_P)) if row_P is None else row_P
        group_P, local_P = self.group_T[task_P], self.local_T[task_P]
        entries, smallest = {}, []
        for index, group in enumerate(self.groups):
            label_P = torch.arange(len(task_P)) if len(self.groups) == 1 else (group_P == index).nonzero().squeeze(1)
            if len(label_P):
                entries[index] = local_P[label_P], row_P[label_P], label_P
            first_width = group.weights[0].shape[1]
            smallest.append(min(8, 1 << first_width.bit_length() - 1))
        if any(self.parents):
            return plan_fed_routes(entries, self.order, self.parents, self.ids, smallest)
        return [plan_route(index, *entry, self.ids[index], smallest[index]) for index, entry in entries.items()]

    def grid_parents(self, number: int, logits: Mapping[int, Tensor]) -> list[Tensor]:
        """What the heads of a group read of their parents `[A, O_p, B]`, from the logits `[B, A, O]` of groups."""
        widths = [outputs for _, outputs in self.groups[number].source.parents]
        of_group = zip(self.parents[number], widths, strict=True)
        return [logits[parent][:, local_T, :outputs].permute(1, 2, 0) for (parent, local_T), outputs in of_group]

    def routed_parents(self, route: Route, out: Mapping[int, Tensor]) -> list[Tensor]:
        """What the active heads of a route read of their parents `[N, O_p]`, from `routed_rest`'s logits of groups."""
        if route.parent_KN is None:
            return []
        of_group = zip(self.groups[route.group].source.parents, route.parent_KN, strict=True)
        return [out[parent].index_select(0, place_N)[:, :outputs] for (parent, outputs), place_N in of_group]

    def beyond_taps(self, grid: bool) -> str | None:
        """Why the gradient of a task at z is not that at its own tap alone, in words; None where it is. In a grid the first
        layer is the tap, which must be linear in z."""
        for group, (name, _, _) in zip(self.groups, self._largest, strict=True):
            if group.source.parents:
                return f"task '{name}' reads the logits of another task, whose head its gradient passes through too"
            if grid and group.source.experts:
                return f"task '{name}' mixes experts by a gate, which is not linear in the features"
        return None

    def forward(self, z_BD: Tensor, task_B: Tensor | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Logits `[B, T, O_max]` of all heads, or with `task_B` (each row's task) `[B, O_max]` of each row's own head.

        Logits beyond a task's outputs are 0 and pass no gradient. `keys_B` (`dropout.row_keys`) keys the dropout masks.
        """
        width = max(self.outputs)
        found: dict[int, Tensor] = {}
        if task_B is None:
            for number in self.order:
                parents = self.grid_parents(number, found)
                found[number] = self.groups[number].grid(z_BD, None, keys_B, parents=parents)
            parts = [F.pad(found[number], (0, width - group.outputs)) for number, group in enumerate(self.groups)]
            if len(parts) == 1:
                return parts[0]
            order_T = torch.argsort(torch.cat([group.task_ids for group in self.groups]))
            return torch.cat(parts, 1).index_select(1, order_T)
        routes = {route.group: route.to(z_BD.device) for route in self.route(task_B.cpu())}
        if not routes:
            return z_BD.new_zeros(0, width) + z_BD.sum()
        for number in self.order:
            if number in routes:
                route, group = routes[number], self.groups[number]
                parents = self.routed_parents(route, found)
                found[number] = group.routed_rest(group.routed_first(z_BD, route), route, None, keys_B, parents)
        parts = []
        for number, route in routes.items():
            group = self.groups[number]
            parts.append(F.pad(group.of_labels(found[number], route), (0, width - group.outputs)))
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat([route.label_P for route in routes.values()])))

    @classmethod
    def from_modules(cls, heads: nn.ModuleList | nn.ModuleDict) -> HeadBank:
        """The bank of separately built heads, with copies of their weights: each an `nn.Linear` or an
        `nn.Sequential(Linear, activation, [Dropout], ..., Linear)`, all of the same widths but for their outputs; hidden
        layers may also all be as wide as the same multiple of the outputs.

        Raises:
            UserError: naming the first head that is something else or does not fit the others.
        """
        named = list(heads.items() if isinstance(heads, nn.ModuleDict) else ((str(i), head) for i, head in enumerate(heads)))
        in_features, form, outputs, activation, dropout = common_form(named)
        names = [name for name, _ in named]
        bank = cls(names, outputs, in_features, hidden=form.hidden, activation=activation or "relu", dropout=dropout)
        bank.to(next(named[0][1].parameters()))
        with torch.no_grad():
            for (_, head), (weights, biases, _) in zip(named, bank._heads(), strict=True):
                for linear, weight, bias in zip(linears(head), weights, biases, strict=True):
                    weight.copy_(linear.weight)
                    bias.copy_(linear.bias)
        return bank

    @torch.no_grad()
    def to_modules(self) -> nn.ModuleDict:
        """Each head as an `nn.Sequential` (an `nn.Linear` without hidden layers) with a copy of its weights, by name. It reads
        the feature that the head reads.

        Raises:
            UserError: naming a task that `nn.ModuleDict` cannot hold (with a dot, empty, or one of its own attributes), or
                whose head is more than layers.
        """
        for group in self.groups:
            if not group.plain and group.names:
                what = "a gate" if group.source.experts else "parents" if group.source.parents else "a scale and shift"
                raise UserError(
                    f"the head of task '{group.names[0]}' has {what}, which an nn.Sequential of layers does not have"
                )
        modules = nn.ModuleDict()
        for name, (weights, biases, _) in zip(self.names, self._heads(), strict=True):
            try:
                modules[name] = to_module(weights, biases, self.activation, self.dropout)
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

    def _heads(self) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Each task's own weights and biases by layer, without padding, and `inputs`, as views, in the order of `names`."""
        for number, local in zip(self.group_T.tolist(), self.local_T.tolist(), strict=True):
            group = self.groups[number]
            own = group.widths[local]
            ins = (group.source.in_features, *own)
            weights = [w[local, :out, :fan_in] for w, fan_in, out in zip(group.weights, ins, own, strict=False)]
            biases = [b[local, :out] for b, out in zip(group.biases, own, strict=True)]
            yield weights, biases, [stack[local] for stack in group.inputs.values()]


def _reset(weight: Tensor, bias: Tensor, seed: int) -> None:
    """Values as those of a new `nn.Linear`, into views."""
    generator = torch.Generator().manual_seed(seed)
    bound = weight.shape[1] ** -0.5
    for view in (weight, bias):
        view.copy_(torch.empty(view.shape, dtype=view.dtype).uniform_(-bound, bound, generator=generator))
