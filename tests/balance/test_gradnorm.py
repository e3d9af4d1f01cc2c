import pytest
import torch
from shown import begun, shown

from mtrain.balance.gradnorm import GradNorm

T = 4


class Toy:
    """A hidden layer shared by T regression tasks, the losses of which are multiplied by `scale_T`."""

    def __init__(self, scale_T, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.num_tasks, self.scale_T = len(scale_T), scale_T.double()
        self.shared = (0.4 * self._draw(6, 5)).requires_grad_()
        self.heads = (0.4 * self._draw(5, self.num_tasks)).requires_grad_()
        self.teacher = self._draw(6, self.num_tasks)

    def _draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def losses(self):
        x = self._draw(32, 6)
        error = torch.tanh(x @ self.shared) @ self.heads - torch.tanh(x @ self.teacher)
        return self.scale_T * error.square().mean(0)

    def norms(self, loss_T, weight_T, **kwargs):
        """One backward for each task at the shared layer."""
        terms_T = weight_T * loss_T
        grads = [torch.autograd.grad(term, self.shared, retain_graph=True, **kwargs)[0] for term in terms_T]
        return torch.stack([grad.norm() for grad in grads])

    def step(self, loss_T, weight_T, lr=0.05):
        total = (weight_T.double() * loss_T).mean()
        grads = torch.autograd.grad(total, [self.shared, self.heads])
        with torch.no_grad():
            for p, grad in zip((self.shared, self.heads), grads, strict=True):
                p -= lr * grad


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_each_learned_step_equals_a_literal_one_with_double_backward(optimizer, alpha):
    toy = Toy(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    lr = {"adam": 0.025, "sgd": 0.05}[optimizer]
    balancer = begun(GradNorm(alpha=alpha, lr=lr, optimizer=optimizer), T)
    w_T = torch.ones(T, dtype=torch.float64, requires_grad=True)
    torchs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([w_T], lr=lr)
    first_T = None
    for _ in range(40):
        loss_T = toy.losses()
        norm_T = toy.norms(loss_T, torch.ones(T))
        weight_T = balancer.weights(shown(loss_T.detach(), norm2=norm_T.square()))
        torch.testing.assert_close(weight_T.double(), w_T.detach(), rtol=1e-4, atol=1e-5)

        first_T = loss_T.detach() if first_T is None else first_T
        weighted_T = toy.norms(loss_T, w_T, create_graph=True)
        ratio_T = loss_T.detach() / first_T
        target_T = (weighted_T.mean() * (ratio_T / ratio_T.mean()) ** alpha).detach()
        torchs.zero_grad()
        (weighted_T - target_T).abs().sum().backward(inputs=[w_T])
        torchs.step()
        with torch.no_grad():
            w_T *= T / w_T.sum()
        toy.step(loss_T, w_T.detach())
    assert (w_T - 1).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"lr": 0.01}, {"mode": "closed"}])
def test_on_loss_scales_of_1_10_100_the_weights_equalise_gradient_norms(options):
    toy = Toy(torch.tensor([1.0, 10.0, 100.0]))
    balancer = begun(GradNorm(alpha=0.0, **options), 3)
    sizes, plain = [], []
    for _ in range(500):
        loss_T = toy.losses()
        norm_T = toy.norms(loss_T, torch.ones(3))
        weight_T = balancer.weights(shown(loss_T.detach(), norm2=norm_T.square()))
        assert weight_T.sum().item() == pytest.approx(3, rel=1e-5)
        sizes.append(weight_T * norm_T)
        plain.append(norm_T)
        toy.step(loss_T, weight_T, lr=0.01)
    size_T, plain_T = torch.stack(sizes[-100:]).mean(0), torch.stack(plain[-100:]).mean(0)
    assert plain_T.max() / plain_T.min() > 20
    assert size_T.max() / size_T.min() < 1.2


def test_the_closed_form_is_the_fixed_point():
    loss_T, norm_T = torch.tensor([2.0, 1.0, 4.0]), torch.tensor([1.0, 10.0, 100.0])
    balancer = begun(GradNorm(mode="closed", alpha=0.7, beta=0.0, initial_loss=2.0), 3)
    weight_T = balancer.weights(shown(loss_T, norm2=norm_T.square()))
    size_T, ratio_T = weight_T * norm_T, loss_T / loss_T.mean()
    torch.testing.assert_close(size_T / size_T[0], (ratio_T / ratio_T[0]) ** 0.7)
    assert weight_T.sum().item() == pytest.approx(3)


def test_the_closed_form_averages_squares_of_norms_over_a_tasks_own_appearances():
    balancer = begun(GradNorm(mode="closed", alpha=0.0, beta=0.5), 3)
    balancer.weights(shown([1.0, 1.0], [0, 2], norm2=[1.0, 4.0]))
    weight_A = balancer.weights(shown([1.0, 1.0, 1.0], norm2=[7.0, 16.0, 4.0]))
    torch.testing.assert_close(weight_A, 3 * torch.tensor([0.5, 0.25, 0.5]) / 1.25)


@pytest.mark.parametrize("mode", ["learned", "closed"])
def test_a_task_without_gradient_neither_moves_nor_moves_the_others(mode):
    balancer, without = (begun(GradNorm(mode=mode, alpha=0.0), 3) for _ in range(2))
    for _ in range(20):
        weight_A = balancer.weights(shown([1.0, 1.0, 1.0], norm2=[1.0, 0.0, 4.0]))
        others_A = without.weights(shown([1.0, 1.0], [0, 2], norm2=[1.0, 4.0]))
    assert weight_A[0] > weight_A[2]
    if mode == "closed":
        assert weight_A[1] == 1
        torch.testing.assert_close(weight_A[[0, 2]], others_A)
    nothing_A = balancer.weights(shown([0.0, 0.0], norm2=[0.0, -1.0]))
    assert nothing_A.isfinite().all()


def test_learned_weights_of_all_tasks_keep_their_sum_and_absent_ones_their_value():
    balancer = begun(GradNorm(lr=0.1), 6)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        task = torch.randperm(6, generator=generator)[:3].sort().values if step else torch.arange(6)
        before = {name: value.clone() for name, value in balancer.state_dict().items()}
        loss, norm2 = torch.rand(2, len(task), generator=generator)
        weight_A = balancer.weights(shown(loss, task, norm2=norm2))
        assert weight_A.sum().item() == pytest.approx(len(task), rel=1e-5)
        absent_T = torch.ones(6, dtype=torch.bool).index_fill(0, task, False)
        assert all(torch.equal(value[absent_T], before[name][absent_T]) for name, value in balancer.state_dict().items())
    assert balancer.value_T.sum().item() == pytest.approx(6, rel=1e-5)
    assert balancer.value_T.min() > 0


def test_a_first_loss_is_averaged_over_the_first_appearances():
    balancer = begun(GradNorm(initial_steps=3), 2)
    for loss in (1.0, 2.0, 6.0, 100.0):
        balancer.weights(shown([loss], [1], norm2=[1.0]))
    assert balancer.first_T.tolist() == [0.0, 3.0]
