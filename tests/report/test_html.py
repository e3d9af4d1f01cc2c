"""The report as a file: complete by itself, safe with any name, small."""

import json
import re
from html import unescape

import numpy as np
import pyarrow as pa
import pytest
from made import HOSTILE, make_run

from mtrain.cli import main
from mtrain.model.kinds import Regression
from mtrain.report.html import run_data, write_report

pytest.importorskip("plotly", reason="needs the extra mtrain[report]")


def read(path):
    """The data of a report, and the page without them and without plotly's own script."""
    page = path.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    own = [part for part in re.split(r"<script[^>]*>.*?</script>", page, flags=re.S) if part.strip()]
    return json.loads(data), "".join(own), page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    names = [*HOSTILE, *(f"task {t}" for t in range(8))]
    runs = [make_run(folder / name, names=names, noise=noise, affinity=name == "a") for name, noise in (("a", 1.0), ("b", 0.6))]
    write_report([run.path for run in runs], folder / "report.html", resamples=40)
    return runs, folder / "report.html"


def test_it_needs_no_network(report):
    _, rest, page = read(report[1])
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)", rest)
    assert len(page) < 6e6


def test_names_of_tasks_are_never_markup(report):
    data, rest, page = read(report[1])
    assert data["runs"][0]["tasks"]["task"][: len(HOSTILE)] == list(HOSTILE)
    assert "alert(1)" not in rest
    assert page.count("<script>alert(1)") == 0
    assert "onerror=alert(1)>" not in page.replace("\\u003cimg src=x onerror=alert(1)>", "")


def test_a_run_directory_with_a_hostile_name_is_only_a_title(tmp_path):
    run = make_run(tmp_path / "<b>&x")
    write_report([run.path], tmp_path / "report.html", resamples=5)
    page = (tmp_path / "report.html").read_text()
    assert unescape(re.search("<title>(.*?)</title>", page)[1]) == "mtrain: <b>&x"
    assert "<b>&x" not in page


def test_it_holds_what_the_run_says(report):
    run, data = report[0][0], read(report[1])[0]["runs"][0]
    table = run.per_task()
    assert data["tasks"]["skill"] == pytest.approx(table["test_skill"].to_pylist(), rel=1e-4)
    assert data["tasks"]["train"] == table["train_labels"].to_pylist()
    assert all(
        low <= value <= high
        for low, value, high in zip(*(data["tasks"][f"skill{k}"] for k in ("_low", "", "_high")), strict=True)
    )
    assert data["tasks"]["best"] == [200 if skill > 0 else 20 for skill in table["test_skill"].to_pylist()]
    history = run.history().to_pandas().pivot(index="step", columns="task", values="skill")
    assert data["history"]["skill"]["p50"] == pytest.approx(history.median(axis=1).tolist(), rel=1e-4)
    assert data["curve"]["loss"] == pytest.approx([1 / step for step in range(20, 220, 20)], rel=1e-4)
    median = next(item for item in data["headline"] if item["label"] == "median test skill")
    low, high = map(float, median["note"].split(" to "))
    assert low < float(median["value"]) < high
    assert dict(data["facts"])["Time of training"] == "1 min 15 s"


def test_each_task_has_the_metric_that_is_usual_for_its_kind(report):
    run, data = report[0][0], read(report[1])[0]["runs"][0]
    table = run.per_task().to_pandas()
    assert data["usual"] == {"binary": "ROC-AUC", "multiclass": "accuracy", "regression": "R²", "poisson": "R²"}
    metric = {"ROC-AUC": "test_roc_auc", "accuracy": "test_accuracy", "R²": "test_r2"}
    expected = [row[metric[data["usual"][row["kind"]]]] for _, row in table.iterrows()]
    assert data["tasks"]["usual"] == pytest.approx(expected, rel=1e-4)
    assert [v is None for v in data["tasks"]["mae"]] == table["test_mae"].isna().tolist()


def test_a_metric_that_is_shown_is_not_shown_again(tmp_path):
    run = make_run(tmp_path / "run", kinds=[Regression()], select={"metric": "r2"})
    data = run_data(run, "run", "test", 5)
    assert data["metrics"] == ["skill", "r2"]
    assert "usual" not in data["tasks"]


def test_a_family_without_a_label_in_the_part_has_no_usual_metric(tmp_path):
    run = make_run(tmp_path / "run")
    table = run.per_task()
    run.save_table("per_task.parquet", table.drop_columns(["test_roc_auc"]))
    tasks = run_data(run, "run", "test", 5)["tasks"]
    assert {kind for kind, value in zip(tasks["kind"], tasks["usual"], strict=True) if value is None} == {"binary"}


def test_notes_about_tasks_are_in_the_headline_and_those_about_inputs_with_the_data(tmp_path):
    run = make_run(tmp_path / "run")
    notes = ["filled: a (1 of 9)", "filled: b (2 of 9)", "3 of 8 tasks have no splits: x", "1 tasks have no label: y", "odd"]
    run.save_json("summary.json", run.load_json("summary.json") | {"notes": notes})
    data = run_data(run, "run", "test", 5)
    assert data["notes"] == notes[2:4]
    assert data["data_notes"] == ["filled: a (1 of 9); b (2 of 9)", "odd"]


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ((0.28039, 0.091225), ["0.2804", "0.0912"]),
        ((287684.06, 77.5), ["287,684", "78"]),
        ((0.0,), ["0.000"]),
        ((-1.5,), ["-1.500"]),
    ],
)
def test_numbers_of_one_metric_have_the_same_decimals(tmp_path, values, written):
    run = make_run(tmp_path / "run")
    summary = run.load_json("summary.json")
    summary["test"]["skill"] |= {"mean": None, "median": values[0], "worst_decile": values[1] if len(values) > 1 else None}
    run.save_json("summary.json", summary)
    headline = run_data(run, "run", "test", 5)["headline"]
    assert [item["value"] for item in headline if "skill" in item["label"]] == written
    low, high = (bound.partition(".")[2] for bound in headline[0]["note"].split(" to "))
    assert len(low) == len(high) == len(written[0].partition(".")[2])


def test_affinity_is_in_the_order_of_its_groups(report):
    import base64

    run, data = report[0][0], read(report[1])[0]["runs"][0]["affinity"]
    levels = np.frombuffer(base64.b64decode(data["cells"]), np.int8).reshape(12, 12)
    pairs = pa.parquet.read_table(run.path / "affinity.parquet").to_pylist()
    for pair in pairs:
        i, j = data["tasks"].index(pair["task_a"]), data["tasks"].index(pair["task_b"])
        assert levels[i, j] == levels[j, i] == round(127 * float(np.clip(pair["affinity"], -1, 1)))
    assert read(report[1])[0]["runs"][1]["affinity"] is None


def test_a_large_matrix_of_affinities_is_averaged(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", affinity=True)
    whole = run_data(run, "run", "test", 5)["affinity"]
    monkeypatch.setattr("mtrain.report.html.CELLS", 5)
    small = run_data(run, "run", "test", 5)["affinity"]
    assert (small["side"], small["each"]) == (4, 3)
    import base64

    large, few = (np.frombuffer(base64.b64decode(found["cells"]), np.int8).astype(float) for found in (whole, small))
    np.testing.assert_allclose(few.reshape(4, 4), large.reshape(4, 3, 4, 3).mean((1, 3)), atol=1)


def test_a_run_over_several_splits_shows_means(tmp_path):
    run = make_run(tmp_path / "run", split={"seeds": [0, 1]})
    splits = [make_run(one.path, seed=seed) for seed, one in enumerate(run.splits())]
    for name in ("predictions-test.parquet", "history.parquet", "metrics.jsonl"):
        (run.path / name).unlink()
    run.save_averages(run.load_json("summary.json") | {"split_hash": ["0123456789ab"] * 2})
    data = run_data(run, "run", "test", 40)
    skills = [one.per_task()["test_skill"].to_numpy() for one in splits]
    assert data["splits"] == 2
    assert data["tasks"]["skill"] == pytest.approx(np.mean(skills, 0), rel=1e-4)
    assert all(low <= high for low, high in zip(data["tasks"]["skill_low"], data["tasks"]["skill_high"], strict=True))
    histories = [one.history().to_pandas().query("step == 200")["skill"].to_numpy() for one in splits]
    assert data["history"]["skill"]["p50"][-1] == pytest.approx(np.median(np.mean(histories, 0)), rel=1e-4)


def test_a_run_without_predictions_or_history_is_shown_without_intervals(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for name in ("predictions-test.parquet", "history.parquet", "metrics.jsonl"):
        (run.path / name).unlink()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run.path), "-o", str(tmp_path / "report.html")])
    assert stop.value.code == 0
    assert "without intervals" in capsys.readouterr().out
    data = read(tmp_path / "report.html")[0]["runs"][0]
    assert data["history"] is None
    assert "skill_low" not in data["tasks"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "run nowhere: holds no config.yaml"),
        (["run", "run"], "a run is named twice"),
        (["run", "-o", "report.pdf"], "--output report.pdf: expected a name that ends in .html"),
        (["run", "-o", "no/folder/report.html"], "--output no/folder/report.html: no folder no/folder; make it first"),
        (["run", "-o", "folder.html"], "--output folder.html: is a directory, expected the name of a file"),
        (["run", "--resamples", "0"], "--resamples 0: expected at least 2"),
        (["unfinished"], "run unfinished: holds no summary.json"),
    ],
)
def test_mistakes_end_in_one_line(arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    unfinished = make_run(tmp_path / "unfinished")
    (unfinished.path / "summary.json").unlink()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mtrain: {line}")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "unfinished", "folder.html"}


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for where in ("x", "y"):
        make_run(tmp_path / where / "run")
    write_report([tmp_path / "x" / "run", tmp_path / "y" / "run"], tmp_path / "report.html", resamples=5)
    assert [run["name"] for run in read(tmp_path / "report.html")[0]["runs"]] == ["x/run", "y/run"]
