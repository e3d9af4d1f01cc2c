"""What a balancer is shown, made up."""

import torch

from mtrain.balance.base import Facts, Seen


def facts(num_tasks, regression=True, share=None):
    share_T = torch.full((num_tasks,), 1 / num_tasks) if share is None else torch.as_tensor(share, dtype=torch.float32)
    names = [f"task{t}" for t in range(num_tasks)]
    regression_T = torch.as_tensor(regression).expand(num_tasks).clone()
    return Facts(names, regression_T, share_T / share_T.sum(), torch.device("cpu"))


def shown(loss, task=None, step=0, norm2=None, gram=None):
    loss_A = torch.as_tensor(loss, dtype=torch.float32)
    task_A = torch.arange(len(loss_A)) if task is None else torch.as_tensor(task)
    norm2_A = None if norm2 is None else torch.as_tensor(norm2, dtype=torch.float32)
    return Seen(step, task_A, loss_A, torch.ones_like(loss_A), norm2_A, gram)


def begun(balancer, num_tasks, **given):
    balancer.begin(facts(num_tasks, **given))
    return balancer
