"""Mixtures of experts: the experts of all levels; the gates of tasks are in their heads (`model.head.gate`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrain.components import Spec
from mtrain.errors import UserError
from mtrain.model.fusion import Stacked, build_stacked, keys_of, salts_of

EXPERTS, GATE = "experts", "gate"
SMALL = Spec(class_path="MLP", init_args={"widths": [64]})


class MMoE(nn.Module):
    """Experts that read the same inputs, as one computation (Ma et al. 2018, "Modeling Task Relationships in Multi-task
    Learning with Multi-gate Mixture-of-Experts"). Gives the features `experts` `[B, E, D]` and, for gates, `gate`: the inputs.

    Args:
        experts: how many.
        expert: the network of one.
    """

    def __init__(self, in_features: int, experts: int = 8, expert: Spec = SMALL):
        super().__init__()
        if experts < 2:
            raise UserError(f"model.trunk: experts is {experts}, expected at least 2")
        self.experts, width = build_stacked(expert, in_features, experts, experts=True)
        self.salts = salts_of([str(e) for e in range(experts)])
        self.out_features = {EXPERTS: (experts, width), GATE: in_features}

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> dict[str, Tensor]:
        return {EXPERTS: self.experts(x_BF, keys_of(keys_B, self.salts)).transpose(0, 1), GATE: x_BF}


class CGC(nn.Module):
    """Experts of groups of tasks and shared ones (Tang et al. 2020, "Progressive Layered Extraction (PLE)"): with one level
    CGC, with several PLE, where gates of each group, and of the shared experts, stand between levels.

    Gives the features `experts` `[B, E, D]`: those of the first group, of the second, ..., the shared ones last; and, for the
    gates of tasks, `gate`: the inputs, or with several levels what the last level's experts read, of all groups side by side.
    A task of group g chooses (`experts` in `tasks.by_name`) from the experts of its group and the shared ones.

    Args:
        groups: groups of tasks.
        group_experts, shared_experts: experts of each group, and shared ones, on each level.
        levels: levels of experts.
        expert: the network of one.
    """

    shut_GE: Tensor

    def __init__(
        self,
        in_features: int,
        groups: int = 2,
        group_experts: int = 2,
        shared_experts: int = 2,
        levels: int = 1,
        expert: Spec = SMALL,
    ):
        super().__init__()
        options = {"groups": groups, "group_experts": group_experts, "shared_experts": shared_experts, "levels": levels}
        if wrong := next((f"{name} is {value}" for name, value in options.items() if value < 1), None):
            raise UserError(f"model.trunk: {wrong}, expected at least 1")
        count, width = groups * group_experts + shared_experts, in_features
        self.levels, self.gates = nn.ModuleList(), nn.ModuleList()
        self.salts = [salts_of([f"{level}/{e}" for e in range(count)]) for level in range(levels)]
        self.reads = [e // group_experts if e < groups * group_experts else groups for e in range(count)]
        source = torch.tensor(self.reads)
        chooser = torch.arange(groups + 1)[:, None]  # the last one, of the shared experts, chooses from all
        shut = (source != chooser) & (source != groups) & (chooser != groups)
        self.register_buffer("shut_GE", shut, persistent=False)
        for level in range(levels):
            experts, out = build_stacked(expert, width, count, experts=True)
            self.levels.append(experts)
            if level + 1 < levels:
                self.gates.append(Stacked([nn.Linear(width, count) for _ in range(groups + 1)]))
                width = out
        self.out_features = {EXPERTS: (count, out), GATE: in_features if levels == 1 else (groups + 1) * width}

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> dict[str, Tensor]:
        h = x_BF  # what the experts of each group, and the shared ones, read: `[G, B, D]`, or the same for all
        z_EBD = self.levels[0](h, keys_of(keys_B, self.salts[0]))
        for level, (gates, experts) in enumerate(zip(self.gates, self.levels[1:], strict=True), 1):
            share_GBE = gates(h).masked_fill(self.shut_GE[:, None], -torch.inf).softmax(-1)
            h = torch.einsum("gbe,ebd->gbd", share_GBE, z_EBD)
            z_EBD = experts(h[self.reads], keys_of(keys_B, self.salts[level]))
        return {EXPERTS: z_EBD.transpose(0, 1), GATE: h if h.dim() == 2 else h.transpose(0, 1).flatten(1)}
