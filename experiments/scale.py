"""Recipes for thousands of chips: planned by compiling ahead of time, not run. Each docstring says what the planner found."""

import dataclasses
from typing import Any

from experiments.dense import dense_1b
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.model.attention import Attention
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter


def _sized(name: str, mesh: MeshShape, batch_size: int, **model: Any) -> Recipe:
    base = dense_1b()
    shape = dataclasses.replace(base.model, execution="scanned", remat="block", **model)
    data = dataclasses.replace(base.data, sequence_length=4096, batch_size=batch_size)
    return dataclasses.replace(base, name=name, model=shape, data=data, mesh=mesh)


def dense_7b() -> Recipe:
    """A dense model of 7 B parameters, one sequence of 4096 tokens on each of 512 chips.

    Command: python scripts/plan.py dense_7b --topology v5p:8x8x8
    """
    return _sized(
        "dense_7b",
        MeshShape(data=-1, fsdp=64),
        512,
        d_model=4096,
        layers=32,
        attention=Attention(heads=32, kv_heads=8, head_dim=128, qk_norm=False),
        pattern=(DenseFeedForward(hidden=14336),),
    )


def moe_8x22b() -> Recipe:
    """A mixture of 8 experts of the shape of Mixtral 8x22B (top-2, 56 layers of width 6144), one sequence on each of 4096 chips.

    Command: python scripts/plan.py moe_8x22b --topology v5p:16x16x16
    """
    return _sized(
        "moe_8x22b",
        MeshShape(data=-1, fsdp=64, expert=8, allow_split_physical_axes=True),
        4096,
        d_model=6144,
        layers=56,
        attention=Attention(heads=48, kv_heads=8, head_dim=128, qk_norm=False),
        pattern=(MoEFeedForward(experts=8, hidden=16384, receive_factor=2.0, router=TopKRouter(k=2)),),
    )


def moe_v3() -> Recipe:
    """A mixture of the shape of DeepSeek-V3 (arXiv 2412.19437) with grouped-query attention in place of its latent attention.

    61 layers of width 7168, the first 3 dense; then 256 experts of 2048, 8 of them and one shared expert for each token; sigmoid
    scores with a selection bias. One sequence on each of 4096 chips.

    Command: python scripts/plan.py moe_v3 --topology v5p:16x16x16
    """
    router = TopKRouter(k=8, scores="sigmoid", scale=2.5, bias_rate=1e-3, balance_coefficient=1e-4, z_coefficient=0.0)
    return _sized(
        "moe_v3",
        MeshShape(data=-1, fsdp=64, expert=64, allow_split_physical_axes=True),
        4096,
        vocab_size=129280,
        d_model=7168,
        layers=61,
        attention=Attention(heads=128, kv_heads=16, head_dim=128, qk_norm=False),
        leading=(DenseFeedForward(hidden=18432),) * 3,
        pattern=(MoEFeedForward(experts=256, hidden=2048, shared_hidden=2048, receive_factor=1.5, router=router),),
    )


RECIPES = (dense_7b, moe_8x22b, moe_v3)
