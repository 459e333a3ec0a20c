"""``longthink vllm-args``: options that start vLLM with a bounded cache."""

import shlex

from longthink.cli.options import Switch
from longthink.cli.terminal import write_json
from longthink.config import DEFAULT_POLICY


def vllm_args(
    *,
    decode_budget: int, policy: str = DEFAULT_POLICY, max_prompt_tokens: int | None = None,
    reserve: Switch = False, tp_sync: Switch = False, json: Switch = False,
) -> int:  # fmt: skip
    """Print the options that give `vllm serve` a bounded cache.

    Use it as `vllm serve MODEL $(longthink vllm-args ...)`.

    Parameters
    ----------
    decode_budget
        Tokens that a request keeps in each layer on top of its whole prompt.
    policy
        Eviction policy, such as raas or milestone:keep=0.5.
    max_prompt_tokens
        Longest prompt to accept; the pool must hold it and the budget [default: the model's length].
    reserve
        Allocate all pages that a request can need when it is scheduled, so that it is never preempted.
    tp_sync
        Have all ranks of tensor parallelism evict the pages that a single rank would.
    json
        Print keyword arguments of `vllm.LLM` as a JSON object instead.
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
            # Dotted options, which vLLM accepts, need no quoting in a shell.
            words += [f"--additional-config.{KEY}.{name}", "true" if value is True else str(value)]
        print(shlex.join(words))
    return 0
