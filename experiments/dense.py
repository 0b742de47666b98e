"""Dense transformers for one GPU: the yardsticks that sparse models are measured against."""

import dataclasses

from sparse_lm.data.installed import Installed
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.tokenizer import BPE
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import Cosine
from sparse_lm.train.step import Train
from sparse_lm.train.validation import Validation


def dense_400m() -> Recipe:
    """A dense model of 0.4 B parameters on packaged text and what the machine has installed.

    Command: python scripts/pretrain.py dense_400m
    """
    return Recipe(
        name="dense_400m",
        data=DataConfig(
            sources=(Packaged(), Installed(weight=4.0)),
            tokenizer=BPE(vocab_size=32768),
            sequence_length=2048,
            batch_size=32,
        ),
        model=Model(
            vocab_size=32768,
            d_model=1024,
            layers=24,
            attention=Attention(heads=16, head_dim=64, qk_norm=False),
            pattern=(DenseFeedForward(hidden=2816),),
            compute_dtype="bfloat16",
        ),
        optimizer=AdamW(learning_rate=6e-4, weight_decay=0.1, schedule=Cosine(warmup_steps=200)),
        train=Train(steps=4000),
        validation=Validation(every=500, tokens_per_domain=131072),
        checkpoint=Checkpoints(every=500),
    )


def dense_1b() -> Recipe:
    """A dense model of 1.2 B parameters on the same data; 54.6% MFU in the whole loop on one H100 (docs/benchmarks/training.md).

    Command: python scripts/pretrain.py dense_1b
    """
    base = dense_400m()
    model = dataclasses.replace(
        base.model,
        d_model=2048,
        layers=20,
        attention=dataclasses.replace(base.model.attention, heads=16, head_dim=128),
        pattern=(DenseFeedForward(hidden=5632),),
    )
    optimizer = AdamW(learning_rate=3e-4, weight_decay=0.1, schedule=Cosine(warmup_steps=200))
    data = dataclasses.replace(base.data, batch_size=16)
    return dataclasses.replace(base, name="dense_1b", data=data, model=model, optimizer=optimizer)


RECIPES = (dense_400m, dense_1b)
