"""The commands."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from mtrain.config import keys, load_config, override
from mtrain.errors import UserError
from mtrain.report.help import FIRST_RUN, MORE
from mtrain.train.stop import Preempted, leave, stop_signals

SAID_ONCE = 1.0  # seconds in which a launcher ends the other processes, where rank 0 makes the same mistake
WITH_KEYS = ("init", "train", "tasks", "tune", "baseline", "partition", "plan")  # commands that take --section.key value
TOGETHER = ("train", "eval", "predict")  # commands that several processes of a launcher run together
BENCHES = ("heads", "step", "stream", "scale", "checkpoint", "balance", "study", "fusion", "experts", "treatment")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 a mistake that one line on standard error explains, 128 + n stopped by signal n."""
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        noticed = ("SIGTERM", "SIGUSR1") if argv[:1] == ["train"] else ()
        with stop_signals(*noticed) as asked:  # also while libraries are imported and data read
            _run(argv, asked)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SAID_ONCE)
        print(f"mtrain: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("mtrain: interrupted", file=sys.stderr)
        leave(130)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"mtrain: stopped by {stop}", file=sys.stderr)
        leave(128 + stop.number, together=True)
    leave(0, together=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _run(argv: list[str], asked: Callable[[], int | None]) -> None:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command not in WITH_KEYS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    launched, name = int(os.environ.get("WORLD_SIZE", 1)), arguments.command
    if launched > 1 and name not in TOGETHER:
        raise UserError(f"{name} runs in one process, found {launched} of a launcher; start it as: mtrain {name} ...")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # libraries do not print over the progress bar
    sys.path.insert(0, os.getcwd())  # users' own classes are found beside them
    console = Console(width=None if sys.stdout.isatty() else 140)
    _command(arguments, rest, console, asked)


def _parser() -> _Parser:
    form = argparse.RawDescriptionHelpFormatter
    about = "Train models with 100 to 10,000 tasks."
    parser = _Parser(prog="mtrain", description=about, epilog=FIRST_RUN, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        more = f"{text}\n\n{MORE.get(name, '')}".strip()
        return commands.add_parser(name, help=text, description=more, formatter_class=form, allow_abbrev=False, **options)

    overrides = "Any key of the config can follow, as --section.key value:\n\n" + _key_help()
    init = command(
        "init",
        "Look at a table, show what its columns are and why, and write a config that mtrain train runs as it is.",
        epilog=overrides,
    )
    init.add_argument("data", help="CSV, JSON, Parquet or Arrow file, folder or glob of them, or hub id")
    init.add_argument("-o", "--output", type=Path, metavar="FILE", help="the config; default: the name of the data, .yaml")
    init.add_argument("--force", action="store_true", help="write over FILE where it exists")
    init.add_argument(
        "--layout",
        choices=["grid", "routed", "pairs", "files"],
        help="grid: a column for each task; routed: rows that belong to one task each; pairs: a row for each label of a key; "
        "files: a file for each task",
    )
    init.add_argument("--labels", nargs="+", metavar="PATTERN", help="label columns, by name or pattern; the others are inputs")
    init.add_argument("--key", metavar="COLUMN", help="says which rows are one molecule, customer, ...; they stay together")
    init.add_argument("--task", metavar="COLUMN", help="of a long table: the task's name")
    init.add_argument("--label", metavar="COLUMN", help="of a long table, or of a file for each task: the label")
    train = command("train", "Train a config, or continue its run.", epilog=overrides)
    train.add_argument("config", type=Path, help="YAML file, such as mtrain init writes")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: continue from the newest checkpoint of the run directory, if it has one [auto]; never: refuse if it has "
        "one; PATH: go back to RUN/checkpoints/step-NUMBER",
    )
    tasks = command("tasks", "Show the tasks of a config, and what is suspicious, without training.", epilog=overrides)
    tasks.add_argument("config", type=Path, help="YAML file, such as mtrain init writes")
    tasks.add_argument("--all", action="store_true", help="show every task, not only 20 of them, suspicious ones first")
    evaluate = command("eval", "Score the validation and test parts of a run again.")
    evaluate.add_argument("run", type=Path, help="run directory")
    predict = command("predict", "Predict every task for every row of a table, with one run or the mean of several.")
    predict.add_argument("run", type=Path, nargs="+", help="run directories, of the same tasks")
    predict.add_argument("data", help="table with the runs' input columns; labels are not needed")
    predict.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .parquet or .csv")
    predict.add_argument(
        "--all-tasks",
        action="store_true",
        help="whatever task a row names: it may be one that the run has not, and a trunk that reads it reads every task",
    )
    predict.add_argument(
        "--keep",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help="columns of the table to write too, by name or pattern: ids, dates",
    )
    predict.add_argument(
        "--own-task", action="store_true", help="write each row's own task alone (`prediction`), not a column for each task"
    )
    predict.add_argument("--no-calibration", action="store_true", help="leave a run's calibration (mtrain calibrate) off")
    tune = command("tune", "Search over options of a config on its validation part, and write the best.", epilog=overrides)
    tune.add_argument("config", type=Path, help="YAML file")
    tune.add_argument("--trials", type=int, default=20, help="trainings in all, those of earlier calls included [20]")
    tune.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="YAML: `train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}`, `train.global_batch: {choices: [64, 128]}`; default: "
        "learning rate, weight decay and batch about those of the config, and the widths and dropout of an MLP",
    )
    calibrate = command("calibrate", "Calibrate a run's probabilities on its validation part, and show what that does.")
    calibrate.add_argument("run", type=Path, help="run directory; predict and export use what is kept from then on")
    calibrate.add_argument(
        "--strength", type=float, default=100, help="rows of the pool of all tasks that each task is pulled towards by [100]"
    )
    calibrate.add_argument(
        "--force",
        action="store_true",
        help="keep it also where the log loss is not lower with it, cross-validated on that part",
    )
    export = command("export", "Write a run's model for use without mtrain's trainer: torch.export, ONNX, and what they need.")
    export.add_argument("run", type=Path, help="run directory, of one split seed")
    export.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    export.add_argument("--tasks", nargs="+", metavar="PATTERN", help="names or patterns of tasks; default: all")
    export.add_argument("--no-onnx", action="store_true", help="leave the ONNX file out")
    export.add_argument("--no-calibration", action="store_true", help="leave the run's calibration (mtrain calibrate) off")
    report = command("report", "Write an HTML report of a run, or of several and how they differ from the first.")
    report.add_argument("run", type=Path, nargs="+", help="run directory; several must have the same split")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="HTML file [report.html]")
    report.add_argument("--resamples", type=int, default=400, help="how often rows are drawn anew for intervals [400]")
    baseline = command("baseline", "Fit linear models and networks of single tasks: did sharing help?", epilog=overrides)
    baseline.add_argument("config", type=Path, help="YAML file of the run")
    baseline.add_argument("-o", "--output", type=Path, metavar="DIR", help="where to write [the run directory]")
    partition = command("partition", "Rewrite a table as a file for each task, for layout files.", epilog=overrides)
    partition.add_argument("config", type=Path, help="YAML file, such as mtrain init writes")
    partition.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new one, or one to go on with")
    partition.add_argument("--rows", type=int, default=1024, help="rows of a row group of the files [1024]")
    plan = command("plan", "Show who would own what on so many processes, and what a step would send.", epilog=overrides)
    plan.add_argument("config", type=Path, help="YAML file, such as mtrain init writes")
    plan.add_argument("--ranks", type=int, required=True, metavar="N", help="number of processes")
    plan.add_argument("--memory", type=float, metavar="GB", help="of each process, for parameters, gradients and moments")
    plan.add_argument("--fsdp", action="store_true", help="the trunk sharded by FSDP2 instead of replicated by DDP")
    consolidate = command("consolidate", "Write a run's model as one file, or such a file as a run directory.")
    consolidate.add_argument("source", type=Path, help="run directory, or a .safetensors file that this command wrote")
    consolidate.add_argument("-o", "--output", type=Path, required=True, help=".safetensors file, or a new run directory")
    bench = command("bench", "Measure, and write the figures as JSON.")
    bench.add_argument("name", choices=list(BENCHES), help="what is measured")
    bench.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    bench.add_argument("--case", action="append", help="only this case (repeatable; not of step, stream and treatment)")
    return parser


def _command(arguments: argparse.Namespace, rest: list[str], console: Console, asked: Callable[[], int | None]) -> None:
    """Run a command. Each imports what it needs itself, for torch and datasets take seconds."""
    if arguments.command in ("eval", "predict", "calibrate", "export", "consolidate"):
        from mtrain.train.run_dir import RunDir

        named = arguments.source if arguments.command == "consolidate" else arguments.run
        for run in named if isinstance(named, list) else [named]:
            RunDir(run).refuse_baseline()
    if arguments.command in ("train", "tasks", "baseline", "partition", "plan"):
        config, beside = load_config(arguments.config, rest), arguments.config.parent
        path = Path(config.run_dir or Path("runs") / arguments.config.stem)
    match arguments.command:
        case "init":
            from mtrain.report.init import init

            given: dict[str, Any] = {}
            override(given, [*_given(arguments), *rest])
            init(arguments.data, arguments.output, given, arguments.force, console)
        case "train":
            from mtrain.runs import train

            train(config, beside, path, console, arguments.resume, asked)
        case "tasks":
            from mtrain.runs import show_tasks

            show_tasks(config, beside, console, arguments.all)
        case "eval":
            from mtrain.runs import evaluate

            evaluate(arguments.run, console)
        case "predict":
            from mtrain.ship.predict import predict

            predict(
                arguments.run,
                arguments.data,
                arguments.output,
                console,
                calibrated=not arguments.no_calibration,
                all_tasks=arguments.all_tasks,
                keep=arguments.keep,
                own_task=arguments.own_task,
            )
        case "tune":
            from mtrain.tune import tune

            tune(arguments.config, rest, arguments.trials, console, arguments.space)
        case "calibrate":
            from mtrain.ship.calibrate import calibrate

            calibrate(arguments.run, console, arguments.strength, arguments.force)
        case "export":
            from mtrain.ship.export import export

            with_onnx, calibrated = not arguments.no_onnx, not arguments.no_calibration
            export(arguments.run, arguments.output, console, arguments.tasks, onnx=with_onnx, calibrated=calibrated)
        case "report":
            from mtrain.report.html import write_report

            write_report(arguments.run, arguments.output, arguments.resamples, console)
        case "baseline":
            from mtrain.baseline.command import baseline

            baseline(config, beside, path, arguments.output, console)
        case "partition":
            from mtrain.data.partition import partition

            partition(config, beside, arguments.output, console, arguments.rows)
        case "plan":
            from mtrain.report.plan import show_plan

            show_plan(config, beside, arguments.ranks, arguments.memory, console, arguments.fsdp)
        case "consolidate":
            from mtrain.train.consolidate import consolidate

            consolidate(arguments.source, arguments.output, console)
        case "bench":
            _bench(arguments)


def _bench(arguments: argparse.Namespace) -> None:
    run = importlib.import_module(f"mtrain.bench.{arguments.name}").run
    if arguments.case and "cases" not in inspect.signature(run).parameters:
        raise UserError(f"bench {arguments.name} has no cases, found --case {arguments.case[0]}; leave it out")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: no folder {arguments.json.parent}; make it first")
    run(arguments.json, **({"cases": arguments.case} if arguments.case else {}))


def _given(arguments: argparse.Namespace) -> list[str]:
    """The short options of init as keys of a config."""
    keys = {"layout": "data.layout", "key": "data.key", "task": "data.task", "label": "data.label", "labels": "tasks.labels"}
    given = {key: getattr(arguments, name) for name, key in keys.items() if getattr(arguments, name) is not None}
    return [word for key, value in given.items() for word in (f"--{key}", json.dumps(value))]


def _key_help() -> str:
    lines = []
    for key, text, default in keys():
        about = " ".join(text.split())
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            about += f" [{default}]"
        lines.append(f"  --{key}")
        lines += textwrap.wrap(about, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
