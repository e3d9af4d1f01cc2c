"""The start of several processes, and what accelerate wraps the trunk in."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradScalerKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mtrain.config import Config
from mtrain.errors import UserError

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
            "accelerate launch was asked for several processes and started one (--cpu does that); use a config file with "
            "distributed_type: MULTI_CPU, as launch/cpu.yaml, or torchrun"
        )
    AcceleratorState._reset_state()  # a notebook may train another precision than before
    handlers = [
        GradScalerKwargs(enabled=False),  # the stepper has a loss scale of its own, for trunk and heads
        DistributedDataParallelKwargs(broadcast_buffers=False),
        InitProcessGroupKwargs(timeout=timedelta(minutes=config.train.timeout_minutes)),
    ]
    log_with = "wandb" if config.tracker.class_path.rpartition(".")[2].lower() == "wandb" else None
    cpu = world > 1 and not torch.cuda.is_available()  # else torchrun's processes would not know of each other
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=config.train.precision, log_with=log_with, kwargs_handlers=handlers)
        if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
            raise ValueError("fp16 needs an accelerator, bf16 also runs on a CPU")
    except (ValueError, RuntimeError) as error:
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


def check_trunk(trunk: nn.Module, accelerator: Accelerator) -> None:
    """Refuse what would compute something else on several ranks than on one.

    Raises:
        UserError: batch normalisation, whose statistics would be those of each rank's own rows.
    """
    if accelerator.num_processes == 1:
        return
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    found = next((name for name, module in trunk.named_modules() if isinstance(module, batch_norm)), None)
    if found is not None:
        raise UserError(
            f"model.trunk: '{found}' is batch normalisation, whose statistics would be those of each process's own rows; use "
            "norm: layer, a SyncBatchNorm of your own, or one process"
        )


def check_wrapper(model: nn.Module, accelerator: Accelerator) -> None:
    """Whether accelerate wrapped the trunk as it was asked to.

    Raises:
        UserError: it did not, so ranks would train apart.
    """
    kind = accelerator.distributed_type
    wanted = DistributedDataParallel if kind in _DDP else FSDPModule if kind == DistributedType.FSDP else None
    if wanted is not None and not isinstance(model, wanted):
        raise UserError(f"accelerate did not wrap the trunk in {wanted.__name__}, as {kind.value} asks; check its config file")
