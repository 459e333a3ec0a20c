"""Decode time of two checkouts side by side: a worker process for each, which decode blocks of steps in turns.

    python scripts/compare_checkouts.py CHECKOUT_A CHECKOUT_B [--rounds 15] [--steps 64] [--models S2,S8]
        [--policies raas,milestone] [--context 16384] [--out speed.json]

Of each case: median CPU ms/token of each, quartiles, and the ratio B / A (median of the ratios of the rounds, with
its quartiles). Run it with the virtual environment's python and nothing beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median, quantiles

KV_HEADS = {"S2": 2, "S8": 8}  # bench.peers.plan.MODELS
PROMPT, BUDGET = 128, 1024
THREADS = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "MKL_NUM_THREADS": "1",
}


# One checkout ------------------------------------------------------------------------------------------------------


def make_model(kv_heads: int):
    """What `longthink.lab.bench.models.bench_model` makes of random:layers=8,hidden=512,heads=8,...,head_dim=64."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=kv_heads, head_dim=64, max_position_embeddings=1 << 20,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(torch.float32).eval()


class Case:
    def __init__(self, model, policy: str, context: int) -> None:
        import torch

        import longthink
        from longthink.cache.forward import fast_forward
        from longthink.hf import DecodeStep

        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(1024, (1, PROMPT), generator=drawn)
        cache = longthink.make_cache(model, policy=policy, budget=BUDGET)
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            seed = torch.Generator().manual_seed(context)
            for layer in cache.layers:
                fast_forward(layer.slots, context - PROMPT, heads=8, generator=seed)
        self.token = logits[:, -1:].argmax(-1)
        self.step = DecodeStep(model, cache, compile=True)
        self.cache = cache  # stays open: closing gives the model its own attention back
        self.tokens: list[int] = []

    def decode(self, steps: int) -> float:
        """CPU ms per token."""
        started, chosen = time.process_time(), []
        for _ in range(steps):
            self.token = self.step(self.token).argmax(-1, keepdim=True)
            chosen.append(self.token)
        ms = 1000 * (time.process_time() - started) / steps
        self.tokens += [int(token) for token in chosen]
        return ms


def work() -> None:
    """Answer the parent: a line of JSON for a line of JSON."""
    replies, sys.stdout = sys.stdout, sys.stderr
    import torch

    import longthink

    torch.set_num_threads(1)
    models, cases = {}, {}
    for line in sys.stdin:
        ask = json.loads(line)
        case = f"{ask['model']}/{ask['policy']}" if "model" in ask else None
        if ask["do"] == "open":
            if ask["model"] not in models:
                models[ask["model"]] = make_model(KV_HEADS[ask["model"]])
            cases[case] = Case(models[ask["model"]], ask["policy"], ask["context"])
            first = cases[case].decode(1)  # opens a page: both programs are compiled here
            cases[case].decode(ask["steps"] - 1)
            reply = {"file": longthink.__file__, "compiled": cases[case].step.compiled, "compile_ms": first}
        elif ask["do"] == "decode":
            reply = {"ms": cases[case].decode(ask["steps"])}
        else:
            kept = cases[case].cache
            reply = {
                "tokens": cases[case].tokens,
                "kv_bytes": kept.kv_bytes,
                "metadata_bytes": kept.metadata_bytes,
            }
        print(json.dumps(reply), file=replies, flush=True)


# Both --------------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, checkout: str) -> None:
        self.checkout = os.path.abspath(checkout)
        path = f"{self.checkout}/src:{self.checkout}"
        env = (
            os.environ | THREADS | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        )
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=self.checkout,
        )  # fmt: skip

    def send(self, **ask) -> None:
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            # A negative status is the signal that ended it.
            raise SystemExit(
                f"the worker of {self.checkout} ended with status {self.process.wait()}: see above"
            )
        return json.loads(line)

    def ask(self, **ask) -> dict:
        self.send(**ask)
        return self.receive()


def quartiles(values: list[float]) -> list[float]:
    return [round(q, 4) for q in quantiles(values, n=4, method="inclusive")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("a", help="checkout")
    add("b", help="checkout")
    add("--rounds", type=int, default=15)
    add("--steps", type=int, default=64, help="steps of a block: a multiple of 16, whole pages")
    add("--models", default="S2,S8")
    add("--policies", default="raas,milestone")
    add("--context", type=int, default=16384)
    add("--out", default="speed.json")
    args = parser.parse_args()
    if args.steps % 16:
        parser.error(f"--steps {args.steps} must be a multiple of 16: blocks cover whole pages")
    return args


def get_ready(workers: list[Worker], model: str, policy: str, args: argparse.Namespace) -> None:
    """Compile in both at the same time."""
    for worker in workers:
        worker.send(do="open", model=model, policy=policy, context=args.context, steps=args.steps)
    for worker in workers:
        told = worker.receive()
        assert told["file"].startswith(f"{worker.checkout}/src/"), told["file"]
        assert told["compiled"], f"{worker.checkout}: {model}/{policy} is not compiled"


def compare(workers: list[Worker], model: str, policy: str, args: argparse.Namespace) -> dict:
    """Decode in turns, and say what each took."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(args.rounds + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            ms = workers[i].ask(do="decode", model=model, policy=policy, steps=args.steps)["ms"]
            if turn:  # the first block of each warms it up
                times[i].append(ms)
    ends = [worker.ask(do="close", model=model, policy=policy) for worker in workers]
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return {
        "a_ms": round(median(times[0]), 4),
        "b_ms": round(median(times[1]), 4),
        "ratio": round(median(ratios), 4),
        "a_quartiles": quartiles(times[0]),
        "b_quartiles": quartiles(times[1]),
        "ratio_quartiles": quartiles(ratios),
        "same_tokens": ends[0]["tokens"] == ends[1]["tokens"],
        "bytes": [[end["kv_bytes"], end["metadata_bytes"]] for end in ends],
        "rounds": times,
    }


def main() -> None:
    args, found = arguments(), {}
    workers = [Worker(args.a), Worker(args.b)]
    cases = [(model, policy) for model in args.models.split(",") for policy in args.policies.split(",")]
    for model, policy in cases:
        get_ready(workers, model, policy, args)
        print(f"# {model}/{policy} is compiled", file=sys.stderr)
    for model, policy in cases:
        one = found[f"{model}/{policy}"] = compare(workers, model, policy, args)
        print(
            f"{model}/{policy}: A {one['a_ms']:.3f} ms/token, B {one['b_ms']:.3f}, B/A {one['ratio']:.3f} "
            f"{one['ratio_quartiles']}, same tokens: {one['same_tokens']}",
            flush=True,
        )
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()
    with open(args.out, "w") as file:
        json.dump({**vars(args), "cases": found}, file)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()
