"""What all processes must decide alike while they train, decided on the devices: every process sees the same count at the same step.

A vote rides behind each step and is read one step late, with the step's own numbers, so nobody waits for it. It carries whether this
process was asked to stop, and the most documents in a row of the batch that comes two steps later, on which the choice of the
compiled step depends.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Vote(NamedTuple):
    """The outcome of a vote.

    Attributes:
      stop: whether any process was asked to stop.
      documents: most documents in a row over all processes.
    """

    stop: bool
    documents: int


class Ballot:
    """Votes over the processes of a mesh.

    Args:
      mesh: the run's devices.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._shape = (mesh.size, 2)

        def most(votes: jax.Array, after: jax.Array) -> jax.Array:
            return jnp.max(votes, axis=0)

        # `after` orders the vote behind the step whose number it is: two programs with collectives must not overlap.
        self._most = jax.jit(most, out_shardings=NamedSharding(mesh, P()), keep_unused=True)

    def cast(self, stop: bool, documents: int, after: jax.Array) -> jax.Array | Vote:
        """Starts a vote behind the step that computes `after`; all processes must call it."""
        if self._alone:
            return Vote(stop, documents)
        row = np.array([[int(stop), documents]], np.int32)
        votes = jax.make_array_from_callback(self._shape, self._sharding, lambda _: row)
        return self._most(votes, after)

    @staticmethod
    def read(vote: jax.Array | Vote) -> Vote:
        """Returns the outcome; waits for the step it rides behind."""
        if isinstance(vote, Vote):
            return vote
        stop, documents = np.asarray(vote).tolist()
        return Vote(bool(stop), documents)
