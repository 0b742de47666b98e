"""Sparse weights on the quickstart's text: a dense transformer and the same under masks, for two CPU cores or any GPU."""

import dataclasses

from experiments.quickstart import quickstart
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.memory.memory import NoMemory
from sparse_lm.recipe import Recipe
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.weight_sparsity.behind import AbsTopK
from sparse_lm.weight_sparsity.growth import RigL
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.schedules import LinearSparsity, Periodic


def masked_small() -> Recipe:
    """A transformer of 3 blocks, a fifth of its weights at any time, exchanged every 25 steps by RigL.

    Any other algorithm, structure, allocation and schedule by `--with` (docs/weight_sparsity.md), such as
    `--with sparse_algorithm=ste --with sparse_schedule=cubic`; the dense twin by `--with weight_sparsity=none`.

    Command: python scripts/pretrain.py masked_small
    """
    base = quickstart()
    model = dataclasses.replace(base.model, pattern=(DenseFeedForward(hidden=512),), memory=NoMemory())
    optimizer = AdamW(learning_rate=4e-3, schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.5))
    sparsity = Masked(density=0.2, algorithm=RigL(), schedule=Periodic(every=25))
    return dataclasses.replace(base, name="masked_small", model=model, optimizer=optimizer, weight_sparsity=sparsity)


def weight_sparse_small() -> Recipe:
    """The same model trained as the weight-sparse transformers of Gao et al. 2025 (arXiv 2511.13653), at density 1/16.

    Only the largest weights of every matrix, embedding and head included, are there after every step; the density falls linearly over
    the first half, the learning rate rises as 1 / sqrt(density), Adam's epsilon is 0.1 and the gradient is clipped to root mean square 1.

    Command: python scripts/pretrain.py weight_sparse_small
    """
    base = masked_small()
    model = dataclasses.replace(base.model, tied_embeddings=False)
    optimizer = AdamW(learning_rate=1e-2, epsilon=0.1, schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.5))
    sparsity = Masked(
        density=1 / 16,
        algorithm=AbsTopK(),
        schedule=LinearSparsity(every=1, begin=0.01, end=0.5),
        roles=("matrix", "embedding", "head"),
    )
    train = dataclasses.replace(base.train, clip_norm=None)
    return dataclasses.replace(
        base, name="weight_sparse_small", model=model, optimizer=optimizer, weight_sparsity=sparsity, train=train
    )


RECIPES = (masked_small, weight_sparse_small)
