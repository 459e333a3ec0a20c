"""``longthink demo`` with the built-in model."""

import json
import re
import sys

import matplotlib.image
import numpy as np
import pytest

pytest.importorskip("matplotlib")
SHORT = ("--size", "s", "--decode-budget", "64")


def is_picture(path, *, width=600, height=400):
    """A PNG of some size with many shades, not blank and not one flat colour."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] >= height
    assert pixels.shape[1] >= width
    colours = np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    return len(colours) > 20 and pixels[..., :3].std() > 0.1


@pytest.mark.slow
def test_tables_and_picture(call, tmp_path):
    png = tmp_path / "picture.png"
    code, out, err = call("demo", *SHORT, "--policies", "dense,raas,streaming_llm", "--png", png)
    assert code == 0
    assert "Traceback" not in err
    assert "chain of thought of 198" in out
    for name in ("dense", "raas", "streaming_llm"):
        assert (
            sum(line.strip().startswith(name) for line in out.splitlines()) >= 2
        )  # in the table and in a sentence
    assert "dense held everything and got the right answer." in out
    assert f"picture: {png}" in out
    assert "█" in out
    assert "┃ prompt" in out
    assert re.search(
        r"^took \d+ s: \d+ s to load, \d+ s to decode with 3 caches, .*\d+ s to draw$", out, re.MULTILINE
    )
    assert is_picture(png)


def check(record, workers, png):
    """What is told of a problem, and of dense, RaaS and StreamingLLM, in this order."""
    assert record["workers"] == workers
    assert list(record["seconds"]) == ["load", "decode", "draw"]
    assert record["picture"] == str(png)
    assert record["problem"]["seed"] == 3
    assert record["decode_budget"] == 64
    dense, raas, streaming, _ = record["runs"]
    assert dense["right"] and dense["answer"] == record["problem"]["answer"]
    assert dense["right_tokens"] == dense["tokens"] - 1 == 198  # and the end token
    assert dense["num_evicted"] == 0
    assert raas["policy"]["r"] == 0.25
    prompt = len(record["problem"]["prompt"].split()) + 1
    assert dense["residents"] == prompt + 198
    assert streaming["residents"] <= prompt + 64
    assert raas["residents"] <= prompt + 64 + 32
    assert 0 < raas["kv_bytes"] < raas["dense_kv_bytes"]
    for run in record["runs"]:
        assert run["early_ms"] > 0
        assert run["late_ms"] > 0
        # Right and wrong are what the text says, whatever the policy.
        assert run["right"] == (run["answer"] == record["problem"]["answer"] and run["right_tokens"] == 198)


@pytest.mark.slow
def test_any_number_of_workers_tells_the_same(call, start, tmp_path):
    """All but the times, and the picture to the bit."""
    told, drawn = [], []
    for workers in (1, 2):
        png = tmp_path / f"{workers}.png"
        given = ("--seed", 3, "--policies", "dense, raas:r=0.25,streaming_llm,recency", "--png", png)
        given += ("--workers", workers)
        if workers == 1:
            _, out, err = call("demo", *SHORT, *given, "--json")
        else:  # in this process the race would be over before a helper has started
            out, err = (
                text.decode() for text in start("demo", *SHORT, *given, "--json").communicate(timeout=300)
            )
        record = json.loads(out)
        assert "Traceback" not in err
        check(record, workers, png)
        for varying in ("workers", "seconds", "picture"):
            del record[varying]
        for run in record["runs"]:
            del run["early_ms"], run["late_ms"]
        told.append(record)
        drawn.append(png.read_bytes())
    assert told[0] == told[1]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_without_matplotlib_there_is_no_picture(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    png = tmp_path / "picture.png"
    code, out, err = call("demo", *SHORT, "--policies", "dense", "--png", png, "--json")
    assert code == 0
    assert json.loads(out)["picture"] is None
    assert not png.exists()
    assert "it needs matplotlib" in err


@pytest.mark.slow
def test_picture_that_cannot_be_written(call, tmp_path):
    code, _, err = call("demo", *SHORT, "--policies", "dense", "--png", tmp_path)
    assert code == 2
    assert str(tmp_path) in err
    assert "Traceback" not in err
