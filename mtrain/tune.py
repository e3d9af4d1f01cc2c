"""`mtrain tune`: search over the options of a config on the validation part, by optuna (the extra `tune`)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from mtrain import runs
from mtrain.components import first_problem
from mtrain.config import Config, load_config, to_yaml
from mtrain.errors import UserError
from mtrain.report.say import say
from mtrain.train.evaluate import HIGHER_IS_BETTER
from mtrain.train.run_dir import RunDir

STUDY, BEST = "study.db", "best.yaml"


class Range(BaseModel):
    """What one key of the config may be: `{low: 1.0e-4, high: 1.0e-2, log: true}`, `{choices: [[256], [512, 512]]}`."""

    model_config = ConfigDict(extra="forbid")

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: list[Any] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_of_both(self) -> Range:
        if self.choices:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("has choices and low, high or log; expected one of both")
        elif self.low is None or self.high is None or self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("expected low below high (above 0 with log), or choices")
        return self

    def suggest(self, trial: Any, key: str) -> Any:
        """A value for a trial; whole numbers between whole numbers."""
        if self.choices:
            return json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in self.choices]))
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (trial.suggest_int if whole else trial.suggest_float)(key, self.low, self.high, log=self.log)


def default_space(config: Config) -> dict[str, Range]:
    """Learning rate, weight decay and batch about what the config says; of an MLP also widths and dropout."""
    train, trunk = config.train, config.model.trunk
    space = {
        "train.lr": Range(low=train.lr / 10, high=train.lr * 10, log=True),
        "train.weight_decay": Range(low=1e-4, high=1.0, log=True),
        "train.global_batch": Range(
            choices=sorted({max(1, train.global_batch // 2), train.global_batch, train.global_batch * 2})
        ),
    }
    if trunk.class_path == "MLP":
        widths = trunk.init_args.get("widths", [512, 512])
        half, double = [max(8, width // 2) for width in widths], [width * 2 for width in widths]
        several = {str(each): each for each in (half, widths, double, [*widths, widths[-1]])}
        space["model.trunk.init_args.widths"] = Range(choices=list(several.values()))
        space["model.trunk.init_args.dropout"] = Range(low=0.0, high=0.6)
    return space


def read_space(path: Path) -> dict[str, Range]:
    """The ranges by key of a YAML file.

    Raises:
        UserError: it is missing or no such file; the key is named.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--space {path}: cannot be read: {error}") from None
    if not isinstance(tree, dict) or not tree or not all(isinstance(value, dict) for value in tree.values()):
        raise UserError(f"--space {path}: expected keys of the config with {{low, high, log}} or {{choices}}")
    space = {}
    for key, value in tree.items():
        try:
            space[str(key)] = Range.model_validate(value)
        except ValidationError as error:
            raise UserError(f"--space {path}: {first_problem(error, str(key), Range.model_fields)}") from None
    return space


def tune(path: Path, words: Sequence[str], trials: int, console: Console, space_path: Path | None = None) -> None:
    """Train a config so many times with options from a space, and write the best one as a config.

    A trial's value is the selected metric (`select.metric`, `select.reduce`) of its validation part, of the first split seed;
    nothing is chosen by a test part. All is kept in the run directory: the same command continues where it was stopped, and
    more `trials` go on from those that are there.

    Args:
        words: of the command line, `--section.key value`; they hold for all trials.

    Raises:
        UserError: optuna is missing, the space or the config is wrong, or no trial gave a value.
    """
    optuna = _optuna()
    config = load_config(path, words)
    space = default_space(config) if space_path is None else read_space(space_path)
    for key, allowed in space.items():  # a wrong key or value is said before anything is trained
        for value in allowed.choices or [allowed.low, allowed.high]:
            load_config(path, [*words, *_words({key: value})])
    folder = Path(config.run_dir or Path("runs") / f"{path.stem}-tune")
    study = _study(optuna, folder, config, space)
    _repeat_unfinished(optuna, study)
    done = len(_complete(optuna, study))
    for _ in range(done, trials):
        trial = study.ask()
        chosen = {key: allowed.suggest(trial, key) for key, allowed in space.items()}
        value = _train(path, [*words, *_words(chosen)], folder / f"trial-{trial.number:04d}", config)
        state = optuna.trial.TrialState
        finished = study.tell(trial, value, state=state.COMPLETE if math.isfinite(value) else state.FAIL)
        if finished.state is state.COMPLETE and study.best_trial.number == trial.number:
            _write_best(folder, trial.number, config)
        found = ", ".join(f"{key.rpartition('.')[2]} {_short(each)}" for key, each in chosen.items())
        say(console, f"trial {trial.number}: {config.select.metric} {value:.4f} ({found})")
    _show(study, _complete(optuna, study), config, folder, console)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError('tune needs optuna: pip install "mtrain[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(optuna: Any, folder: Path, config: Config, space: Mapping[str, Range]) -> Any:
    """The study in a directory; a new one where there is none.

    Raises:
        UserError: the directory is something else, or of a study over another space.
    """
    told = {key: allowed.model_dump(mode="json") for key, allowed in space.items()}
    if folder.exists() and not (folder / STUDY).is_file() and any(folder.iterdir()):
        raise UserError(f"run_dir {folder}: exists and is not of mtrain tune; choose another --run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    better = "maximize" if HIGHER_IS_BETTER.get(config.select.metric, True) else "minimize"
    study = optuna.create_study(
        storage=f"sqlite:///{folder / STUDY}",
        study_name="mtrain",
        direction=better,
        sampler=optuna.samplers.TPESampler(seed=config.train.seed),
        load_if_exists=True,
    )
    if study.user_attrs.get("space", told) != told:
        raise UserError(f"run_dir {folder}: holds a search over another space; choose another --run_dir, or remove it")
    study.set_user_attr("space", told)
    return study


def _repeat_unfinished(optuna: Any, study: Any) -> None:
    """Trials that were stopped are tried again."""
    state = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(state.RUNNING,)):
        study.tell(trial.number, state=state.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)


def _complete(optuna: Any, study: Any) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _train(path: Path, words: Sequence[str], run_path: Path, config: Config) -> float:
    """The value of a trial on the validation part."""
    shutil.rmtree(run_path, ignore_errors=True)  # of a trial that was stopped
    one = load_config(path, [*words, "--split.seeds", json.dumps(config.split.seeds[:1]), "--split.refit", "false"])
    summary = runs.train(one, path.parent, run_path, Console(quiet=True))
    shutil.rmtree(run_path / "checkpoints", ignore_errors=True)
    if "valid" not in summary:
        raise UserError("tune: the split has no valid part, which trials are compared on; add one to split.parts")
    value = summary["valid"].get(config.select.metric, {}).get(config.select.reduce)
    return math.nan if value is None else float(value)


def _write_best(folder: Path, number: int, config: Config) -> None:
    """The config of a trial, with the seeds and the refit that were asked for."""
    best = RunDir(folder / f"trial-{number:04d}").config()
    best = best.model_copy(update={"run_dir": None, "split": config.split})
    unfinished = folder / f".{BEST}"
    unfinished.write_text(to_yaml(best))
    unfinished.replace(folder / BEST)


def _words(chosen: Mapping[str, Any]) -> list[str]:
    return [word for key, value in chosen.items() for word in (f"--{key}", json.dumps(value))]


def _show(study: Any, complete: Sequence[Any], config: Config, folder: Path, console: Console) -> None:
    if not complete:
        raise UserError(f"tune: no trial gave a finite {config.select.metric} on the valid part; look at {folder}")
    ranked = sorted(complete, key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")
    table = Table(title=f"best of {len(complete)} trials", title_justify="left", box=None, pad_edge=False)
    keys = list(ranked[0].params)
    for name in ("trial", f"valid {config.select.metric}, {config.select.reduce}", *(key.rpartition(".")[2] for key in keys)):
        table.add_column(name, justify="right")
    for trial in ranked[:5]:
        table.add_row(str(trial.number), f"{trial.value:.4f}", *(_short(trial.params.get(key)) for key in keys))
    console.print(table)
    say(
        console,
        f"the best as a config: mtrain train {folder / BEST} (the best of many trials looks better on the valid part "
        "than it is: judge it by the test part)",
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
