"""A treatment with known effects on real covariates: semi-synthetic, as benchmarks of causal inference are.

The covariates are the 30 measurements of scikit-learn's 569 breast cancer biopsies (Wolberg et al. 1995), standardised.
The outcomes follow response surface B of Hill (2011, "Bayesian nonparametric modeling for causal inference"): of one index
u of the covariates, `mu0 = exp(0.6 (u + 0.5))` without treatment and `mu1 = u + 1` with it, one of them observed with noise
of standard deviation 0.5. The index is a sum of six tanh features of the covariates, of which three also raise the chance of
treatment: about a fifth of the rows is treated, and the groups differ.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

HIDDEN = 6


def treatment(seed: int = 0) -> pa.Table:
    """One row for each biopsy: covariates `x0` ... `x29`, treatment `t` (0 or 1), observed outcome `y`, the sample weight
    `w = t / 2u + (1 - t) / 2(1 - u)` with the treated share u (Shalit et al. 2017, arXiv:1606.03976, Eq. 3), `part` (63 %
    train, 27 % valid, 10 % test, as there), and the expected outcomes `mu0` and `mu1`, which no model may read.

    Args:
        seed: of coefficients, assignment, noise and parts; covariates are always the same.
    """
    from sklearn.datasets import load_breast_cancer

    rng = np.random.default_rng([seed, 30])
    x_ND = load_breast_cancer().data
    x_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0)
    s_NH = x_ND @ rng.normal(size=(x_ND.shape[1], HIDDEN))
    h_NH = np.tanh(s_NH / s_NH.std(0))
    index_N = 2 * h_NH @ rng.normal(size=HIDDEN) / np.sqrt(HIDDEN)
    mu0_N, mu1_N = np.exp(0.6 * (index_N + 0.5)), index_N + 1
    t_N = rng.random(len(x_ND)) < 1 / (1 + np.exp(1.4 - 1.5 * h_NH[:, :3].mean(1)))
    y_N = np.where(t_N, mu1_N, mu0_N) + 0.5 * rng.normal(size=len(x_ND))
    treated = t_N.mean()
    weight_N = np.where(t_N, 0.5 / treated, 0.5 / (1 - treated))
    part_N = np.array(["train", "valid", "test"])[np.digitize(rng.permutation(len(x_ND)) / len(x_ND), [0.63, 0.9])]
    columns = {f"x{i}": x_ND[:, i] for i in range(x_ND.shape[1])}
    return pa.table(columns | {"t": t_N.astype(np.int64), "y": y_N, "w": weight_N, "part": part_N, "mu0": mu0_N, "mu1": mu1_N})
