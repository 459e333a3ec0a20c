"""Training is reproducible, survives interruption, and never sees a test problem."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from longthink.reasoner.task import split_of
from longthink.reasoner.vocabulary import TOKENS
from tools.train_reasoner.architecture import MAX_TOKENS
from tools.train_reasoner.batches import BRIEF_LINE, CHECKED_LINE, IGNORE, KINDS, draw_batch
from tools.train_reasoner.checkpoint import load_checkpoint
from tools.train_reasoner.config import TrainConfig
from tools.train_reasoner.initial import BASIS, embedding_map
from tools.train_reasoner.trainer import _Run, export_run, train


def metrics(out):
    """Records of a run without the timings."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def tensors(out):
    _, state, saved = load_checkpoint(out)
    return state, saved


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    (state, saved), (other_state, other_saved) = tensors(one), tensors(other)
    assert replace(state, seconds=0) == replace(other_state, seconds=0)
    assert saved.keys() == other_saved.keys()
    for name, value in saved.items():
        assert torch.equal(value, other_saved[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_config):
    out = tmp_path_factory.mktemp("run")
    return out, train(tiny_config, out=out)


@pytest.mark.slow
def test_a_run_learns_and_exports_a_model(finished, tiny_config):
    out, result = finished
    records = metrics(out)
    assert result.tokens >= tiny_config.tokens and result.steps == tensors(out)[0].step
    assert records[-1]["loss"] < 6, "a guess among all words has log(642) = 6.46"
    assert [record["step"] for record in records] == [*range(20, result.steps + 1, 20)]
    model = Qwen2ForCausalLM.from_pretrained(result.model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(result.model)
    inputs = tokenizer("bee: 47 cat: 08 cow= bee +cat ? cow #", return_tensors="pt")
    assert (
        model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1]
        <= inputs["input_ids"].shape[1] + 4
    )
    assert json.loads((result.model / "training.json").read_text())["config"] == tiny_config.to_dict()
    assert not [path for path in out.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}]


def test_problems_get_longer_only_when_every_kind_of_token_is_right(tiny_config, tmp_path):
    run = _Run(replace(tiny_config, promote_at=0.97), tmp_path)
    batch = next(b for b, ops in (draw_batch(tiny_config, step, 4) for step in range(9)) if ops == 4)
    one_kind_wrong = torch.where(batch.kinds == KINDS.index("operand"), 0, batch.targets)
    for _ in range(50):
        run._measure(batch, one_kind_wrong)
    assert (run.state.longest, run.state.accuracy["operand"], run.state.accuracy["head"]) == (4, 0.0, 1.0)
    needed = 0
    while run.state.longest == 4 and needed < 200:
        run._measure(batch, batch.targets)
        needed += 1
    # It forgets the wrong ones smoothly: (31 / 32) ** n < 0.03 takes 111 batches.
    assert (run.state.longest, run.state.measured, needed) == (6, 0, 111)
    for _ in range(100):
        run._measure(batch, batch.targets)
    assert run.state.longest == tiny_config.last_ops == 6


def test_learning_rate_warms_up_holds_and_falls_to_zero(tiny_config, tmp_path):
    run = _Run(replace(tiny_config, tokens=1000, decay_share=0.25), tmp_path)
    rates = []
    for step, tokens in ((0, 0), (4, 100), (9, 750), (12, 875), (13, 999)):
        run.state.step, run.state.tokens = step, tokens
        rates.append(run._learning_rate() / tiny_config.learning_rate)
    assert rates == pytest.approx([0.2, 1, 1, 0.5, 0.004])


@pytest.mark.slow
def test_finished_run_is_left_alone(finished, tiny_config):
    out, result = finished
    before = metrics(out)
    assert train(tiny_config, out=out) == result
    assert metrics(out) == before


@pytest.mark.slow
def test_a_second_run_goes_on_with_the_weights_of_the_first(finished, tiny_config, tmp_path):
    first, _ = finished
    config = replace(tiny_config, learning_rate=0.0, weight_decay=0.0, tokens=1500)
    train(config, out=tmp_path / "second", start=first)
    state, saved = tensors(tmp_path / "second")
    for name, value in tensors(first)[1].items():
        if "/" not in name:
            assert torch.equal(saved[name], value), "without a learning rate nothing changes"
    assert state.tokens < 3000 and [stage["config"] for stage in state.before] == [tiny_config.to_dict()]
    assert state.before[0]["run"]["tokens"] >= tiny_config.tokens
    training = json.loads((tmp_path / "second" / "model" / "training.json").read_text())
    assert training["run"]["before"][0]["config"] == tiny_config.to_dict()
    train(config, out=tmp_path / "of model", start=first / "model")
    again_state, again = tensors(tmp_path / "of model")
    assert again_state.before == state.before
    for name, value in saved.items():
        if "/" not in name and name != BASIS:
            assert torch.equal(again[name], value), name
    assert torch.allclose(embedding_map() @ again[BASIS], embedding_map() @ saved[BASIS], atol=1e-5)
    with pytest.raises(ValueError, match="holds no checkpoint: allowed is the folder of a training run"):
        train(config, out=tmp_path / "third", start=tmp_path / "nothing")


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(finished, tiny_config, tmp_path):
    steps = []

    def interrupt(record):
        steps.append(record["step"])
        os.kill(os.getpid(), signal.SIGINT)

    usual = signal.getsignal(signal.SIGINT)
    result = train(tiny_config, out=tmp_path, report=interrupt)
    assert result.model is None and result.steps == steps[0] == 20
    assert signal.getsignal(signal.SIGINT) is usual
    while result.model is None:
        result = train(tiny_config, out=tmp_path, report=interrupt)
    assert steps == [record["step"] for record in metrics(finished[0])]
    assert_same_run(finished[0], tmp_path)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(finished, tiny_config, tmp_path):
    """A kill loses the steps since the last checkpoint, and nothing else; half a log line does no harm."""

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 40:
            with (tmp_path / "metrics.jsonl").open("a") as log:
                log.write('{"step": 4')
            raise Killed

    with pytest.raises(Killed):
        train(tiny_config, out=tmp_path, report=kill)
    assert tensors(tmp_path)[0].step == 20
    train(tiny_config, out=tmp_path)
    assert_same_run(finished[0], tmp_path)


@pytest.mark.slow
def test_checkpoint_survives_an_interrupted_swap(finished, tiny_config, tmp_path):
    train(replace(tiny_config, tokens=3000), out=tmp_path)
    before = tensors(tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    after = tensors(tmp_path)
    assert before[0] == after[0] and before[0].step > 0


def test_second_interrupt_is_not_swallowed(tiny_config, tmp_path):
    def interrupt_twice(record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, out=tmp_path, report=interrupt_twice)


def test_training_runs_in_a_thread(tiny_config, tmp_path):
    """Signal handlers can only be set in the main thread."""
    results = []
    worker = threading.Thread(
        target=lambda: results.append(train(replace(tiny_config, tokens=2000), out=tmp_path))
    )
    worker.start()
    worker.join()
    assert results[0].model is not None


def test_settings_of_a_run_cannot_change(finished, tiny_config):
    with pytest.raises(ValueError, match=r"learning_rate=0.5.*allowed is .*learning_rate=0.003"):
        train(replace(tiny_config, learning_rate=0.5), out=finished[0])


def test_export_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_run(tmp_path)


def test_exported_weights_are_the_trained_ones(finished, tmp_path):
    out, result = finished
    state = Qwen2ForCausalLM.from_pretrained(result.model).state_dict()
    saved = tensors(out)[1]
    assert torch.equal(state["model.layers.1.mlp.up_proj.weight"], saved["model.layers.1.mlp.up_proj.weight"])
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.slow
def test_seed_changes_the_run(tiny_config, tmp_path):
    losses = []
    for seed in (0, 1):
        train(replace(tiny_config, tokens=11_000, seed=seed), out=tmp_path / str(seed))
        losses.append(metrics(tmp_path / str(seed))[0]["loss"])
    assert losses[0] != losses[1]


# Batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_no_test_problem():
    config, seen = TrainConfig(batch_tokens=1024), 0
    for step in range(60):
        batch, ops = draw_batch(config, step, longest=6)
        for row in batch.ids.tolist() if ops else []:
            words = [TOKENS[i] for i in row[1:]]
            end = next(i for i, word in enumerate(words) if word in ("#", "#check"))
            # The line breaks of the prompt, put back: facts, rules, query and mode.
            lines, i = [], 0
            while i <= end:
                step_ = 3 if words[i].endswith("=") else 1 if i == end else 2
                lines.append(" ".join(words[i : i + step_]))
                i += step_
            assert split_of("\n".join(lines)) == "train"
            seen += 1
    assert seen > 100


def test_targets_are_the_next_tokens_of_the_chain_of_thought_only():
    for step in range(20):
        batch, ops = draw_batch(TrainConfig(batch_tokens=512), step, longest=5)
        wanted = batch.targets != IGNORE
        assert torch.equal(batch.targets[:, :-1][wanted[:, :-1]], batch.ids[:, 1:][wanted[:, :-1]])
        if ops:
            for row, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
                start = next(i for i, token in enumerate(row) if TOKENS[token] in ("#", "#check"))
                assert all(target == IGNORE for target in targets[:start])
                thought = [target for target in targets if target != IGNORE]
                assert TOKENS[thought[0]].endswith("=") and TOKENS[thought[-1]] == "</s>"
                assert targets.index(thought[0]) == start


def test_a_conversation_asks_several_problems_and_each_answer_is_a_target():
    turns, gaps, begun = set(), 0, set()
    for step in range(12):
        batch, ops = draw_batch(TrainConfig(batch_tokens=512, turns_share=1.0), step, longest=78)
        assert ops == 0, "its accuracy says nothing about the longest problems"
        for row, positions, targets, kinds in zip(*map(Tensor.tolist, vars(batch).values()), strict=True):
            asked = [i for i, token in enumerate(row) if TOKENS[token] in ("#", "#check")]
            ended = [i for i, token in enumerate(targets) if TOKENS[max(token, 0)] == "</s>"]
            assert len(asked) == len(ended) and all(i < j for i, j in zip(asked, ended, strict=True))
            starts = [0, *(i + 2 for i in ended[:-1])]
            for start, question, end in zip(starts, asked, ended, strict=True):
                assert targets[start:question] == [IGNORE] * (question - start)
                assert targets[question : end + 1] == row[question + 1 : end + 2]
                assert KINDS[kinds[question]] == "head"
                gaps += positions[question + 1] != positions[question] + 1
                assert positions[start : question + 1] == [
                    *range(positions[start], positions[start] + question + 1 - start)
                ]
            begun |= {TOKENS[row[start]] == "<s>" for start in starts[1:]}
            assert positions[-1] < MAX_TOKENS
            turns.add(len(asked))
    assert turns == {2, 3} and gaps and begun == {True, False}


def test_half_of_the_thoughts_stand_a_gap_behind_their_prompt():
    gaps = []
    for step in range(20):
        batch, _ = draw_batch(TrainConfig(batch_tokens=512), step, longest=5)
        for row, positions in zip(batch.ids.tolist(), batch.positions, strict=True):
            start = 1 + next(i for i, token in enumerate(row) if TOKENS[token] in ("#", "#check"))
            there = torch.arange(len(row))
            gap = int(positions[start]) - start
            assert torch.equal(positions, torch.where(there < start, there, there + gap))
            assert int(positions[-1]) < MAX_TOKENS
            gaps.append(gap)
    assert 0.35 < sum(gap == 0 for gap in gaps) / len(gaps) < 0.65
    assert max(gaps) > 3000 and min(gaps) == 0


def test_kinds_name_the_tokens_they_should():
    assert (len(BRIEF_LINE), len(CHECKED_LINE)) == (22, 38)
    seen = set()
    for step in range(20):
        batch, _ = draw_batch(TrainConfig(batch_tokens=512), step, longest=5)
        for number, kind in enumerate(KINDS):
            for token in batch.targets[batch.kinds == number].tolist():
                word = TOKENS[token]
                seen.add(kind)
                if kind == "head":
                    assert word.endswith("=") and len(word) > 1
                elif kind == "operand":
                    assert word.strip("+-").isalpha()
                elif kind == "value":
                    assert len(word) == 2 and word.isdigit()
                elif kind == "result":
                    assert word.endswith(":") or (len(word) == 2 and word.isdigit())
    assert seen == set(KINDS)


def test_a_batch_depends_on_nothing_but_its_step():
    config = TrainConfig()
    one, _ = draw_batch(config, 7, longest=9)
    draw_batch(config, 8, longest=9)
    again, _ = draw_batch(config, 7, longest=9)
    assert torch.equal(one.ids, again.ids) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.ids[:1, :40], draw_batch(config, 8, longest=9)[0].ids[:1, :40])


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, ["tokens=0", ">= 1"]),
        ({"learning_rate": 2.0}, ["learning_rate=2.0", "0 to 1"]),
        ({"promote_at": -0.1}, ["promote_at=-0.1", "0 to 1"]),
        ({"first_ops": 1}, ["first_ops=1", "2 to 96"]),
        ({"first_ops": 40, "last_ops": 20}, ["last_ops=20", "40 to 96"]),
        ({"kv_heads": 3}, ["kv_heads=3", "heads=4"]),
        ({"hidden": 100}, ["hidden=100", "64"]),
        ({"layers": 1}, ["layers=1", "2 to 64"]),
        ({"compile": 1}, ["compile=", "True, False"]),
        ({"seed": True}, ["seed=True", "integer"]),
    ],
)
def test_bad_settings_are_named(change, words):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
