import pytest

from tools.train_reasoner.config import TrainConfig


@pytest.fixture(scope="session")
def tiny_config():
    """A run of some 50 steps that takes two seconds."""
    return TrainConfig(
        tokens=25_000,
        batch_tokens=512,
        learning_rate=3e-3,
        warmup_steps=5,
        last_ops=6,
        promote_at=0.0,
        layers=2,
        hidden=32,
        heads=2,
        kv_heads=1,
        mlp=48,
        compile=False,
        save_every=20,
    )
