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
from rich.text import Text

from mtrain import runs
from mtrain.balance import BALANCERS
from mtrain.components import first_problem, signature
from mtrain.config import Config, load_config, to_yaml
from mtrain.data.samplers import SAMPLERS
from mtrain.errors import UserError
from mtrain.model.trunks import TRUNKS
from mtrain.report.say import say
from mtrain.train.evaluate import HIGHER_IS_BETTER
from mtrain.train.run_dir import RunDir
from mtrain.writing import replacing

FIXED = ("data", "split", "select", "run_dir", "tracker")
STUDY, BEST = "study.db", "best.yaml"
SHOWN = 5  # of the trials, and the one as configured
AS_CONFIGURED = "as_configured"  # the attribute of the trial with the config's own settings
_KNOWN: dict[str, Mapping[str, Any]] = {"model.trunk": TRUNKS, "objective.balancer": BALANCERS, "sampler": SAMPLERS}


class Range(BaseModel):
    """What one key of the config may be: `{low: 1.0e-4, high: 1.0e-2, log: true}`, `{choices: [[256], [512, 512]]}`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

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

    def parameter(self, value: Any) -> Any:
        """What `suggest` would have chosen, in the form that optuna keeps, to give `value`; None: it never does."""
        if self.choices:
            return next((json.dumps(choice) for choice in self.choices if choice == value), None)
        assert self.low is not None
        assert self.high is not None
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return int(value) if value == int(value) else None
        return float(value)


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


def own_value(config: Config, key: str) -> Any:
    """What a config says of a key, or the class whose option it is where the config leaves it out; None: nothing."""
    *path, name = key.split(".")
    owner: Any = None
    found: Any = config
    for part in path:
        owner, found = found, found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    if not isinstance(found, dict):
        value = getattr(found, name, None)
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    where = ".".join(path[:-1])
    if name in found or path[-1] != "init_args" or where not in _KNOWN:
        return found.get(name)
    option = signature(owner, _KNOWN[where], where).get(name)
    return None if option is None else option.default


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
            problem = first_problem(error, str(key), Range.model_fields).removeprefix(f"{key}: ")
            raise UserError(f"--space {path}: {key}: {problem}") from None
        if str(key).split(".")[0] in FIXED:
            raise UserError(f"--space {path}: {key}: cannot be searched, trials would be scored on other rows or otherwise")
    return space


def tune(path: Path, words: Sequence[str], trials: int, console: Console, space_path: Path | None = None) -> None:
    """Train a config so many times with options from a space, and write the best one as a config.

    A trial's value is the selected metric (`select.metric`, `select.reduce`) of its validation part, of the first split seed;
    nothing is chosen by a test part. The first trial has the config's own settings, where they lie in the space. All is kept in
    the run directory: the same command continues where it was stopped, and more `trials` go on from those that are there.

    Args:
        words: of the command line, `--section.key value`; they hold for all trials.

    Raises:
        UserError: optuna is missing, the space or the config is wrong, or no trial gave a value. Values from the space that
            cannot be trained are said, once another trial could.
    """
    if trials < 1:
        raise UserError(f"--trials {trials}: expected at least 1")
    optuna = _optuna()
    config = load_config(path, words)
    space = default_space(config) if space_path is None else read_space(space_path)
    for key, allowed in space.items():  # a wrong key or value is said before anything is trained
        for value in allowed.choices or [allowed.low, allowed.high]:
            load_config(path, [*words, *_words({key: value})])
    folder = Path(config.run_dir or Path("runs") / f"{path.stem}-tune")
    study = _study(optuna, folder, config, space)
    if not study.get_trials(deepcopy=False):
        _begin_as_configured(study, config, space, console)
    _repeat_unfinished(optuna, study)
    done = len(_complete(optuna, study))
    for _ in range(done, trials):
        trial = study.ask()
        chosen = {key: allowed.suggest(trial, key) for key, allowed in space.items()}
        found = ", ".join(f"{key.rpartition('.')[2]} {_short(each)}" for key, each in chosen.items())
        say(console, f"trial {_number(trial)}: {found}")
        state = optuna.trial.TrialState
        try:
            value = _train(path, [*words, *_words(chosen)], folder / f"trial-{trial.number:04d}", config)
        except UserError as error:
            study.tell(trial, state=state.FAIL)
            if not _complete(optuna, study):
                if AS_CONFIGURED in trial.user_attrs:  # again, when what is wrong is mended
                    study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
                raise
            say(console, f"trial {trial.number}: cannot be trained: {error}")
            continue
        finished = study.tell(trial, value, state=state.COMPLETE if math.isfinite(value) else state.FAIL)
        if finished.state is state.COMPLETE and study.best_trial.number == trial.number:
            _write_best(folder, trial.number, config)
        say(console, f"trial {trial.number}: {config.select.metric} {value:.4f}")
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
        UserError: the directory is something else, or of a study that cannot be opened or is over another space.
    """
    from sqlalchemy.exc import SQLAlchemyError

    told = {key: allowed.model_dump(mode="json") for key, allowed in space.items()}
    if folder.exists() and not (folder / STUDY).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"run_dir {folder}: exists and is not of mtrain tune; choose another --run_dir")
    if "?" in str(folder):  # the address of the database would end there
        raise UserError(f"run_dir {folder}: expected a name without '?'; choose another --run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    better = "maximize" if HIGHER_IS_BETTER.get(config.select.metric, True) else "minimize"
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY}", study_name="mtrain", direction=better, load_if_exists=True
        )
    except SQLAlchemyError as error:
        reason = getattr(error, "orig", error)
        raise UserError(f"run_dir {folder}: {STUDY} cannot be opened: {reason}; choose another --run_dir") from error
    begun = len(study.get_trials(deepcopy=False))  # or a search that goes on would draw again what it began with
    study.sampler = optuna.samplers.TPESampler(seed=config.train.seed + begun)
    if study.user_attrs.get("space", told) != told:
        raise UserError(f"run_dir {folder}: holds a search over another space; choose another --run_dir, or remove it")
    study.set_user_attr("space", told)
    return study


def _begin_as_configured(study: Any, config: Config, space: Mapping[str, Range], console: Console) -> None:
    """Make the config's own settings the first trial; where they are not in the space, say what is not."""
    own = {key: allowed.parameter(own_value(config, key)) for key, allowed in space.items()}
    outside = [f"{key} {_short(own_value(config, key))}" for key, value in own.items() if value is None]
    if outside:
        say(console, f"no trial has the config's own settings, which are not in the space: {', '.join(outside)}")
        return
    study.enqueue_trial(own, user_attrs={AS_CONFIGURED: True})


def _number(trial: Any) -> str:
    return f"{trial.number}, as configured" if AS_CONFIGURED in trial.user_attrs else str(trial.number)


def _repeat_unfinished(optuna: Any, study: Any) -> None:
    """Trials that were stopped are tried again."""
    state = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(state.RUNNING,)):
        study.tell(trial.number, state=state.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)


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
    with replacing(folder / BEST) as unfinished:
        unfinished.write_text(to_yaml(best))


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
    shown = [trial for place, trial in enumerate(ranked) if place < SHOWN or AS_CONFIGURED in trial.user_attrs]
    for trial in shown:
        table.add_row(_number(trial), f"{trial.value:.4f}", *(Text(_short(trial.params.get(key))) for key in keys))
    console.print(table)
    if AS_CONFIGURED in ranked[0].user_attrs:
        say(console, "no trial is better than the config as it is")
    say(
        console,
        f"the best as a config: mtrain train {folder / BEST} (the best of many trials looks better on the valid part "
        "than it is: judge it by the test part)",
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
