"""A treatment with known effects on real covariates: semi-synthetic, as benchmarks of causal inference are.

The covariates are pixels of scikit-learn's 1797 digits (Alpaydin and Kaynak 1998): those with ink in more than a tenth of the
scans, standardised. Four features `h_k = tanh(2 s_k)` of them, with random directions `s_k` of unit deviation, are all that
matters: the expected outcome is `mu0 = 2 h a` without treatment and `mu1 = 1 + 2 h b` with it, with independent a and b. So the
arms share their features and have surfaces of their own, which is what a shared trunk with a head for each arm assumes, and the
effect differs from row to row about as much as the outcome. One outcome is observed, with noise of deviation 0.3. The first
feature also raises the chance of treatment: a fifth of the rows is treated, and the groups differ.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

FEATURES = 4


def treatment(seed: int = 0) -> pa.Table:
    """One row for each scan: covariates `x0`, `x1`, ..., treatment `t` (0 or 1), observed outcome `y`, the sample weight
    `w = t / 2u + (1 - t) / 2(1 - u)` with the treated share u (Shalit et al. 2017, arXiv:1606.03976, Eq. 3), `part` (63 %
    train, 27 % valid, 10 % test, as there), and the expected outcomes `mu0` and `mu1`, which no model may read.

    Args:
        seed: of directions, coefficients, assignment, noise and parts; covariates are always the same.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([seed, 30])
    x_ND = load_digits().data
    x_ND = x_ND[:, (x_ND > 0).mean(0) > 0.1]
    x_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    s_NH = x_ND @ rng.normal(size=(x_ND.shape[1], FEATURES))
    h_NH = np.tanh(2 * s_NH / s_NH.std(0))
    a_H, b_H = rng.normal(size=(2, FEATURES)) / np.sqrt(FEATURES)
    mu0_N, mu1_N = 2 * h_NH @ a_H, 1 + 2 * h_NH @ b_H
    t_N = rng.random(len(x_ND)) < 1 / (1 + np.exp(1.6 - 1.5 * h_NH[:, 0]))
    y_N = np.where(t_N, mu1_N, mu0_N) + 0.3 * rng.normal(size=len(x_ND))
    treated = t_N.mean()
    weight_N = np.where(t_N, 0.5 / treated, 0.5 / (1 - treated))
    part_N = np.array(["train", "valid", "test"])[np.digitize(rng.permutation(len(x_ND)) / len(x_ND), [0.63, 0.9])]
    columns = {f"x{i}": x_ND[:, i] for i in range(x_ND.shape[1])}
    return pa.table(columns | {"t": t_N.astype(np.int64), "y": y_N, "w": weight_N, "part": part_N, "mu0": mu0_N, "mu1": mu1_N})
