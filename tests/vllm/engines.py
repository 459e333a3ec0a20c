"""Models and engines for the identity tests: tokens from vLLM, and from the same cache on Hugging Face."""

import contextlib
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from longthink.hf import generate
from tests.vllm.conftest import SIZES, random_model

PAGE = 16
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def save_random_model(folder):
    """Save a random model that does not repeat itself and whose top logits are further apart than rounding errors."""
    model = random_model(Qwen2Config(**SIZES, vocab_size=273), 3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def random_prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


@contextlib.contextmanager
def engine(folder, policy=None, decode_budget=128, *, pages=512, options=None, **more):
    """An engine in this process with a pool of about `pages` pages; dense if there is no policy."""
    heads, dim, layers = (SIZES[name] for name in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    arguments = dict(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=8,
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=PAGE if policy else 2 * PAGE,
        kv_cache_memory_bytes=pages * PAGE * 2 * heads * dim * 4 * layers,
        seed=0,
    )
    if policy:
        longthink = {"policy": policy, "decode_budget": decode_budget, **(options or {})}
        arguments |= dict(attention_backend="CUSTOM", additional_config={"longthink": longthink})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        from vllm import LLM

        llm = LLM(**arguments | more)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


class NullStream:
    """Replaces CUDA streams and events."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def allow_async_scheduling(patch):
    """Allow async scheduling (a step is scheduled before the last one has tokens), which vLLM turns off on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    inner = CpuPlatform.check_and_update_config

    def check(cls, config):
        wanted = config.scheduler_config.async_scheduling
        inner(config)
        config.scheduler_config.async_scheduling = wanted

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
    for name in ("Stream", "Event", "current_stream"):
        patch.setattr(torch.cuda, name, NullStream)
    patch.setattr(torch.cuda, "stream", contextlib.nullcontext)


def greedy(counts, *, ignore_eos=True, extra_args=None):
    """Sampling parameters of requests that get so many tokens."""
    from vllm import SamplingParams

    options = dict(temperature=0, ignore_eos=ignore_eos, detokenize=False)
    extra_args = extra_args or [None] * len(counts)
    return [
        SamplingParams(max_tokens=count, extra_args=extra, **options)
        for count, extra in zip(counts, extra_args, strict=True)
    ]


def serve(llm, prompts, counts, **options):
    """Greedy tokens of each prompt; `counts` is their number, one for all or one for each."""
    counts = [counts] * len(prompts) if isinstance(counts, int) else counts
    sampling = greedy(counts, **options)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(done.outputs[0].token_ids) for done in llm.generate(requests, sampling, use_tqdm=False)]


def on_hugging_face(folder, policy, decode_budget, prompt, count):
    """Greedy tokens with the same cache on Hugging Face."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    budget = {} if policy == "dense" else {"decode_budget": decode_budget}
    whole = generate(
        model,
        torch.tensor([prompt]),
        policy=policy,
        compile=False,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **budget,
    )
    return whole[0, len(prompt) :].tolist()


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def serve_and_preempt(llm, prompts, count, at, **options):
    """Greedy tokens of each prompt, with all running requests preempted after the given steps."""
    inner, done, steps = llm.llm_engine, {}, 0
    sampling = greedy([count] * len(prompts), **options)
    for name, prompt in enumerate(prompts):
        inner.add_request(str(name), {"prompt_token_ids": prompt}, sampling[name])
    while inner.has_unfinished_requests():
        for output in inner.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps in at:
            assert inner.reset_prefix_cache(reset_running_requests=True)
    return [done[str(name)] for name in range(len(prompts))]
