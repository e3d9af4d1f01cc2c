"""Configs against the models and loops that one would write by hand: a list of heads, and heads that read another head."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from mtrain.components import Spec, build
from mtrain.config import load_config
from mtrain.data.prepare import prepare, read_source
from mtrain.model.heads import HeadBank
from mtrain.parallel.world import World
from mtrain.train.loop import Trainer, build_loader
from mtrain.train.run_dir import RunDir
from mtrain.train.step import Totals, count
from mtrain.train.tracker import TRACKERS

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 20


class HandWritten(nn.Module):
    """A shared trunk and a list of heads, each with its own number of outputs n."""

    def __init__(self, in_features, outputs):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(in_features, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(64, 2 * n), nn.ReLU(), nn.Linear(2 * n, n)) for n in outputs)

    def forward(self, x):
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def losses_by_hand(model, x, y, tasks):
    """Each task's mean loss, by a loop."""
    found = []
    for t, (task, out) in enumerate(zip(tasks, model(x), strict=True)):
        classes = task.name.startswith("class")
        found.append(F.cross_entropy(out, y[:, t].long()) if classes else F.mse_loss(out[:, 0], y[:, t]))
    return torch.stack(found)


def weights_by_hand(tasks):
    return torch.tensor([0.8 if task.name.startswith("class") else 0.2 for task in tasks]) / len(tasks)


def trainer_of(name, words, folder):
    """What `mtrain train` would build of a config, and the batches of its first steps."""
    config = load_config(CONFIGS / f"{name}.yaml", [*words, "--train.steps", str(STEPS)])
    prepared = prepare(read_source(config), 0)
    tracker = build(Spec(class_path="none"), TRACKERS, "tracker")
    trainer = Trainer(prepared, config, RunDir(folder / "run"), Accelerator(cpu=True), World(), tracker, Console(quiet=True))
    loader = build_loader(prepared, config, prepared.parts["train"], None, trainer.shard)
    return trainer, [loader.batch(step) for step in range(STEPS)]


@pytest.fixture(params=[2, 100, pytest.param(1000, marks=pytest.mark.slow)])
def both(request, tmp_path):
    """The trainer of the config, the model by hand with the same weights, and the batches of the first steps."""
    words = ["--data.path", f"python:mtrain.data.many_heads.many_heads(heads={request.param})", "--train.decay", "constant"]
    trainer, batches = trainer_of("many_heads", words, tmp_path)
    torch.manual_seed(1)
    model = HandWritten(trainer.prepared.inputs.width, trainer.tasks.num_outputs_T.tolist())
    heads = nn.ModuleDict(dict(zip(trainer.tasks.names, model.heads, strict=True)))
    assert trainer.bank.copy_heads(HeadBank.from_modules(heads)) == trainer.tasks.names
    with torch.no_grad():
        for mine, theirs in zip(trainer.shared.trunk.linears, (model.trunk[0], model.trunk[2]), strict=True):
            mine.weight.copy_(theirs.weight)
            mine.bias.copy_(theirs.bias)
    return trainer, model, batches


def step(trainer, batch, number):
    trainer.stepper(batch, number, Totals(len(trainer.tasks), torch.device("cpu")), *count(batch))


@torch.no_grad()
def largest_difference(trainer, model):
    """Between the parameters of trunk and heads."""
    bank = trainer.bank.to_modules()
    ours = [p for linear in trainer.shared.trunk.linears for p in linear.parameters()]
    theirs = [p for layer in (model.trunk[0], model.trunk[2]) for p in layer.parameters()]
    ours += [p for name in trainer.tasks.names for p in bank[name].parameters()]
    theirs += [p for head in model.heads for p in head.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_losses_and_gradients_are_those_of_the_loop(both, monkeypatch):
    trainer, model, batches = both
    (micro,) = batches[0]
    loss_T = losses_by_hand(model, micro.x_BF, micro.labels.y_BT, trainer.tasks)
    torch.testing.assert_close(trainer.stepper._losses(batches[0], 0).mean_loss_T.float(), loss_T.detach(), rtol=0, atol=1e-6)
    (weights_by_hand(trainer.tasks) * loss_T).sum().backward()

    updates = []  # the optimizers put each parameter's gradient in its place
    monkeypatch.setattr(trainer.head_optimizer, "step", updates.extend)
    monkeypatch.setattr(trainer.trunk_optimizer, "step", lambda: [p.data.copy_(p.grad) for p in trainer.shared.parameters()])
    step(trainer, batches[0], 0)
    for update in updates:
        assert update.active_A is None
        for stack, grad in zip(trainer.bank.groups[update.group].parameters(), update.grads, strict=True):
            stack.data.copy_(grad)
    for p in model.parameters():
        p.data.copy_(p.grad)
    assert 0 < largest_difference(trainer, model) < 1e-6


def test_twenty_steps_end_at_the_weights_of_the_loop(both):
    trainer, model, batches = both
    train = trainer.config.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)
    assert largest_difference(trainer, model) == 0
    weight_T = weights_by_hand(trainer.tasks)
    first = [p.detach().clone() for p in model.parameters()]
    for number, batch in enumerate(batches):
        step(trainer, batch, number)
        (micro,) = batch
        optimizer.zero_grad()
        (weight_T * losses_by_hand(model, micro.x_BF, micro.labels.y_BT, trainer.tasks)).sum().backward()
        optimizer.step()
    assert largest_difference(trainer, model) < 1e-4
    assert max(float((a - b.detach()).abs().max()) for a, b in zip(first, model.parameters(), strict=True)) > 1e-2


def test_dependent_heads_read_the_features_and_the_logits_of_the_other_head(tmp_path):
    """Losses, and gradients of trunk and both kinds of heads, of a step of `configs/dependent.yaml` by plain torch."""
    trainer, batches = trainer_of("dependent", ["--model.trunk.init_args.dropout", "0"], tmp_path)
    (micro,), names = batches[0], trainer.tasks.names
    weights = {name: [p.clone().requires_grad_() for p in (*w, *b)] for name, (w, b, _) in heads_of(trainer.bank).items()}
    z_BD = trainer.shared(micro.x_BF)
    digit_BO = F.linear(z_BD, *weights["digit"])
    y_BT = micro.labels.y_BT
    losses = []
    for name, y_B in zip(names, y_BT.T, strict=True):
        if name == "digit":
            losses.append(F.cross_entropy(digit_BO, y_B.long()) / math.log(10))
        else:
            losses.append(F.mse_loss(F.linear(torch.cat([z_BD, digit_BO], 1), *weights[name])[:, 0], y_B))
    mean = torch.stack(losses).mean()
    trunk = torch.autograd.grad(mean, list(trainer.shared.parameters()), retain_graph=True)
    own = torch.autograd.grad(mean, [p for of_head in weights.values() for p in of_head])

    trainer.trunk_optimizer.step = lambda: [p.data.copy_(p.grad) for p in trainer.shared.parameters()]
    updates = []
    trainer.head_optimizer.step = updates.extend
    totals = Totals(len(names), torch.device("cpu"))
    trainer.stepper(batches[0], 0, totals, *count(batches[0]))
    assert float(totals.loss) == pytest.approx(float(mean), rel=1e-5)
    for p, grad in zip(trainer.shared.parameters(), trunk, strict=True):
        torch.testing.assert_close(p.detach(), grad, rtol=1e-4, atol=1e-7)
    for update in updates:
        for stack, grad in zip(trainer.bank.groups[update.group].parameters(), update.grads, strict=True):
            stack.data.copy_(grad)
    found = [p for w, b, _ in heads_of(trainer.bank).values() for p in (*w, *b)]
    for p, grad in zip(found, own, strict=True):
        torch.testing.assert_close(p.detach(), grad, rtol=1e-4, atol=1e-7)


def heads_of(bank):
    """Weights and biases of each head by the name of its task."""
    return dict(zip(bank.names, bank._heads(), strict=True))
