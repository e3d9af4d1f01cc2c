import pyarrow.parquet as pq
import pytest
from small_runs import table, trained


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the table and two runs on it, `run` and `other`; `new.parquet` holds rows without labels."""
    folder = tmp_path_factory.mktemp("ship")
    pq.write_table(table(400), folder / "table.parquet")
    pq.write_table(table(150, seed=1).select(["id", "colour", "x0", "x1", "x2", "x3"]), folder / "new.parquet")
    trained(folder, "run")
    trained(folder, "other", "--train.seed", "1")
    return folder
