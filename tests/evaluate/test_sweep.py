"""Sweeps in this process and in others, whole, interrupted and with workers that die."""

import psutil
import pytest
import torch

from longthink.errors import SweepError
from longthink.hf import generate
from longthink.lab.evaluate.solver import Solver
from longthink.lab.evaluate.summary import majority_is_right, summarize
from longthink.lab.evaluate.tasks import prompt_ids
from longthink.lab.work.workers import run_work
from tests.evaluate.sweeps import made, raw_keys, short_sweep

SOLVER = "longthink.lab.evaluate.solver"


def run(sweep, **options):
    run_work(sweep, **options)
    return sweep


def counts(sweep):
    return sweep.total.stored, sweep.total.made


def workers():
    """The worker processes of this one, zombies included."""
    return [p for p in psutil.Process().children() if p.status() == "zombie" or SOLVER in p.cmdline()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The short sweep, made in one go."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    sweep = short_sweep(folder)
    run_work(sweep)
    assert sweep.total.made == 10
    return folder


@pytest.mark.slow
def test_samples_are_those_of_generate_and_say_what_was_measured(whole):
    sweep = short_sweep(whole)
    solver = Solver(sweep.plan)
    sweep.begin(solver.identity)
    assert sweep.is_complete
    model, tokenizer = solver.loaded.model, solver.loaded.tokenizer
    rows = {row["problem"]: row for row in sweep.store.query("SELECT * FROM samples")}
    assert len(rows) == 10
    (task,) = sweep.tasks
    for item in task.items:
        row = rows[item.id]
        ids = torch.tensor([prompt_ids(item, tokenizer)])
        out = generate(
            model, ids, policy="recency", budget=96, max_new_tokens=80, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        new = out.sequences[0, ids.shape[1] :].tolist()
        assert row["text"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (row["prompt_tokens"], row["generated_tokens"]) == (ids.shape[1], len(new))
        assert (row["evicted"], row["dense_kv_bytes"]) == (
            out.past_key_values.num_evicted, out.past_key_values.dense_kv_bytes,
        )  # fmt: skip
        assert row["kv_bytes_peak"] == out.past_key_values.kv_bytes
        assert row["correct"] == (row["answer"] == item.gold == row["gold"])
        assert row["finish"] == ("stop" if new[-1] == tokenizer.eos_token_id else "length")
        assert 1 <= row["rows"] <= 2
        assert row["config"] == sweep.configs[0]
    assert all(row["evicted"] > 0 for row in rows.values())


@pytest.mark.slow
def test_what_is_done_is_never_done_again(whole):
    before = raw_keys(whole)
    assert set(before.values()) == {1}
    sweep = short_sweep(whole)
    assert counts(run(sweep)) == (10, 0)
    assert raw_keys(whole) == before
    more = short_sweep(whole, count=12)
    assert counts(run(more)) == (10, 2)
    assert set(raw_keys(whole).values()) == {1}


@pytest.mark.slow
def test_every_sample_is_stored_before_the_next_is_reported(tmp_path):
    class Stop(Exception):
        pass

    def stop_at(sweep):
        assert len(raw_keys(tmp_path / "store")) == sweep.total.made
        if sweep.total.made == 3:
            raise Stop

    sweep = short_sweep(tmp_path / "store", rows=3)
    sweep.report = stop_at
    with pytest.raises(Stop):
        run_work(sweep)
    sweep = short_sweep(tmp_path / "store", rows=1)
    assert counts(run(sweep)) == (3, 7)


@pytest.mark.slow
def test_samples_differ_from_each_other_and_come_again(tmp_path):
    """Sampling with another number of rows and after a resume gives the same text."""
    sampled = dict(temperature=4, samples=2, sampling_seeds="0,1", count=3, policies="dense", budgets="")
    first = short_sweep(tmp_path / "a", rows=4, **sampled)
    run_work(first)
    run_work(short_sweep(tmp_path / "b", rows=3, **sampled | {"count": 2}))
    again = short_sweep(tmp_path / "b", rows=1, **sampled)
    assert counts(run(again)) == (8, 4)
    assert made(tmp_path / "a") == made(tmp_path / "b")
    assert len({row["text"] for row in made(tmp_path / "a")}) == 12
    (row,) = summarize(first.store, first.configs)
    assert (row.problems, row.samples) == (3, 12)
    assert row.majority is not None


def test_prompts_that_do_not_fit_are_samples_too(tmp_path):
    sweep = short_sweep(tmp_path / "store", policies="recency,streaming_llm", budgets="40", count=2)
    assert run(sweep).total.made == 4
    pinned, trimmed = summarize(sweep.store, sweep.configs)
    assert (pinned.policy, pinned.no_room, pinned.accuracy, pinned.tokens) == ("recency", 2, 0, 0)
    assert (trimmed.policy, trimmed.no_room) == ("streaming_llm", 0)
    assert trimmed.tokens > 0


def test_prompts_beyond_the_context_of_the_model_too(tmp_path):
    sweep = short_sweep(tmp_path / "store", policies="dense", count=1)
    with Solver(sweep.plan) as solver:
        solver.loaded.model.config.max_position_embeddings = 40
        sweep.begin(solver.identity)
        cache = sweep.assign(0)
        unit = sweep.take(0)
        ((back, (sample,)),) = solver.solve(cache, [unit])
    assert back == unit
    assert (sample.finish, sample.generated_tokens, sample.correct) == ("no_room", 0, False)
    assert sample.prompt_tokens > 40


@pytest.mark.slow
def test_samples_of_a_killed_worker_go_to_the_others(tmp_path, whole):
    said = []
    sweep = short_sweep(tmp_path / "store", said=said, rows=2)

    def kill_one(sweep):
        if sweep.total.made == 2 and not sweep.lost_workers:
            workers()[0].kill()

    sweep.report = kill_one
    run_work(sweep, workers=2)
    assert (sweep.total.made, sweep.lost_workers) == (10, 1)
    assert made(tmp_path / "store") == made(whole)
    assert set(raw_keys(tmp_path / "store").values()) == {1}
    assert len(said) == 1 and "died (signal SIGKILL)" in said[0]
    assert not workers()


@pytest.mark.slow
def test_a_sweep_whose_workers_all_die_ends_and_keeps_what_there_is(tmp_path):
    sweep = short_sweep(tmp_path / "store", rows=2)

    def kill_all(sweep):
        if sweep.total.made == 1:
            for process in workers():
                process.kill()

    sweep.report = kill_all
    with pytest.raises(SweepError, match="all workers died"):
        run_work(sweep, workers=2)
    kept = len(raw_keys(tmp_path / "store"))
    assert kept >= 1
    sweep = short_sweep(tmp_path / "store")
    assert counts(run(sweep)) == (kept, 10 - kept)


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_error_of_the_sweep(tmp_path):
    sweep = short_sweep(tmp_path / "store", model=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="there is no such folder"):
        run_work(sweep, workers=2)
    assert not workers()


@pytest.mark.parametrize(
    ("votes", "right"),
    [
        ([("4", True)], True),
        ([("4", True), ("5", False)], True),
        ([("5", False), ("4", True)], False),
        ([("5", False), ("4", True), ("4.0", True)], True),
        ([("5", False), ("6", False), ("4", True)], False),
        ([(None, False), (None, False), ("4", True)], True),
        ([(None, False)], False),
    ],
)
def test_majority(votes, right):
    assert majority_is_right([{"answer": answer, "correct": correct} for answer, correct in votes]) is right
