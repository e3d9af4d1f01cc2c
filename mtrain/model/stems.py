"""Inputs of each task's own."""

from __future__ import annotations

import inspect
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.components import Spec
from mtrain.errors import UserError, matches, nearest
from mtrain.model.fusion import build_encoder
from mtrain.model.head_kernels import PaddedRows, SegmentLinear
from mtrain.model.head_modules import ACTIVATIONS, Activation
from mtrain.model.heads import stable_hash
from mtrain.model.routes import plan_route

SMALLEST = 8  # rows up to which a batch's tasks are padded to one size


class TaskStems(nn.Module):
    """An input module for each task, of the columns that the task has, in front of a shared trunk.

    Layers of all stems are stacks `[T, out, in]`, zero-padded to the widest task's columns; each row goes through the stem of
    its own task, all of them as one grouped computation. They are trained, and replicated, with the trunk: a stem whose task
    is not in a batch still moves by its momentum.

    Args:
        inputs, tasks: widths by name, and names of the tasks.
        columns: the inputs of each task, by its name or a pattern (the last that matches counts); without an entry, all.
        widths: layers of a stem.
        activation: after each.
        trunk: the network that reads the stems' outputs.
    """

    column_TF: Tensor

    def __init__(
        self,
        inputs: dict[str, int],
        tasks: list[str],
        columns: dict[str, list[str]] = {},  # noqa: B006
        widths: list[int] = [64],  # noqa: B006
        activation: Activation = "relu",
        trunk: Spec = Spec(class_path="MLP"),  # noqa: B008
    ):
        super().__init__()
        if not widths or min(widths) < 1:
            raise UserError(f"model.trunk: widths are {widths}, expected at least one positive number")
        self.names, self.activation = list(inputs), activation
        ends = dict(zip(inputs, accumulate(inputs.values()), strict=True))
        of_input = {name: torch.arange(ends[name] - width, ends[name]) for name, width in inputs.items()}
        of_task = [torch.cat([of_input[name] for name in names]) for names in _columns(self.names, tasks, columns)]
        zero = sum(inputs.values())  # a column of zeros behind all others
        column_TF = nn.utils.rnn.pad_sequence(of_task, batch_first=True, padding_value=zero)
        self.register_buffer("column_TF", column_TF, persistent=False)
        sizes, seed = [column_TF.shape[1], *widths], int(torch.randint(2**62, ()))
        self.layers = len(widths)
        for layer, (fan_in, out) in enumerate(pairwise(sizes)):
            weight, bias = torch.zeros(len(tasks), out, fan_in), torch.empty(len(tasks), out)
            for t, name in enumerate(tasks):  # as nn.Linear begins, by the task's name
                own = len(of_task[t]) if layer == 0 else fan_in
                generator = torch.Generator().manual_seed(stable_hash(seed, name, layer))
                weight[t, :, :own].uniform_(-(own**-0.5), own**-0.5, generator=generator)
                bias[t].uniform_(-(own**-0.5), own**-0.5, generator=generator)
            # parameters of this module itself, so that what shards or gathers them does so before its forward
            self.register_parameter(f"weight_{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias_{layer}", nn.Parameter(bias))
        self.trunk, self.out_features = build_encoder(trunk, widths[-1], "trunk")
        self.takes_keys = "keys_B" in inspect.signature(self.trunk.forward).parameters

    def forward(self, inputs: dict[str, Tensor], keys_B: Tensor | None = None, task_B: Tensor | None = None) -> Tensor:
        if task_B is None:
            raise UserError("model.trunk: TaskStems needs the task of each row, which is not known here")
        x_BF = F.pad(torch.cat([inputs[name] for name in self.names], 1), (0, 1)).gather(1, self.column_TF[task_B])
        h_BD = self._stems(x_BF, task_B)
        return self.trunk(h_BD, keys_B) if self.takes_keys else self.trunk(h_BD)

    def _stems(self, x_BF: Tensor, task_B: Tensor) -> Tensor:
        """Each row through the stem of its own task."""
        params = [(getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")) for i in range(self.layers)]
        if x_BF.shape[0] == 0:  # a rank without rows: the gradient of every parameter is 0
            return x_BF.new_zeros(0, params[-1][1].shape[1]) + 0 * torch.stack([p.sum() for both in params for p in both]).sum()
        row_B = torch.arange(len(task_B))
        route = plan_route(0, task_B.cpu(), row_B, row_B, torch.arange(len(self.column_TF)), SMALLEST).to(x_BF.device)
        h = PaddedRows.apply(x_BF, route)
        for weight, bias in params:
            weight, bias = weight.index_select(0, route.active_A), bias.index_select(0, route.active_A)
            if torch.is_autocast_enabled(h.device.type):
                dtype = torch.get_autocast_dtype(h.device.type)
                h, weight, bias = h.to(dtype), weight.to(dtype), bias.to(dtype)
            h = ACTIVATIONS[self.activation][0](SegmentLinear.apply(h, weight, bias, route.segments))
        return h.index_select(0, route.place_P[torch.argsort(route.label_P)])


def _columns(inputs: list[str], tasks: list[str], columns: dict[str, list[str]]) -> list[list[str]]:
    """The inputs of each task."""
    for pattern, names in columns.items():
        if not any(matches(task, pattern) for task in tasks):
            raise UserError(f"model.trunk.init_args.columns: no task '{pattern}'{nearest(pattern, tasks)}")
        if not names:
            raise UserError(f"model.trunk.init_args.columns.{pattern}: is empty, expected names of inputs")
        for name in names:
            if name not in inputs:
                raise UserError(f"model.trunk.init_args.columns.{pattern}: no input '{name}'{nearest(name, inputs)}")
    chosen = [next((names for pattern, names in reversed(columns.items()) if matches(t, pattern)), inputs) for t in tasks]
    return [list(dict.fromkeys(names)) for names in chosen]
