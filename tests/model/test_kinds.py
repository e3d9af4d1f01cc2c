"""Every kind against formulas written out label by label in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from mtrain.errors import UserError
from mtrain.model.kinds import KINDS, Binary, Kind, Multiclass, Poisson, Quantile, Regression, SortedLabels

ALL = [
    Regression(),
    Regression(loss="mae"),
    Regression(loss="huber", delta=0.7),
    Binary(),
    Binary(pos_weight=3.0),
    Binary(pos_weight="balanced"),
    Multiclass(),
    Multiclass(label_smoothing=0.2),
    Poisson(),
    Quantile(levels=(0.2, 0.5, 0.8)),
]
IDS = [str(kind) for kind in ALL]


def naive_loss(kind, logits, y, pos_weight=1.0, deviance=False):
    """The loss of one label from its own logits, without padding."""
    if isinstance(kind, Regression):
        r = logits[0] - y
        if kind.loss == "mse":
            return r * r
        if kind.loss == "mae" or abs(r) > kind.delta:
            return abs(r) if kind.loss == "mae" else kind.delta * (abs(r) - kind.delta / 2)
        return r * r / 2
    if isinstance(kind, Binary):
        logit = logits[0] - (math.log(pos_weight) if deviance else 0)
        positive = 1 / (1 + math.exp(-logit))
        return -((1 if deviance else pos_weight) * y * math.log(positive) + (1 - y) * math.log(1 - positive))
    if isinstance(kind, Multiclass):
        total = sum(math.exp(v) for v in logits)
        smooth = 0 if deviance else kind.label_smoothing
        target = [smooth / len(logits) + (1 - smooth) * (k == y) for k in range(len(logits))]
        return -sum(t * math.log(math.exp(v) / total) for t, v in zip(target, logits, strict=True))
    if isinstance(kind, Poisson):
        mean = math.exp(logits[0])
        return 2 * ((y * math.log(y / mean) if y else 0) - (y - mean))
    return sum(max(q * (y - v), (q - 1) * (y - v)) for q, v in zip(kind.levels, logits, strict=True))


def labels_of(kind, num_tasks=4, rows=40, seed=0):
    """Sorted labels of a few tasks, with 2 to 5 classes."""
    rng = np.random.default_rng(seed)
    outputs = np.array([kind.num_outputs(k) for k in (3, 2, 5, 3)][:num_tasks])
    task = rng.integers(num_tasks, size=rows * num_tasks)
    if kind.family == "multiclass":
        y = rng.integers(outputs[task]).astype(float)
    elif kind.family == "binary":
        y = (rng.random(len(task)) < 0.2 + 0.15 * task).astype(float)
    elif isinstance(kind, Poisson):
        y = rng.poisson(1 + task).astype(float)
    else:
        y = rng.normal(task, 1 + task)
    return SortedLabels.of(task, y, outputs)


def params_of(kind, labels):
    params = {name: torch.from_numpy(value) for name, value in kind.params(labels).items()}
    return params | {"num_outputs": torch.from_numpy(labels.num_outputs_T)}


def own_logits(labels, width):
    return torch.randn(len(labels.y_P), width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ALL, ids=IDS)
@pytest.mark.parametrize("deviance", [False, True], ids=["loss", "deviance"])
def test_losses_and_deviances_equal_the_formula_of_each_label(kind, deviance):
    labels = labels_of(kind)
    logits = own_logits(labels, int(labels.num_outputs_T.max()) + 2 * kind.has_classes)  # two padded classes
    params = params_of(kind, labels)
    spread = {name: value[labels.task_P] for name, value in params.items()}
    found = (kind.deviances if deviance else kind.losses)(logits, torch.from_numpy(labels.y_P), spread)
    for i, t in enumerate(labels.task_P):
        own = logits[i, : labels.num_outputs_T[t]].tolist()
        pos_weight = float(params["pos_weight"][t]) if "pos_weight" in params else 1.0
        assert float(found[i]) == pytest.approx(naive_loss(kind, own, labels.y_P[i], pos_weight, deviance), rel=1e-9)


@pytest.mark.parametrize("kind", ALL, ids=IDS)
def test_a_grid_of_rows_and_tasks_gives_the_same_losses_and_gradients_as_single_labels(kind):
    labels = labels_of(kind)
    width = int(labels.num_outputs_T.max())
    torch.manual_seed(0)
    logits = torch.randn(6, 4, width, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(np.stack([labels.y_P[labels.task_P == t][:6] for t in range(4)], 1))
    params = params_of(kind, labels)
    grid = kind.losses(logits, y, params)
    (grad,) = torch.autograd.grad(grid.sum(), logits)
    one_by_one = logits.detach().flatten(0, 1).requires_grad_()
    flat = kind.losses(one_by_one, y.flatten(), {k: v.repeat(6) for k, v in params.items()})
    (own,) = torch.autograd.grad(flat.sum(), one_by_one)
    torch.testing.assert_close(grid.flatten(), flat)
    torch.testing.assert_close(grad.flatten(0, 1), own)
    assert not grad[:, torch.arange(width) >= params["num_outputs"][:, None]].any()


@pytest.mark.parametrize("kind", ALL, ids=IDS)
def test_no_constant_has_a_lower_mean_deviance_than_the_constant_predictor(kind):
    labels = labels_of(kind)
    params = params_of(kind, labels)
    constant = torch.from_numpy(kind.constant(labels))

    def deviance(t, logits):
        at = labels.task_P == t
        spread = {name: value[labels.task_P[at]] for name, value in params.items()}
        return float(kind.deviances(logits.expand(int(at.sum()), -1), torch.from_numpy(labels.y_P[at]), spread).mean())

    for t in range(4):
        best = deviance(t, constant[t])
        for k in range(int(labels.num_outputs_T[t])):

            def moved(value, t=t, k=k):
                logits = constant[t].clone()
                logits[k] = value
                return deviance(t, logits)

            found = minimize_scalar(moved, bounds=(-8, 8), method="bounded", options={"xatol": 1e-8})
            assert best <= found.fun + 1e-9


@pytest.mark.parametrize("kind", ALL, ids=IDS)
def test_a_task_without_labels_has_no_constant_and_leaves_the_others_as_they_are(kind):
    labels = labels_of(kind)
    keep = labels.task_P != 1
    fewer = SortedLabels(labels.task_P[keep], labels.y_P[keep], labels.num_outputs_T)
    here, there = kind.constant(fewer), kind.constant(labels)
    assert np.isnan(here[1]).all()
    np.testing.assert_array_equal(here[[0, 2, 3]], there[[0, 2, 3]])


@pytest.mark.parametrize("kind", ALL, ids=IDS)
def test_losses_are_finite_and_have_finite_gradients_for_large_logits(kind):
    labels = labels_of(kind)
    logits = (30 * own_logits(labels, int(labels.num_outputs_T.max())).float()).requires_grad_()
    if isinstance(kind, Poisson):
        logits = (own_logits(labels, 1).float() * 5).requires_grad_()
    spread = {name: value[labels.task_P] for name, value in params_of(kind, labels).items()}
    loss = kind.losses(logits, torch.from_numpy(labels.y_P).float(), spread)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_predictions_undo_the_positive_weight():
    """The weighted loss of rate p is least at odds w p / (1 - p): the prediction there is p again."""
    labels = labels_of(Binary())
    for kind in (Binary(), Binary(pos_weight=7.0), Binary(pos_weight="balanced")):
        params = params_of(kind, labels)
        predicted = kind.predict(torch.from_numpy(kind.constant(labels)), params)
        np.testing.assert_allclose(predicted[:, 0], labels.mean())


def test_the_balanced_weight_is_negatives_over_positives_and_1_for_one_class():
    labels = SortedLabels.of(np.array([0, 0, 0, 0, 1, 1]), np.array([1.0, 0, 0, 0, 1, 1]), np.ones(3, dtype=int))
    assert Binary(pos_weight="balanced").params(labels)["pos_weight"].tolist() == [3, 1, 1]


def test_class_probabilities_sum_to_one_and_padded_classes_have_none():
    kind, params = Multiclass(), {"num_outputs": torch.tensor([2, 4])}
    prob = kind.predict(torch.randn(5, 2, 4), params)
    torch.testing.assert_close(prob.sum(-1), torch.ones(5, 2))
    assert not prob[:, 0, 2:].any()


def test_poisson_predicts_the_mean_and_quantile_points_to_the_level_nearest_the_median():
    assert float(Poisson().predict(torch.tensor([[math.log(3.0)]]), {})) == pytest.approx(3.0)
    assert float(Quantile(levels=(0.1, 0.6, 0.9)).point(torch.tensor([1.0, 2.0, 3.0]))) == 2.0


def test_typical_losses_are_those_of_an_uninformed_guess():
    outputs, deviance = np.array([2, 5]), np.array([0.3, 0.4])
    assert Binary().typical_loss(outputs, deviance).tolist() == [math.log(2)] * 2
    np.testing.assert_allclose(Multiclass().typical_loss(outputs, deviance), np.log([2, 5]))
    assert Regression().typical_loss(outputs, deviance).tolist() == [1, 1]
    assert Poisson().typical_loss(outputs, deviance).tolist() == [0.3, 0.4]


def test_statistics_of_sorted_labels_equal_numpy_for_each_task():
    labels = labels_of(Regression())
    for t in range(4):
        own = labels.y_P[labels.task_P == t]
        assert labels.mean()[t] == pytest.approx(own.mean())
        for q in (0.01, 0.3, 0.5, 0.99):
            assert labels.quantile(q)[t] == np.quantile(own, q, method="inverted_cdf")


def test_kinds_share_a_head_group_only_with_the_same_losses():
    class Tilted(Binary):
        pass

    assert Binary(pos_weight=2.0).group_key == Binary(pos_weight="balanced").group_key
    keys = [kind.group_key for kind in (Binary(), Binary(pos_weight=2.0), Tilted(), Regression(), Regression(loss="mae"))]
    assert len(set(keys)) == 5


def test_labels_outside_a_kind_are_named():
    for kind, good, bad in ((Binary(), 1.0, 2.0), (Poisson(), 3.0, -1.0), (Poisson(), 0.0, 0.5), (Multiclass(), 2.0, -1.0)):
        assert kind.problem(good) is None
        assert "expected" in kind.problem(bad)
    assert Regression().problem(-5.5) is None


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Regression, {"delta": 0}),
        (Binary, {"pos_weight": -1.0}),
        (Multiclass, {"label_smoothing": 1.0}),
        (Quantile, {"levels": (0.5, 0.5)}),
        (Quantile, {"levels": (0.0, 0.5)}),
        (Quantile, {"levels": ()}),
    ],
)
def test_options_that_cannot_be_are_refused(cls, options):
    with pytest.raises(UserError, match="expected"):
        cls(**options)


def test_short_names_are_the_kinds_own_names():
    assert {name: cls().name for name, cls in KINDS.items()} == {name: name for name in KINDS}
    assert all(issubclass(cls, Kind) for cls in KINDS.values())
