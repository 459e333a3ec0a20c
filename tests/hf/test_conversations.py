"""Conversations of any kind: turns, padding, early ends, saved, loaded and copied caches, rows that change places.

A turn may be read in chunks, under `torch.inference_mode`, and be cut short by an exception. With an ample budget the
tokens are those of transformers on the whole text; with a tight one the bound holds, what the user wrote stays, and
no position is held twice; with a fixed one a question that does not fit leaves the cache as it was.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import longthink
from longthink.hf.generation import CHUNKS_LATER_TURNS
from tests.examples import few, some
from tests.models import PAD, build

ENDS = [5, 9, 14, 23, 31, 42, 58, 66, 77]
"""End tokens: so many that rows often end early."""
PINNING = (
    "raas:page_size=4",
    "milestone:page_size=4:young=8",
    "recency",
    "random:page_size=4",
    "h2o:pin_prompt=True",
)
MODEL = build("qwen2", num_hidden_layers=1)


SIZES = st.lists(st.integers(1, 9), min_size=3, max_size=3)


class Interruption(Exception):
    """Comes from a logits processor, as Ctrl-C would: between two tokens."""


class Conversation(RuleBasedStateMachine):
    """Up to three rows that talk on one cache."""

    policies: tuple[str, ...]
    limit: Mapping[str, int]

    @initialize(policy=st.integers(0, 99), seed=st.integers(0, 99))
    def begin(self, policy, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.policy = self.policies[policy % len(self.policies)]
        self.cache = longthink.make_cache(MODEL, policy=self.policy, **self.limit)
        self.text = torch.zeros(2, 0, dtype=torch.int64)
        self.mask = self.text.clone()
        # Logical positions that the user wrote, row by row.
        self.written = [set(), set()]
        self.say([3, 6], tokens=4, chunk=None, inference=False, last=None)

    @rule(
        sizes=SIZES,
        tokens=st.integers(1, 24),
        chunk=st.sampled_from([None, None, 1, 4] if CHUNKS_LATER_TURNS else [None]),
        inference=st.booleans(),
        last=st.sampled_from([None, None, 1, 5]),
    )
    def say(self, sizes, tokens, chunk, inference, last):
        """A question of so many tokens to each row, left-padded, and answers, of which each may end early.

        After the `last` token comes an exception.
        """
        sizes = sizes[: len(self.text)]
        # A single column on a cache is a decode step, which nothing tells from a question of one token.
        width = max(2, *sizes)
        question = torch.randint(3, 90, (len(sizes), width), generator=self.random)
        real = torch.tensor([[int(i >= width - n) for i in range(width)] for n in sizes])
        written = [set(positions) for positions in self.written]
        for row, count in enumerate(sizes):
            start = int(self.mask[row].sum())
            # The last token of an answer comes to the cache with the next question, unless an exception came before.
            behind = int(self.text.shape[1] > self.cache.columns and self.mask[row, -1])
            written[row] |= set(range(start - behind, start + count))
        text = torch.cat([self.text, torch.where(real > 0, question, PAD)], 1)
        mask = torch.cat([self.mask, real], 1)
        options = dict(
            attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=ENDS, pad_token_id=PAD
        )
        out = self.answer(text, options, chunk, inference, last)
        if out is None:
            return
        self.text, self.written = text, written
        self.check(out, options)
        new = out[:, text.shape[1] :]
        ended = torch.isin(new, torch.tensor(ENDS)).cumsum(1)
        # What follows the first end token is padding, and the next mask says so.
        after_end = (ended - torch.isin(new, torch.tensor(ENDS)).long()) > 0
        self.text, self.mask = out, torch.cat([mask, (~after_end).long()], 1)

    def answer(self, text, options, chunk, inference, last):
        """The whole text with the answers so far, or None if the question does not fit."""
        seen = []

        def interrupt(ids, scores):
            seen.append(ids)
            if last is not None and len(seen) > last:
                raise Interruption
            return scores

        generate = MODEL.generate if chunk is None else longthink.generate
        given = (text,) if chunk is None else (MODEL, text)
        more = {} if chunk is None else {"prefill_chunk_size": chunk}
        try:
            with self.cache, torch.inference_mode(inference):
                out = generate(
                    *given, past_key_values=self.cache, logits_processor=[interrupt], **options, **more
                )
        except Interruption:
            out = seen[-1]
        except longthink.BudgetError:
            return self.not_fitting()
        return out.clone()

    def not_fitting(self):
        raise

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache.safetensors")
            self.cache.close()
            self.cache = longthink.load_cache(MODEL, Path(folder) / "cache.safetensors")

    @rule()
    def copy(self):
        self.cache, old = copy.deepcopy(self.cache), self.cache
        old.close()

    @rule(rows=st.sampled_from([(1, 0), (0, 0), (1, 1), (0,), (1,), (1, 0, 1), (2, 0)]))
    def change_rows(self, rows):
        rows = [row % len(self.text) for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows))
        self.text, self.mask = self.text[rows], self.mask[rows]
        self.written = [set(self.written[row]) for row in rows]

    def held(self):
        """Positions by row and KV head, each once and none beyond the text, with what the user wrote."""
        seen = [int(n) for n in self.cache.layers[0].slots.length_B]
        for row, heads in enumerate(self.cache.resident_positions(0)):
            for held in heads:
                assert held == sorted(set(held)) and (not held or held[-1] < seen[row])
                assert self.written[row] <= set(held), self.policy
                yield row, held

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()


class Ample(Conversation):
    policies = (*PINNING, "streaming_llm:positions=logical", "h2o", "quest")
    limit = MappingProxyType({"decode_budget": 2048})

    def check(self, out, options):
        expected = MODEL.generate(self.text, **options)
        assert torch.equal(out, expected[:, : out.shape[1]]), self.policy
        assert self.cache.num_evicted == 0


class Tight(Conversation):
    policies = PINNING
    limit = MappingProxyType({"decode_budget": 16})

    def check(self, out, options):
        size = self.cache.policy.page_size
        for row, held in self.held():
            pages = {position // size for position in self.written[row]}
            cap = self.cache.layers[0].slots.rows.caps[row]
            assert cap == len(pages) + self.limit["decode_budget"] // size
            assert len(held) <= cap * size


class Fixed(Conversation):
    policies = PINNING
    limit = MappingProxyType({"budget": 32})

    def contents(self):
        return self.cache.columns, self.cache.resident_positions(0), self.cache.num_evicted

    def answer(self, *args):
        self.before = self.contents()
        return super().answer(*args)

    def not_fitting(self):
        assert self.contents() == self.before

    def check(self, out, options):
        for _, held in self.held():
            assert len(held) <= self.limit["budget"]


MACHINES = pytest.mark.parametrize("machine", [Ample, Tight, Fixed])


@MACHINES
def test_a_few_conversations(machine):
    run_state_machine_as_test(machine, settings=few(4, stateful_step_count=8))


@pytest.mark.slow
@MACHINES
def test_any_conversation(machine):
    run_state_machine_as_test(machine, settings=some(20, stateful_step_count=10))
