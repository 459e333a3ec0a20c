"""Training of the built-in model from scratch; one CPU thread is enough."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_reasoner import checkpoint
from tools.train_reasoner.architecture import EMBEDDING, forward, model_config, rope_table
from tools.train_reasoner.batches import IGNORE, KINDS, Batch, draw_batch
from tools.train_reasoner.card import plot_curve
from tools.train_reasoner.config import TrainConfig
from tools.train_reasoner.export import export_model
from tools.train_reasoner.initial import BASIS, embedding_map, initial_weights

LOG_EVERY = 20
METRICS = "metrics.jsonl"
# Accuracy must hold over this many batches of the longest length before problems get longer: a model promoted on a
# lucky streak fails at the next length, where it has fewer look-ups per token to learn from.
_WINDOW = 32

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The end of a call of `train`; ``model`` is the exported folder, None after an interrupt."""

    model: Path | None
    steps: int
    tokens: int
    seconds: float


def train(
    config: TrainConfig, *, out: Path | str, start: Path | str | None = None, report: Report | None = None
) -> TrainResult:
    """Train the model; the same call resumes an interrupted run.

    Parameters
    ----------
    config
        Settings; those of a resumed run must not change.
    out
        Folder of the run: ``checkpoint/``, ``metrics.jsonl`` and, at the end, the Qwen2 checkpoint ``model/`` and
        (with matplotlib installed) the loss curve ``loss.png``.
    start
        Folder of another run, or of a model that one has exported, with whose weights to start; by default
        `initial_weights`.
    report
        Called with each record of ``metrics.jsonl``.

    Returns
    -------
    TrainResult
        Ctrl-C (SIGINT) finishes the step, saves and returns ``model=None``; a second one interrupts immediately.

    Raises
    ------
    ValueError
        If ``out`` holds a run with other settings, or ``start`` holds no run.
    """
    out = Path(out)
    run = _Run(config, out, None if start is None else Path(start))
    _forget_after(out / METRICS, run.state.step)
    with _stop_on_interrupt() as stopped, (out / METRICS).open("a") as log:
        while run.state.tokens < config.tokens and not stopped.is_set():
            record = run.train_step()
            if record is not None:
                log.write(json.dumps(record) + "\n")
                log.flush()
                if report is not None:
                    report(record)
            if run.state.step % config.save_every == 0:
                run.save()
        run.save()
    model = None
    if run.state.tokens >= config.tokens:
        model = export_run(out)
        if find_spec("matplotlib") is not None:
            plot_curve(out / METRICS, out / "loss.png")
    return TrainResult(model=model, steps=run.state.step, tokens=run.state.tokens, seconds=run.state.seconds)


def export_run(out: Path | str) -> Path:
    """Write ``out/model``, a plain Qwen2 checkpoint, from the last checkpoint of a run, finished or not.

    Raises
    ------
    ValueError
        If ``out`` holds no checkpoint.
    """
    out = Path(out)
    config, state, tensors = checkpoint.require_checkpoint(out)
    weights = materialise({name: value for name, value in tensors.items() if "/" not in name})
    export_model(out / "model", config, weights, training=asdict(state))
    return out / "model"


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the records of steps after the last checkpoint of a killed run: those steps are repeated."""
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        # The last line may be cut off.
        whole = [line for line in lines if line.endswith("\n")]
        metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def materialise(masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under transformers' names, with the embedding computed from its basis."""
    weights = {name: master.detach() for name, master in masters.items() if name != BASIS}
    return {EMBEDDING: embedding_map() @ masters[BASIS].detach(), **weights}


class _Run:
    """The tensors and the state of a run.

    The forward and backward pass use bf16 copies (`weights`); their gradients go to the fp32 `masters`, which AdamW
    updates.
    """

    def __init__(self, config: TrainConfig, out: Path, start: Path | None = None) -> None:
        self.config, self.out = config, out
        shape = model_config(config)
        loaded = checkpoint.load_checkpoint(out)
        if loaded is not None and loaded[0] != config:
            raise ValueError(
                f"config={config!r} differs from that of the run in {str(out)!r}: allowed is {loaded[0]!r}"
            )
        out.mkdir(parents=True, exist_ok=True)
        fresh = initial_weights(shape, config.seed)
        tensors = fresh if loaded is None else loaded[2]
        self.state = checkpoint.State(longest=config.first_ops) if loaded is None else loaded[1]
        if start is not None and loaded is None:
            earlier, state, weights = checkpoint.weights_to_start_with(start)
            tensors = {name: weights[name] for name in fresh}
            done = asdict(state)
            self.state.before = [*done.pop("before"), {"config": earlier.to_dict(), "run": done}]
        # Always in one order: the gradient norm is a sum, and a resumed run must equal an uninterrupted one bitwise.
        self.masters = {name: torch.nn.Parameter(tensors[name]) for name in fresh}
        self.optimizer = _optimizer(config, self.masters)
        if loaded is not None:
            checkpoint.restore_optimizer(self.optimizer, self.masters, tensors)
        self.map = embedding_map()
        # Parameters rather than tensors: the compiler treats their shapes as constants and compiles once.
        self.weights = {k: torch.nn.Parameter(w.bfloat16()) for k, w in materialise(self.masters).items()}
        cos_LD, sin_LD = rope_table(shape.hidden_size // shape.num_attention_heads, torch.bfloat16)

        def loss_and_guess(
            weights: Mapping[str, Tensor], ids: Tensor, positions: Tensor, targets: Tensor
        ) -> tuple[Tensor, Tensor]:
            logits = forward(weights, shape, ids, positions, cos_LD, sin_LD).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
            return loss, logits.argmax(-1)

        compiled = torch.compile(loss_and_guess, dynamic=True) if config.compile else loss_and_guess
        self.loss_and_guess = compiled

    def save(self) -> None:
        tensors = {name: master.detach() for name, master in self.masters.items()}
        moments = checkpoint.optimizer_tensors(self.optimizer, self.masters)
        checkpoint.save_checkpoint(self.out, self.config, self.state, tensors | moments)

    def train_step(self) -> dict[str, Any] | None:
        """Train on one batch; return a record every `LOG_EVERY` steps."""
        started, state = time.perf_counter(), self.state
        batch, ops = draw_batch(self.config, state.step, state.longest)
        loss, guess = self.loss_and_guess(self.weights, batch.ids, batch.positions, batch.targets)
        loss.backward()
        rate = self._learning_rate()
        self._update(rate)
        if ops == state.longest:
            self._measure(batch, guess)
        state.step += 1
        state.tokens += batch.ids.numel()
        seconds = time.perf_counter() - started
        state.seconds += seconds
        if state.step % LOG_EVERY:
            return None
        return {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "tokens_per_second": round(batch.ids.numel() / seconds),
            "learning_rate": rate,
            "longest": state.longest,
            "ops": ops,
            "loss": loss.item(),
            "accuracy": {kind: round(value, 4) for kind, value in state.accuracy.items()},
        }

    def _learning_rate(self) -> float:
        """Linear warm-up, constant, and a linear decay to zero over the last `decay_share` of the tokens."""
        config = self.config
        warm = min(1.0, (self.state.step + 1) / max(1, config.warmup_steps))
        left = 1 - self.state.tokens / config.tokens
        return config.learning_rate * warm * min(1.0, left / max(config.decay_share, 1e-9))

    def _update(self, rate: float) -> None:
        for name, master in self.masters.items():
            if name == BASIS:
                master.grad = self.map.T @ _gradient(self.weights[EMBEDDING]).float()
            else:
                master.grad = _gradient(self.weights[name]).float()
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            for name, value in materialise(self.masters).items():
                self.weights[name].copy_(value)
                self.weights[name].grad = None

    def _measure(self, batch: Batch, guess: Tensor) -> None:
        """Track accuracy at the longest length; make problems longer when every kind of token is good enough."""
        state, right = self.state, guess == batch.targets
        for number, kind in enumerate(KINDS):
            share = right[batch.kinds == number].float().mean().item()
            old = state.accuracy[kind]
            # The mean of the first batches of a length, then a moving average.
            state.accuracy[kind] = old + (share - old) / min(state.measured + 1, _WINDOW)
        state.measured += 1
        enough = state.measured >= _WINDOW and min(state.accuracy.values()) > self.config.promote_at
        if enough and state.longest < self.config.last_ops:
            state.longest = min(self.config.last_ops, state.longest + max(2, state.longest // 2))
            state.measured = 0


def _optimizer(config: TrainConfig, masters: dict[str, torch.nn.Parameter]) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in masters.values() if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in masters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None  # every weight is used in every batch
    return weight.grad


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first SIGINT into an event; the second interrupts as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    usual = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, usual)
