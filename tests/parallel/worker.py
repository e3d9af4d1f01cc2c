"""One process of several: trains the cases it is told, one after another. `python worker.py FOLDER CASE ...` under torchrun.

A case ending in `-fsdp` shards the trunk by FSDP2: accelerate drops its plugin on a CPU, where FSDP2 itself works.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rich.console import Console

from mtrain import runs
from mtrain.balance import BALANCERS
from mtrain.config import check_config
from mtrain.errors import UserError
from mtrain.parallel import wrap
from mtrain.train import loop
from mtrain.train.stop import leave

GRID = {
    "data": {"path": "grid.csv", "layout": "grid"},
    "inputs": {"x*": "Numeric"},
    "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [16, 12], "dropout": 0.2}}, "head": {"hidden": [5]}},
}
ROUTED = {
    "data": {"path": "even.csv", "layout": "routed", "task": "task", "label": "y"},
    "inputs": {"x*": "Numeric"},
    "split": {"by": "within_task"},
    "sampler": "Proportional",
    "model": {
        "trunk": {"class_path": "MLP", "init_args": {"widths": [16, 12], "dropout": 0.2}},
        "head": {"hidden": [4], "dropout": 0.3},
    },
}
TRAIN = {"steps": 50, "global_batch": 46, "lr": 0.01, "clip": 0.5, "head_clip": 0.2, "log_every": 1, "eval_every": 1.0}
SKEWED = {"data": {**ROUTED["data"], "path": "skewed.csv"}}
DEEP = {"class_path": "MLP", "init_args": {"widths": [64, 12], "dropout": 0.2}}
SEPARATE = {f"x{i}": "Numeric" for i in range(6)}
HALVES = {"low": ["x0", "x1", "x2"], "high": ["x3", "x5", "x4"]}
ENCODED = {"init_args": {"encoder": {"class_path": "MLP", "init_args": {"widths": [16, 8], "dropout": 0.2}}}}
STEMS = {"class_path": "TaskStems", "init_args": {"columns": {"task 1*": ["low"]}, "widths": [9], "trunk": DEEP}}
CASES = {
    "grid": GRID,
    "grid-accumulated": GRID | {"train": {"micro_batch": 13}},
    "grid-refit": GRID | {"split": {"refit": True}},
    "pairs": GRID | {"data": {"path": "pairs.csv", "layout": "pairs", "key": "key", "task": "task", "label": "y"}},
    "members": GRID | {"model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8], "members": 3}}}},
    "owners": ROUTED,
    "owners-accumulated": ROUTED | {"train": {"micro_batch": 13}},
    "owners-shared": ROUTED | {"model": {"trunk": "Linear", "head": {"toward_shared": 20.0}}},
    "exchange": ROUTED | SKEWED | {"model": {"trunk": DEEP, "head": {"hidden": [60]}}},
    "exchange-accumulated": ROUTED
    | SKEWED
    | {"model": {"trunk": DEEP, "head": {"hidden": [60]}}, "train": {"micro_batch": 13}},
    "hot": ROUTED | SKEWED | {"model": {"trunk": DEEP}},
    "hot-shared": ROUTED | SKEWED | {"model": {"trunk": DEEP, "head": {"toward_shared": 20.0}}, "train": {"micro_batch": 20}},
    "few": ROUTED | {"data": {**ROUTED["data"], "path": "few.csv"}},
    "grid-fusion": GRID | {"inputs": SEPARATE, "model": {"inputs": HALVES, "trunk": {"class_path": "ModelFusion", **ENCODED}}},
    "grid-experts": GRID | {"model": {"trunk": "CGC", "head": {"gate": {"experts": "experts", "by": "gate"}}}},
    "owners-stems": ROUTED | {"inputs": SEPARATE, "model": {"inputs": HALVES, "trunk": STEMS}},
    "exchange-stems": ROUTED
    | SKEWED
    | {  # of 5,000 hidden units one comes so near the kink of a relu, or to a gradient of 0, that rounding decides
        "inputs": SEPARATE,
        "model": {"inputs": HALVES, "trunk": STEMS, "head": {"hidden": [300], "activation": "gelu"}},
        "train": {"lr": 0.003},
    },
}
NECK = {"trunk": {"class_path": "MLP", "init_args": {"widths": [64], "dropout": 0.2}}, "neck": 12}
BALANCED = {
    "grid": GRID | {"model": NECK | {"head": {"hidden": [5]}}},
    "owners": ROUTED | {"model": NECK | {"head": {"hidden": [4]}}},
    "hot": ROUTED | SKEWED | {"model": NECK, "train": {"micro_batch": 20}},
    "exchange": ROUTED | SKEWED | {"model": NECK | {"head": {"hidden": [60]}}},
}
CASES |= {f"{case}-{name}": BALANCED[case] | {"objective": {"balancer": name}} for case in BALANCED for name in BALANCERS}
HEAD = {"hidden": ["2x"], "scale_shift": True}
CASES["grid-forms"] = GRID | {
    "model": {"trunk": GRID["model"]["trunk"], "head": HEAD},
    "tasks": {"by_name": {"t[45]": {"reads": ["features", "task:t2", "task:t3"]}, "t7": {"reads": ["features", "task:t5"]}}},
    "train": {"micro_batch": 13},
}
CASES["pairs-forms"] = CASES["pairs"] | {"tasks": {"by_name": {"t[46]": {"reads": ["features", "task:t3"]}}}}
for case, trunk in {"owners": ROUTED["model"]["trunk"], "hot": DEEP, "exchange": DEEP}.items():
    by_name = {"task [12]": {"reads": ["features", "task:task 0"]}, "task 3": {"reads": ["features", "task:task 1"]}}
    head = HEAD | ({"hidden": [60]} if case == "exchange" else {})
    CASES[f"{case}-forms"] = CASES[case] | {"model": {"trunk": trunk, "head": head}, "tasks": {"by_name": by_name}}
GRAM = {"balancer": "upgrad"}
WEIGHTED = CASES["pairs"] | {"data": {**CASES["pairs"]["data"], "weight": "weight"}}  # such labels are no matrix
LEVELS = {  # of gradients, and unbiased and projected ones
    "grid-features": BALANCED["grid"] | {"objective": {"balancer": "gradnorm", "balancing": {"level": "features"}}},
    "grid-unbiased": BALANCED["grid"]
    | {"objective": GRAM | {"balancing": {"unbiased": True, "smoothing": 0.9, "projections": 64, "affinity": True}}},
    "pairs-features": WEIGHTED | {"objective": GRAM | {"balancing": {"level": "features"}}},
    "pairs-projected": WEIGHTED | {"model": NECK, "objective": GRAM | {"balancing": {"projections": 64}}},
    "hot-features": BALANCED["hot"] | {"objective": {"balancer": "gradnorm", "balancing": {"level": "features"}}},
    "hot-unbiased": BALANCED["hot"]
    | {"objective": GRAM | {"balancing": {"unbiased": True, "smoothing": 0.9, "projections": 64}}},
    "hot-trunk": BALANCED["hot"] | {"objective": {"balancer": "gradnorm", "balancing": {"level": "trunk", "every": 2}}},
    "exchange-trunk": BALANCED["exchange"] | {"objective": GRAM | {"balancing": {"level": "trunk"}}},
    "owners-trunk": BALANCED["owners"]
    | {"objective": {"balancer": "equal", "balancing": {"level": "trunk", "affinity": True, "every": 5}}},
}
CASES |= LEVELS
CASES |= {
    f"{name}-fsdp": CASES[name]
    for name in ("grid", "owners", "owners-accumulated", "exchange-accumulated", "grid-refit", "grid-fusion", "owners-stems")
}


class FSDPOnCPU(Accelerator):
    def __init__(self, **options):
        super().__init__(**options)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)


def config_of(case, data):
    tree = CASES[case]
    tree = tree | {"data": tree["data"] | {"root": str(data)}, "train": TRAIN | tree.get("train", {}), "tracker": "none"}
    return check_config(tree, case)


def main(folder, *cases):
    folder = Path(folder)
    plain = wrap.Accelerator
    for case in cases:
        wrap.Accelerator = FSDPOnCPU if case.endswith("-fsdp") else plain
        name, _, steps = case.partition("@")
        config = config_of(name, folder)
        path = folder / case
        if steps:
            config = config.model_copy(update={"train": config.train.model_copy(update={"steps": int(steps)})})
        trainers = []
        build = loop.Trainer._build

        def kept(self, anew, build=build, to=trainers):
            to.append(self)
            build(self, anew)

        with mock.patch.object(loop.Trainer, "_build", kept):
            runs.train(config, folder, path, Console(quiet=True))
        trainer = trainers[-1]
        sent = trainer.world.gather_objects(dict(trainer.world.sent))
        if trainer.world.is_first:
            plan = {"mode": trainer.plan.mode, "hot": len(trainer.plan.hot), "why": trainer.plan.why, "sent": sent}
            (path / "plan.json").write_text(json.dumps(plan))


if __name__ == "__main__":
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(f"mtrain: {error}", file=sys.stderr)
        leave(2)
    leave(0, together=True)
