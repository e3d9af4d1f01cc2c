"""Two heads by treatment against what else one would do: is the error of the individual effect smaller?

`configs/treatment.yaml` (a trunk, and a head for each treatment) against one model that has the treatment as an input, and
against two separate models, one for each treatment. All have the same layers, length and weights of rows, and for each the
learning rate is chosen among the same ones by the validation part (observed outcomes only) of other realisations than those
that are scored. The error is that of Hill (2011, "Bayesian nonparametric modeling for causal inference"), PEHE: the root of the
mean squared difference between the predicted and the true effect.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mtrain import runs
from mtrain.config import YamlLoader, check_config
from mtrain.data.treatment import treatment
from mtrain.errors import UserError
from mtrain.ship.predict import predict

OURS = "two heads"
METHODS = {OURS: ["0 1"], "treatment as an input": ["y"], "two models": ["0", "1"]}
RATES = (3e-3, 1e-2, 3e-2)
TUNED_ON = (100, 101)
EVALUATIONS = 10  # of a run


def run(
    json_path: Path | None = None, config: Path = Path("configs/treatment.yaml"), seeds: Sequence[int] = range(10, 20)
) -> Any:
    """Print, write as JSON and return the errors of each method on each realisation."""
    if not config.is_file():
        raise UserError(f"bench treatment: no {config} here; start it in the folder of mtrain's sources")
    tree = yaml.load(config.read_text(encoding="utf-8"), Loader=YamlLoader)
    results = {method: _score(tree, method, seeds) for method in METHODS}
    for method, found in results.items():
        if method != OURS:
            found["less"] = {name: paired(found[name], results[OURS][name]) for name in ("all", "test")}
    _show(results)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1))
    return results


def _score(tree: dict[str, Any], method: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Choose a method's learning rate, then train it on each realisation: validation errors, and PEHE of all and test rows."""
    valid = {lr: np.mean([_fit(tree, method, seed, lr)[0] for seed in TUNED_ON]) for lr in RATES}
    lr = min(valid, key=lambda rate: valid[rate])
    scored = [_fit(tree, method, seed, lr) for seed in seeds]
    found: dict[str, Any] = {"lr": lr, "valid": [one[0] for one in scored]}
    for name, place in (("all", slice(None)), ("test", "test")):
        found[name] = [_pehe(effect_N, seed, place) for seed, (_, effect_N) in zip(seeds, scored, strict=True)]
    return found


def paired(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """How much less our error is, in the mean over realisations, and its standard error."""
    less_S = np.subtract(theirs, ours)
    return float(less_S.mean()), float(less_S.std(ddof=1) / len(less_S) ** 0.5)


def _pehe(effect_N: NDArray[np.float64], seed: int, part: Any) -> float:
    table = treatment(seed)
    error_N = effect_N - (table["mu1"].to_numpy() - table["mu0"].to_numpy())
    if isinstance(part, str):
        error_N = error_N[np.array(table["part"].to_pylist()) == part]
    return float(np.sqrt((error_N**2).mean()))


def _fit(tree: dict[str, Any], method: str, seed: int, lr: float) -> tuple[float, NDArray[np.float64]]:
    """Train a method; the weighted error of its validation part, and the predicted effect of each row."""
    table, errors, outcomes = treatment(seed), [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, tasks in enumerate(METHODS[method]):
            own = _tree(tree, seed, lr, tasks)
            path, console = Path(folder) / f"run{number}", Console(quiet=True)
            summary = runs.train(check_config(own, "bench treatment"), Path(), path, console)
            errors.append(summary["valid"]["mse"]["mean"])
            for t in ("0", "1") if tasks == "y" else tasks.split():
                rows = table.set_column(table.column_names.index("t"), "t", pa.array([int(t)] * len(table)))
                pq.write_table(rows, Path(folder) / "rows.parquet")
                predict([path], str(Path(folder) / "rows.parquet"), Path(folder) / "out.parquet", console)
                outcomes[t] = pq.read_table(Path(folder) / "out.parquet")["y" if tasks == "y" else t].to_numpy()
    return float(np.mean(errors)), outcomes["1"] - outcomes["0"]


def _tree(tree: dict[str, Any], seed: int, lr: float, tasks: str) -> dict[str, Any]:
    """The config of one model: of both heads, of one treatment's outcome, or of the outcome `y` with t as an input."""
    path = f"{tree['data']['path']}(seed={seed})"
    rows = (np.array(treatment(seed)["part"].to_pylist()) == "train") & np.isin(
        treatment(seed)["t"].to_numpy(), [0, 1] if tasks == "y" else [int(t) for t in tasks.split()]
    )
    epochs = tree["train"]["steps"] * tree["train"]["global_batch"] / rows.sum()
    own = {
        **tree,
        "data": {**tree["data"], "path": path},
        "tasks": {"labels": tasks.split(), "kind": "regression"},
        "train": {**tree["train"], "lr": lr, "seed": seed, "eval_every": epochs / EVALUATIONS},
    }
    if tasks == "y":
        own["data"] = {"path": path, "layout": "grid", "weight": tree["data"]["weight"]}
        own["inputs"] = {**tree["inputs"], "t": "Numeric"}
        del own["sampler"]
    return own


def _show(results: dict[str, Any]) -> None:
    """Mean errors, with what is between each and ours in the same realisations, and its standard error."""
    headers = [f"{what}, {rows}" for rows in ("all rows", "test rows") for what in ("PEHE", f"more than {OURS}")]
    table = Table("method", "lr", *headers, box=None, pad_edge=False)
    for method, found in results.items():
        cells = []
        for name in ("all", "test"):
            cells.append(f"{np.mean(found[name]):.3f}")
            cells.append("{:.3f} ± {:.3f}".format(*found["less"][name]) if "less" in found else "")
        table.add_row(method, f"{found['lr']:g}", *cells)
    Console().print(table)
