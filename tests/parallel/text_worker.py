"""One process of several: trains a text encoder, as `worker.py` does its cases. `python text_worker.py CONFIG RUN WRAPPER`.

WRAPPER is `ddp`, or `fsdp`: FSDP2 with accelerate's policy by size.
"""

import sys
from pathlib import Path

import datasets
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from rich.console import Console
from torch.distributed.fsdp import FSDPModule
from worker import FSDPOnCPU

from mtrain import runs
from mtrain.config import load_config
from mtrain.parallel import wrap
from mtrain.train import loop
from mtrain.train.stop import leave


class BySize(FSDPOnCPU):
    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=3000
        )
        if options["mixed_precision"] == "bf16":
            self.state.fsdp_plugin.set_mixed_precision("bf16")


def main(config, run, wrapper, *overrides):
    if wrapper == "fsdp":
        wrap.Accelerator = BySize
    prepare = loop.prepare

    def noted(accelerator, trunk, optimizer):
        model, optimizer = prepare(accelerator, trunk, optimizer)
        if accelerator.is_main_process:
            wrapped = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, FSDPModule)}
            Path(f"{run}.wrapped").write_text(repr(wrapped))
        return model, optimizer

    loop.prepare = noted
    config = Path(config)
    runs.train(load_config(config, overrides), config.parent, Path(run), Console(quiet=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    main(*sys.argv[1:])
    leave(0, together=True)
