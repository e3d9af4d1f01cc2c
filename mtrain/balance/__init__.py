"""Loss balancing: from the tasks' losses to their weights, one method a file.

A balancer has `weights(loss_T, active_T)`: mean losses (NaN where the task is absent) and which tasks are active, both
`[T]`; it returns weights `[T]`, of which those of active tasks are used. Users' own are named by their import path.
"""

from mtrain.balance.equal import Equal

BALANCERS: dict[str, type] = {"equal": Equal}
