"""The quickstart: a small mixture of experts on packaged English text, on two CPU cores."""

from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.tokenizer import BPE
from sparse_lm.model.attention import Attention
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.metrics import LogConfig
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.train.step import Train
from sparse_lm.train.validation import Validation


def quickstart() -> Recipe:
    """A sparse language model of 8 experts in minutes.

    Command: make quickstart
    """
    return Recipe(
        name="quickstart",
        data=DataConfig(sources=(Packaged(),), tokenizer=BPE(vocab_size=4096), sequence_length=256, batch_size=8),
        model=Model(
            vocab_size=4096,
            d_model=192,
            layers=4,
            attention=Attention(heads=3, head_dim=64),
            pattern=(MoEFeedForward(experts=8, hidden=256, router=TopKRouter(k=2)),),
            tied_embeddings=True,
        ),
        optimizer=AdamW(learning_rate=4e-3, schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.5)),
        train=Train(steps=350),
        validation=Validation(every=175, tokens_per_domain=8192),
        checkpoint=Checkpoints(every=175),
        log=LogConfig(log_every=20),
    )


RECIPES = (quickstart,)
