"""``longthink report``: files from a store, and clear words where there is none."""

import pytest

from longthink.lab.results.store import ResultStore
from tests.results.making import make_sample


@pytest.mark.slow
def test_report_goes_into_the_store_unless_told(call, tmp_path):
    ResultStore(tmp_path / "store").add(make_sample(), make_sample(policy="raas", budget=64))
    code, out, err = call("report", tmp_path / "store")
    assert (code, out) == (0, f"{tmp_path}/store/report/report.html\n"), err
    text = (tmp_path / "store" / "report" / "report.html").read_text()
    assert "<h1>Report of store</h1>" in text
    assert f"longthink report {tmp_path}/store" in text
    code, out, _ = call(
        "report",
        tmp_path / "store",
        "--out",
        tmp_path / "o",
        "--title",
        "Mine",
        "--against",
        tmp_path / "store",
    )
    assert (code, out) == (0, f"{tmp_path}/o/report.html\n")
    assert "<h1>Mine</h1>" in (tmp_path / "o" / "report.html").read_text()
    # A report inside a store does not disturb the store.
    assert len(ResultStore(tmp_path / "store").query("SELECT * FROM samples")) == 2


def test_no_store_and_an_empty_one(call, tmp_path):
    code, out, err = call("report", tmp_path / "gone")
    assert (code, out) == (2, "")
    assert f"{tmp_path}/gone is not a result store" in err
    ResultStore(tmp_path / "empty")
    code, _, err = call("report", tmp_path / "empty")
    assert code == 2
    assert "is an empty result store: there is nothing to report" in err
