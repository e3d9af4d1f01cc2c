"""The start of several processes, and what accelerate wraps the trunk in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradScalerKwargs, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtrain.config import Config
from mtrain.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_SINGLE = (DistributedType.NO,)
_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of a run, as the launcher asks.

    Raises:
        UserError: a precision that the device does not have; a launcher that started other processes than it was asked for,
            or asked for a wrapper that mtrain or the device does not have.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes and started one (--cpu and MULTI_CPU do that); use "
            "launch/cpu.yaml, or torchrun"
        )
    AcceleratorState._reset_state()  # a notebook may train another precision than before
    handlers = [
        GradScalerKwargs(enabled=False),  # the stepper has a loss scale of its own, for trunk and heads
        InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.timeout_minutes)),
    ]
    log_with = "wandb" if config.tracker.class_path.rpartition(".")[2].lower() == "wandb" else None
    cpu = world > 1 and not torch.cuda.is_available()  # else torchrun's processes would not know of each other
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=config.train.precision, log_with=log_with, kwargs_handlers=handlers)
        if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
            raise ValueError("fp16 needs an accelerator, bf16 also runs on a CPU")
    except (ValueError, RuntimeError) as error:
        if world > 1 and isinstance(error, torch.distributed.DistError):
            where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
            reason = str(error).partition("\n")[0]  # torch may add where in its code it was raised
            raise UserError(
                f"the {world} processes do not meet at {where} (MASTER_ADDR, MASTER_PORT): {reason}; give the launcher an "
                "address that all reach and a free port"
            ) from None
        raise UserError(f"train.precision {config.train.precision}: not on this device: {error}") from None
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes, but accelerate knows of {accelerator.num_processes}; check "
            "num_processes and distributed_type of its config file"
        )
    kind = accelerator.distributed_type
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asked and kind != DistributedType.FSDP and world > 1:
        raise UserError("the launcher asks for FSDP, which accelerate does not do on this device; use DDP, as launch/cpu.yaml")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("the launcher asks for FSDP 1; set fsdp_version: 2, as launch/fsdp2.yaml does")
    if kind not in (*_SINGLE, *_DDP, DistributedType.FSDP):
        raise UserError(f"the launcher asks for {kind.value}; mtrain trains with DDP and FSDP2, see launch/README.md")
    return accelerator


def prepare(accelerator: Accelerator, trunk: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """`accelerator.prepare`: the trunk in DDP or FSDP2, as the launcher asks, and its optimizer.

    Raises:
        UserError: the trunk has batch normalisation, whose statistics would be those of each rank's own rows; or accelerate
            did not wrap it as asked, so that ranks would train apart.
    """
    if accelerator.num_processes == 1:
        return accelerator.prepare(trunk, optimizer)
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    found = next((name for name, module in trunk.named_modules() if isinstance(module, batch_norm)), None)
    if found is not None:
        raise UserError(
            f"model.trunk: '{found}' is batch normalisation, whose statistics would be those of each process's own rows; use "
            "norm: layer, a SyncBatchNorm of your own, or one process"
        )
    wanted: type = DistributedDataParallel
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        from torch.distributed.fsdp import FSDPModule  # its import takes a second, so only where it is used

        wanted = FSDPModule
        accelerator.state.distributed_type = DistributedType.FSDP  # accelerate forgets it when an optimizer is prepared
        _fit_fsdp(accelerator, trunk)
    model, optimizer = accelerator.prepare(trunk, optimizer)
    if not isinstance(model, wanted):
        raise UserError(f"accelerate did not wrap the trunk in {wanted.__name__}, as its config file asks; check that file")
    return model, optimizer


def _fit_fsdp(accelerator: Accelerator, trunk: nn.Module) -> None:
    """What accelerate's FSDP2 would get wrong: which modules it gathers one by one, and the precision of inputs.

    Transformer blocks say themselves that they are (`_no_split_modules`). By size, accelerate would also wrap lists of layers,
    which FSDP2 refuses: here it is the classes of modules with so many parameters of their own. In mixed precision it would
    round the inputs, which may be token ids: autocast casts them where they are multiplied.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    by_size = plugin.auto_wrap_policy is size_based_auto_wrap_policy
    if by_size or (plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None):
        there = {type(module).__name__ for module in trunk.modules()}
        blocks = {name for module in trunk.modules() for name in getattr(module, "_no_split_modules", None) or ()} & there
        if by_size and not blocks:
            least = plugin.min_num_params
            large = [m for m in trunk.modules() if sum(p.numel() for p in m.parameters(recurse=False)) > least]
            blocks = {type(module).__name__ for module in large}
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(blocks)
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)
        trunk.forward = accelerator.autocast()(trunk.forward)


def sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, as FSDP2's are; asked without the second that their import takes."""
    return hasattr(tensor, "device_mesh")


@contextmanager
def unsynchronised(model: nn.Module) -> Iterator[None]:
    """Gradients inside the block are not averaged over ranks, as another backward will add to them."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "set_requires_gradient_sync"):  # FSDP2
        inner.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            inner.set_requires_gradient_sync(True)
    elif isinstance(inner, DistributedDataParallel):
        with inner.no_sync():
            yield
    else:
        yield
