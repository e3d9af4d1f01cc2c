"""Which modules FSDP2 gathers one by one."""

from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn

from mtrain.model.trunks import MLP
from mtrain.parallel import wrap


def gathered(trunk, policy="SIZE_BASED_WRAP"):
    """Names of the modules that accelerate would wrap."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, min_num_params=100)
    wrap._fit_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), trunk)
    plugin.set_auto_wrap_policy(trunk)
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, trunk)
    return [name for name, module in trunk.named_modules() if name and chosen is not None and chosen(module)]


class Blocks(nn.Module):
    _no_split_modules = ("MLP", "NotHere")

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MLP(16, [16]), MLP(16, [16])])


def test_by_size_they_are_layers_and_not_the_lists_that_hold_them():
    assert gathered(MLP(16, [32, 8], norm="layer")) == ["linears.0", "linears.1"]


def test_blocks_that_a_model_names_come_first():
    assert gathered(nn.Sequential(Blocks(), nn.Linear(64, 64))) == ["0.layers.0", "0.layers.1"]
    assert gathered(nn.Sequential(Blocks()), "TRANSFORMER_BASED_WRAP") == ["0.layers.0", "0.layers.1"]


def test_no_policy_stays_none():
    assert gathered(MLP(16, [32]), "NO_WRAP") == []


def test_inputs_are_not_rounded_in_mixed_precision():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    trunk = nn.Linear(3, 2)
    wrap._fit_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), autocast=autocast), trunk)
    assert not plugin.mixed_precision_policy.cast_forward_inputs
    assert trunk(torch.ones(1, 3)).dtype == torch.bfloat16
