"""``longthink vllm-args``: how to start vLLM with a bounded cache."""

from __future__ import annotations

import shlex

from longthink.cli.options import Switch
from longthink.cli.terminal import write_json
from longthink.config import DEFAULT_POLICY


def vllm_args(
    *,
    decode_budget: int,
    policy: str = DEFAULT_POLICY,
    max_prompt_tokens: int | None = None,
    reserve: Switch = False,
    tp_sync: Switch = False,
    json: Switch = False,
) -> int:
    """Print what to add to `vllm serve MODEL` for a bounded cache.

    `vllm serve MODEL $(longthink vllm-args ...)` works as well.

    Parameters
    ----------
    decode_budget
        Tokens that a request keeps per layer on top of its prompt, which stays whole.
    policy
        What to keep, such as raas or milestone:keep=0.5.
    max_prompt_tokens
        Longest prompt to accept; the pool must hold it and the budget [default: the model's length].
    reserve
        Give a request all the pages that it can need when it starts, so that it is never preempted.
    tp_sync
        Let all ranks of tensor parallelism evict the same pages, as one rank alone would.
    json
        Print a JSON object instead: keyword arguments of `vllm.LLM`.
    """
    from longthink.policies import make_policy
    from longthink.vllm.config import KEY, PluginOptions

    options = PluginOptions(
        policy=policy,
        decode_budget=decode_budget,
        max_prompt_tokens=max_prompt_tokens,
        reserve=reserve,
        tp_sync=tp_sync,
    )
    block_size = make_policy(policy).page_size
    options.make_policy(block_size)
    if json:
        additional = options.to_additional_config()
        write_json({"block_size": block_size, "attention_backend": "CUSTOM", "additional_config": additional})
    else:
        words = ["--block-size", str(block_size), "--attention-backend", "CUSTOM"]
        for name, value in options.to_additional_config()[KEY].items():
            # vLLM reads options with dots: no braces and quotes that a shell would take for its own.
            words += [f"--additional-config.{KEY}.{name}", "true" if value is True else str(value)]
        print(shlex.join(words))
    return 0
