"""The workload of a run, from which its plan is made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrain.config import Config
from mtrain.data.batch import Grid, Labels
from mtrain.model.head_forms import plan_groups
from mtrain.model.head_options import head_forms, head_gate
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

    forms, outputs_T = head_forms(tasks.names, config), tasks.num_outputs_T.tolist()
    keys = [task.kind.group_key for task in tasks]
    groups = plan_groups(tasks.names, outputs_T, forms, keys, shared.features, head_gate(config))
    params_T = np.zeros(len(tasks), dtype=np.int64)
    for group in groups:
        for t in group.ids:
            params_T[t] = shared.members * group.source.num_params(forms[t].widths(outputs_T[t]), head.scale_shift)
    means = [shared.members * group.source.num_params(group.widths, head.scale_shift) for group in groups]
    trained = 0 if "trunk" in config.freeze else sum(p.numel() for p in shared.parameters() if p.requires_grad)
    return Workload(
        tasks.names,
        rows_T,
        params_T,
        by_task=sampling_T is not None,
        batch=batch,
        width=shared.members * shared.out_features,
        trunk_params=sum(p.numel() for p in shared.parameters()),
        trunk_trained=trained,
        heads_trained="heads" not in config.freeze,
        shared_params=sum(means) if head.toward_shared or head.toward_shared_bias else 0,
        parents_T=[form.parents for form in forms] if any(form.parents for form in forms) else None,
    )
