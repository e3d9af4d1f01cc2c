"""What `mtrain COMMAND --help` says beside its options: what happens, what is written, and how it is used."""

FIRST_RUN = """A first run, from a table to predictions:

  mtrain init assays.csv                             look at the table, write assays.yaml
  mtrain train assays.yaml                           train it, into runs/assays
  mtrain report runs/assays -o report.html           look at every task
  mtrain predict runs/assays new.csv -o new.parquet

mtrain COMMAND --help says more; a mistake ends in one line and exit status 2."""

MORE = {
    "init": """\
The config is tried before it is written: tasks, inputs and split are made as training makes them. Nothing is asked; what
was guessed wrong is corrected by the options below, or in the file.

  mtrain init assays.csv.gz                                        writes assays.yaml
  mtrain init sales.parquet --task shop --label revenue            a long table, a task for each shop
  mtrain init measured.csv --labels "yield_*" purity --key batch   label columns by name and pattern
  mtrain init shops/ -o shops.yaml                                 a folder, a file for each task""",
    "train": """\
Everything goes to a run directory, runs/<name of the config> or --run_dir: the resolved config, the table of tasks, the
curve, every metric of every task, and checkpoints. The same command continues a run that was stopped (Ctrl-C, SIGTERM: the
step is finished and saved), and a finished one with a larger train.epochs or train.steps.

  mtrain train assays.yaml
  mtrain train assays.yaml --run_dir runs/wide --train.epochs 50 --model.trunk.init_args.widths "[1024]"
  torchrun --nproc_per_node 2 -m mtrain train assays.yaml""",
    "tasks": """\
For each task its kind and why, labels in each part, mean and spread; then sizes, memory and time of a training, how many
test inputs also occur in training, and what a person should look at first.

  mtrain tasks assays.yaml
  mtrain tasks assays.yaml --split.by scaffold --split.column smiles""",
    "eval": """\
Data and split are made again from the run's config, and must be what they were. Prints the metrics as training did; writes
nothing.

  mtrain eval runs/assays""",
    "predict": """\
Rows keep the table's order. A column for each task has its value in original units, the probability of 1, or the name of
the likeliest class, with each class's probability in `task=class`. Routed: each row's own task is in `prediction`, with
--own-task alone. --keep carries columns of the table over, after its key and task. Rows whose inputs cannot be used get no
prediction. Rows are read and written some at a time, so that a table may be larger than memory.

  mtrain predict runs/assays new.csv -o new.parquet
  mtrain predict runs/assays new.csv -o joined.csv --keep id "date*"
  mtrain predict runs/a runs/b runs/c new.csv -o mean.csv          the mean of several runs""",
    "tune": """\
Each trial is a training, the first one with the config as it is; its value is the selected metric of the validation part,
the test part is not looked at. Trials and best.yaml, the best one as a config, are in runs/<name of the config>-tune or
--run_dir. The same command goes on where it was stopped, or with a larger --trials further.

  mtrain tune assays.yaml --trials 30
  mtrain train runs/assays-tune/best.yaml""",
    "calibrate": """\
Each task's probabilities are scaled and shifted as its validation part asks (Platt), small tasks nearly as the pool of all
tasks. It is kept in the run directory for the binary tasks, and for the multiclass ones, whose log loss on the validation
part it lowers, cross-validated over rows; where it lowers neither, a calibration that was there is removed.

  mtrain calibrate runs/assays""",
    "export": """\
The folder holds the program (torch.export, and ONNX, compared with the model), preprocessing, thresholds, the table of
tasks and a model card. In Python: mtrain.ship.predictor.Predictor.load(DIR).predict(table).

  mtrain export runs/assays -o shipped --tasks "NR-*"
""",
    "report": """\
One file that opens without a network: the distribution of skill over tasks and its course, a table of all tasks that can be
sorted and searched, task against size, weights and affinities, time. For several runs of the same split also what differs
from the first, task by task, with intervals from drawing rows anew.

  mtrain report runs/assays -o report.html
  mtrain report runs/plain runs/wide -o compared.html""",
    "baseline": """\
For the same tasks, split and metrics as the config's run: a constant, a linear model of all tasks together, a linear model
for each task, and a network for each task, which has the config's trunk and its own best epoch. Each is kept as a run,
RUN/baseline-NAME, and scores by task are in RUN/baseline.parquet. The run itself need not be there.

  mtrain baseline assays.yaml
  mtrain report runs/assays/baseline-single runs/assays -o helped.html     did sharing help, task by task""",
    "partition": """\
Writes a Parquet file for each task, a task table and a config that trains on them. One that was stopped goes on where it
was.

  mtrain partition configs/school.yaml -o school_files""",
    "plan": """\
Nothing is trained and no process started. Says which tasks each process would own, which are shared by all, how even the
load is, the memory of each, and the bytes that a step would send.

  mtrain plan assays.yaml --ranks 8 --memory 40""",
    "consolidate": """\
A file holds each head under its task's name, with what other programs need to know in its metadata. A run directory made
from a file can predict and be a start (--init_from), but not be continued.

  mtrain consolidate runs/assays -o assays.safetensors
  mtrain consolidate assays.safetensors -o runs/again""",
    "bench": """\
Each prints its cases as they are measured; the README says what they compare. They take minutes.

  mtrain bench heads --case grid-1000x64 --json heads.json""",
}
