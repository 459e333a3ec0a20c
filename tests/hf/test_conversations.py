"""Conversations of any kind: turns, padding, early ends, saved, loaded and copied caches, rows that change places.

With an ample budget the tokens are those of transformers on the whole text; with a tight one the bound holds, what
the user wrote stays, and no position is held twice.
"""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import longthink
from tests.examples import some
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


class Conversation(RuleBasedStateMachine):
    """Two rows that talk on one cache."""

    policies: tuple[str, ...]
    decode_budget: int

    @initialize(policy=st.integers(0, 99), seed=st.integers(0, 99))
    def begin(self, policy, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.policy = self.policies[policy % len(self.policies)]
        self.cache = longthink.make_cache(MODEL, policy=self.policy, decode_budget=self.decode_budget)
        self.text = torch.zeros(2, 0, dtype=torch.int64)
        self.mask = self.text.clone()
        # Logical positions that the user wrote, row by row.
        self.written = [set(), set()]
        self.say(3, 6, 4)

    @rule(first=st.integers(1, 9), second=st.integers(1, 9), tokens=st.integers(1, 24))
    def say(self, first, second, tokens):
        """A question of so many tokens to each row, left-padded, and answers of which each may end early."""
        width = max(first, second)
        question = torch.randint(3, 90, (2, width), generator=self.random)
        real = torch.tensor([[int(i >= width - n) for i in range(width)] for n in (first, second)])
        for row, count in enumerate((first, second)):
            start = int(self.mask[row].sum())
            # The last token of an answer comes to the cache with the next question.
            behind = int(self.text.shape[1] > 0 and self.mask[row, -1])
            self.written[row] |= set(range(start - behind, start + count))
        self.text = torch.cat([self.text, torch.where(real > 0, question, PAD)], 1)
        self.mask = torch.cat([self.mask, real], 1)
        options = dict(
            attention_mask=self.mask,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ENDS,
            pad_token_id=PAD,
        )
        out = MODEL.generate(self.text, past_key_values=self.cache, **options)
        self.check(out, options)
        new = out[:, self.text.shape[1] :]
        ended = torch.isin(new, torch.tensor(ENDS)).cumsum(1)
        # What follows the first end token is padding, and the next mask says so.
        after_end = (ended - torch.isin(new, torch.tensor(ENDS)).long()) > 0
        self.text, self.mask = out, torch.cat([self.mask, (~after_end).long()], 1)

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

    @rule(rows=st.sampled_from([(1, 0), (0, 0), (1, 1)]))
    def change_rows(self, rows):
        self.cache.batch_select_indices(torch.tensor(rows))
        self.text, self.mask = self.text[list(rows)], self.mask[list(rows)]
        self.written = [set(self.written[row]) for row in rows]

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()


class Ample(Conversation):
    policies = (*PINNING, "streaming_llm:positions=logical", "h2o", "quest")
    decode_budget = 2048

    def check(self, out, options):
        assert torch.equal(out, MODEL.generate(self.text, **options)), self.policy
        assert self.cache.num_evicted == 0


class Tight(Conversation):
    policies = PINNING
    decode_budget = 16

    def check(self, out, options):
        seen = [int(n) for n in self.cache.layers[0].slots.length_B]
        for row, heads in enumerate(self.cache.resident_positions(0)):
            for held in heads:
                assert held == sorted(set(held)) and (not held or held[-1] < seen[row])
                assert self.written[row] <= set(held), self.policy
                size = self.cache.policy.page_size
                pages = {position // size for position in self.written[row]}
                cap = self.cache.layers[0].slots.rows.caps[row]
                assert cap == len(pages) + self.decode_budget // size
                assert len(held) <= cap * size


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Ample, Tight])
def test_any_conversation(machine):
    run_state_machine_as_test(machine, settings=some(20, stateful_step_count=10))
