"""Plans, and the settings that they are made of."""

import dataclasses
import json

import pytest

from longthink.errors import BudgetError
from longthink.lab.cli.eval import DecodingFlags, ModelFlags, PolicyFlags, ProblemFlags, RunFlags, given
from longthink.lab.evaluate.plan import Plan, Unit
from longthink.lab.evaluate.settings import RUN_SETTINGS, SWEEP_SETTINGS, make_plan, read_settings
from longthink.lab.work.driver import Identity

GROUPS = (ProblemFlags, PolicyFlags, ModelFlags, DecodingFlags, RunFlags)
IDENTITY = Identity(revision=None, dtype="float32")


def cells_of(**values):
    plan, _ = make_plan(dict(tasks="reasoner/s", count=2) | values)
    return plan, [cell for cell, _ in plan.cells(plan.load_tasks())]


def test_every_policy_meets_every_budget_and_dense_runs_once():
    plan, cells = cells_of(policies="dense,raas,quest", budgets="64,128", decode_budgets="32")
    caches = [cell.cache for cell in cells if cell.task == "reasoner/s/chain"]
    assert [(cache.policy, cache.budget, cache.decode_budget) for cache in caches] == [
        ("dense", None, None),
        *((policy, *kept) for policy in ("raas", "quest") for kept in ((64, None), (128, None), (None, 32))),
    ]
    assert len(cells) == 4 * len(caches)
    assert len({plan.setup(cell, IDENTITY).config_hash for cell in cells}) == len(cells)


def test_seeds_reach_random_policies_and_what_has_no_randomness_runs_once():
    plan, cells = cells_of(
        tasks="reasoner/s/chain", policies="recency,random", budgets="64", sampling_seeds="3,4"
    )
    assert [(cell.policy, cell.seed, cell.cache.policy) for cell in cells] == [
        ("recency", 3, "recency"),
        ("random", 3, "random:seed=3"),
        ("random", 4, "random:seed=4"),
    ]
    assert json.loads(plan.setup(cells[1], IDENTITY).switches)["seed"] == 3
    _, sampled = cells_of(
        tasks="reasoner/s/chain", policies="recency", budgets="64", sampling_seeds="3,4", temperature=0.7
    )
    assert [cell.seed for cell in sampled] == [3, 4]


def test_a_number_counts_the_same_however_it_is_written():
    """Equal settings must give equal hashes, or a resumed sweep would start again."""
    plans = [cells_of(temperature=t, top_p=p, policies=q, budgets="64") for t, p, q in
             ((1, 1, "raas:r=0.50"), (1.0, 1.0, "raas"))]  # fmt: skip
    hashes = [[plan.setup(cell, IDENTITY).config_hash for cell in cells] for plan, cells in plans]
    assert hashes[0] == hashes[1]


def test_a_sample_draws_by_seed_task_problem_and_number_only():
    plan, _ = make_plan(dict(tasks="reasoner/s", count=2, temperature=1.0, samples=2, sampling_seeds="0,1"))
    keys = [
        Unit(cell, item, sample).key for cell, task in plan.cells(plan.load_tasks()) for item in task.items
        for sample in range(2)
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) == 4 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(policies="raas"), BudgetError, "policy 'raas' needs a budget"),
        (dict(policies="raas", budgets="16"), BudgetError, "budget=16 is too small .* allowed is >= 32"),
        (dict(policies="quest", budgets="8"), BudgetError, "allowed is >= 16"),
        (dict(policies="raas", budgets="x"), ValueError, "budgets='x' must be an integer"),
        (dict(policies="raas", budgets=[64.5]), ValueError, "budgets=64.5 must be an integer"),
        (dict(policies="nonsense"), ValueError, "unknown policy 'nonsense'"),
        (dict(policies="raas:q=1", budgets="64"), ValueError, "q"),
        (dict(policies=" , "), ValueError, "policies is empty"),
        (dict(samples=2), ValueError, "samples=2 needs a temperature"),
        (dict(samples=0), ValueError, "samples=0"),
        (dict(temperature=-1), ValueError, "temperature=-1"),
        (dict(temperature="hot"), ValueError, "temperature='hot' must be a number"),
        (dict(top_p=0.9), ValueError, "temperature above 0"),
        (dict(rows=0), ValueError, "rows=0"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens=0"),
        (dict(dtype="int8"), ValueError, "dtype='int8'"),
        (dict(sampling_seeds="-1"), ValueError, "sampling_seeds=-1"),
        (dict(model=3), ValueError, "model=3 must be a text"),
        (dict(count=True), ValueError, "count=True must be an integer"),
    ],
)
def test_refuses_what_makes_no_sense_before_anything_is_loaded(values, error, message):
    with pytest.raises(error, match=message):
        make_plan(values)


def test_every_flag_is_a_setting_of_a_file():
    names = {field.name for group in GROUPS for field in dataclasses.fields(group)} - {"config", "json"}
    only_in_files = {"revision", "choose", "sampling_seeds", "top_p", "top_k"}
    assert names.isdisjoint(only_in_files) and names | only_in_files == set(SWEEP_SETTINGS)
    assert set(SWEEP_SETTINGS) == {field.name for field in dataclasses.fields(Plan)} | RUN_SETTINGS.keys()


YAML = """
tasks: [reasoner/s/chain, reasoner/m]
policies:
  - dense
  - raas:used=alpha:alpha=0.3
budgets: [64, 128]
decode-budgets: 32
count: 5
temperature: 1
top_p: 0.9
samples: 4
sampling-seeds: 0, 1
out: somewhere
workers: 2
"""
TOML = """
tasks = "reasoner/s/chain,reasoner/m"
policies = ["dense", "raas:used=alpha:alpha=0.3"]
budgets = [64, 128]
decode_budgets = [32]
count = 5
temperature = 1.0
top-p = 0.9
samples = 4
sampling_seeds = [0, 1]
out = "somewhere"
workers = 2
"""


def test_file_and_flags_say_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "b.toml").write_text(TOML)
    flags = given(
        ProblemFlags(tasks="reasoner/s/chain,reasoner/m", count=5),
        PolicyFlags(policies="dense,raas:used=alpha:alpha=0.3", budgets="64,128", decode_budgets="32"),
        DecodingFlags(temperature=1.0, samples=4),
        RunFlags(out="somewhere", workers=2),
    )
    wanted = make_plan(flags | {"top_p": 0.9, "sampling_seeds": (0, 1)})
    assert wanted[1] == {"out": "somewhere", "workers": 2}
    assert make_plan(read_settings(tmp_path / "a.yaml")) == wanted
    assert make_plan(read_settings(tmp_path / "b.toml")) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "polices: dense", "a.yaml: unknown setting 'polices': did you mean 'policies'"),
        ("a.toml", "max-tokens = 3", "unknown setting 'max-tokens': did you mean 'max_new_tokens'"),
        ("a.yaml", "zzzzzz: 1", "unknown setting 'zzzzzz': known are model"),
        ("a.yaml", "- 1\n- 2", "must hold settings"),
        ("a.yaml", "a: [", "not YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]", "not YAML"),
        ("a.toml", "a = ", "a.toml: "),
        ("a.json", "{}", "must end in .yaml, .yml or .toml"),
    ],
)
def test_refuses_files_and_says_where(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(path)
