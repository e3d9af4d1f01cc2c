"""The commands."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from mtrain.config import keys, load_config
from mtrain.errors import UserError
from mtrain.train.stop import Preempted, stop_signals

SAID_ONCE = 1.0  # seconds in which a launcher ends the other processes, where rank 0 makes the same mistake
BENCHES = ("heads", "step", "stream", "scale", "checkpoint", "balance")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 a mistake that one line on standard error explains, 128 + n stopped by signal n."""
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        noticed = ("SIGTERM", "SIGUSR1") if argv[:1] == ["train"] else ()
        with stop_signals(*noticed) as asked:  # also while libraries are imported and data read
            _run(argv, asked)
        _part()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SAID_ONCE)
        print(f"mtrain: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mtrain: interrupted", file=sys.stderr)
        sys.exit(130)
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"mtrain: stopped by {stop}", file=sys.stderr)
        sys.exit(128 + stop.number)
    sys.exit(0)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _run(argv: list[str], asked: Callable[[], int | None]) -> None:
    parser = _Parser(prog="mtrain", description="Train models with 100 to 10,000 tasks.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **options: Any) -> argparse.ArgumentParser:
        form = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=text, description=text, formatter_class=form, allow_abbrev=False, **options)

    overrides = "Any key of the config can follow, as --section.key value:\n\n" + _key_help()
    train = command("train", "Train a config, or continue its run.", epilog=overrides)
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue from the newest checkpoint, from none, or from one",
    )
    tasks = command("tasks", "Show the tasks of a config, and what is suspicious, without training.", epilog=overrides)
    tasks.add_argument("config", type=Path, help="YAML file")
    evaluate = command("eval", "Score the validation and test parts of a run again.")
    evaluate.add_argument("run", type=Path, help="run directory")
    predict = command("predict", "Predict every task for every row of a table.")
    predict.add_argument("run", type=Path, help="run directory")
    predict.add_argument("data", help="table with the run's input columns; labels are not needed")
    predict.add_argument("-o", "--output", type=Path, required=True, help=".parquet or .csv")
    partition = command("partition", "Rewrite a table as a file for each task, for layout files.", epilog=overrides)
    partition.add_argument("config", type=Path, help="YAML file")
    partition.add_argument("-o", "--output", type=Path, required=True, help="folder")
    partition.add_argument("--rows", type=int, default=1024, help="rows of a row group of the files [1024]")
    plan = command("plan", "Show who would own what on so many processes, and what a step would send.", epilog=overrides)
    plan.add_argument("config", type=Path, help="YAML file")
    plan.add_argument("--ranks", type=int, required=True, help="processes")
    plan.add_argument("--memory", type=float, metavar="GB", help="of each process, for parameters, gradients and moments")
    plan.add_argument("--fsdp", action="store_true", help="the trunk sharded by FSDP2 instead of replicated by DDP")
    consolidate = command("consolidate", "Write a run's model as one file, or such a file as a run directory.")
    consolidate.add_argument("source", type=Path, help="run directory, or a .safetensors file that this command wrote")
    consolidate.add_argument("-o", "--output", type=Path, required=True, help=".safetensors file, or a new run directory")
    bench = command("bench", "Measure, and write the figures as JSON.")
    bench.add_argument("name", choices=list(BENCHES))
    bench.add_argument("--json", type=Path, help="file for the figures")
    bench.add_argument("--case", action="append", help="only this case (repeatable; not of step and stream)")

    arguments, rest = parser.parse_known_args(argv)
    with_config = arguments.command in ("train", "tasks", "partition", "plan")
    if rest and not with_config:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, os.getcwd())  # users' own classes are found beside them
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.command == "bench":
        _bench(arguments)
        return
    _quiet()
    from mtrain import runs

    if with_config:
        config = load_config(arguments.config, rest)
        beside = arguments.config.parent
        if arguments.command == "tasks":
            runs.show_tasks(config, beside, console)
            return
        if arguments.command == "plan":
            from mtrain.report.plan import show_plan

            show_plan(config, beside, arguments.ranks, arguments.memory, console, arguments.fsdp)
            return
        if arguments.command == "partition":
            from mtrain.data.partition import partition as rewrite

            rewrite(config, beside, arguments.output, console, arguments.rows)
            return
        path = Path(config.run_dir or Path("runs") / arguments.config.stem)
        runs.train(config, beside, path, console, arguments.resume, asked)
    elif arguments.command == "eval":
        runs.evaluate(arguments.run, console)
    elif arguments.command == "consolidate":
        from mtrain.train.consolidate import consolidate as convert

        convert(arguments.source, arguments.output, console)
    else:
        runs.predict(arguments.run, arguments.data, arguments.output, console)


def _bench(arguments: argparse.Namespace) -> None:
    module = importlib.import_module(f"mtrain.bench.{arguments.name}")
    options = [arguments.case] if arguments.name in ("heads", "scale", "checkpoint", "balance") else []
    module.run(arguments.json, *options)


def _part() -> None:
    """Processes that worked together end their group."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _quiet() -> None:
    """Libraries do not print over the progress bar."""
    import datasets

    datasets.disable_progress_bars()


def _key_help() -> str:
    lines = []
    for key, text, default in keys():
        about = " ".join(text.split())
        if isinstance(default, str | int | float) and not isinstance(default, bool):
            about += f" [{default}]"
        lines.append(f"  --{key}")
        lines += textwrap.wrap(about, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
