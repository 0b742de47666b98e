"""A population of small models: seeds with learning rates, trained at once on one device."""

import dataclasses

from experiments.quickstart import quickstart
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.memory.memory import NoMemory
from sparse_lm.model.attention import Attention
from sparse_lm.recipe import Recipe
from sparse_lm.train.optimizer import AdamW
from sparse_lm.train.population import Population
from sparse_lm.train.schedule import WarmupStableDecay


def population_small() -> Recipe:
    """Eight dense models of 6 M parameters: four seeds at two learning rates, on the quickstart's data in the same order.

    1024 tokens a member and step: there one H100 takes 3.96 ms for all eight and 1.83 ms for one (2.2x; docs/benchmarks/training.md).

    Command: python scripts/pretrain.py population_small
    """
    base = quickstart()
    model = dataclasses.replace(
        base.model,
        d_model=256,
        layers=6,
        attention=Attention(heads=3, head_dim=64),
        pattern=(DenseFeedForward(hidden=704),),
        memory=NoMemory(),
        compute_dtype="bfloat16",
    )
    optimizer = AdamW(learning_rate=4e-3, schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.5))
    population = Population(seeds=(0, 1, 2, 3), learning_rate_multipliers=(0.5, 1.0))
    data = dataclasses.replace(base.data, sequence_length=256, batch_size=4)
    return dataclasses.replace(
        base, name="population_small", model=model, data=data, optimizer=optimizer, population=population
    )


RECIPES = (population_small,)
