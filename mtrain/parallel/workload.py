"""The workload of a run, from which its plan is made."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mtrain.config import Config
from mtrain.data.batch import Grid, Labels
from mtrain.model.heads import group_by_size
from mtrain.model.trunks import SharedModel
from mtrain.parallel.plan import Workload
from mtrain.tasks import TaskTable


def workload(
    tasks: TaskTable, labels: Labels, config: Config, shared: SharedModel, sampling_T: NDArray[np.float64] | None
) -> Workload:
    """The workload of a run; no heads are built for it.

    Args:
        labels: of the training part.
        shared: the trunk.
        sampling_T: probability of each task in a batch; None where rows are not drawn by task.
    """
    batch, head = config.train.global_batch, config.model.head
    if sampling_T is not None:
        rows_T = sampling_T * batch
    else:
        batch = min(batch, labels.num_rows)
        every = np.full(len(tasks), float(batch))
        rows_T = every if isinstance(labels, Grid) else labels.count_T().numpy() * (batch / labels.num_rows)

    def head_params(outputs: int) -> int:
        return shared.members * sum((a + 1) * b for a, b in pairwise((shared.out_features, *head.hidden, outputs)))

    outputs_of: dict[Hashable, list[int]] = {}
    for task in tasks:
        outputs_of.setdefault(task.kind.group_key, []).append(task.num_outputs)
    groups = [max(sizes[i] for i in group) for sizes in outputs_of.values() for group in group_by_size(sizes)]
    trained = 0 if "trunk" in config.freeze else sum(p.numel() for p in shared.parameters() if p.requires_grad)
    return Workload(
        tasks.names,
        rows_T,
        np.array([head_params(task.num_outputs) for task in tasks]),
        by_task=sampling_T is not None,
        batch=batch,
        width=shared.members * shared.out_features,
        trunk_params=sum(p.numel() for p in shared.parameters()),
        trunk_trained=trained,
        heads_trained="heads" not in config.freeze,
        shared_params=sum(map(head_params, groups)) if head.toward_shared or head.toward_shared_bias else 0,
    )
