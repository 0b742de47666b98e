"""The quickstart: a small mixture of experts with a hash-lookup memory on packaged English text, on two CPU cores."""

from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig
from sparse_lm.data.tokenizer import BPE
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.row_optimizer import RowAdagrad
from sparse_lm.model.attention import Attention
from sparse_lm.model.transformer import Model
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.metrics import LogConfig
from sparse_lm.train.muon import Muon
from sparse_lm.train.schedule import WarmupStableDecay
from sparse_lm.train.step import Train
from sparse_lm.train.validation import Validation


def quickstart() -> Recipe:
    """A sparse language model in minutes: 8 experts of which a token takes 2, and tables of n-grams of which it reads 6 rows.

    Command: make quickstart
    """
    return Recipe(
        name="quickstart",
        data=DataConfig(
            # Twelve windows of documentation to one of speeches: its forms repeat, so more of it is worth more.
            sources=(Packaged(api_docs=False), Packaged(speeches=False, weight=12.0)),
            tokenizer=BPE(vocab_size=4096),
            sequence_length=128,
            batch_size=16,
        ),
        model=Model(
            vocab_size=4096,
            d_model=128,
            layers=2,
            attention=Attention(heads=2, head_dim=64),
            pattern=(MoEFeedForward(experts=8, hidden=128, router=TopKRouter(k=2)),),
            memory=Engram(
                at=(1,),
                orders=(2, 3, 4),
                heads=2,
                width=64,
                rows=131_072,
                optimizer=RowAdagrad(learning_rate=20.0),
            ),
            tied_embeddings=True,
        ),
        optimizer=Muon(
            learning_rate=0.02,
            precision="float32",
            iterations=3,
            schedule=WarmupStableDecay(warmup_steps=40, decay_fraction=0.5),
        ),
        train=Train(steps=900),
        validation=Validation(every=450, tokens_per_domain=8192, overlap=80),
        checkpoint=Checkpoints(every=450),
        log=LogConfig(log_every=20),
    )


RECIPES = (quickstart,)
