"""Which process keeps which rows, and that their parts make the working set of one: by hand and with processes played by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.host_array import HostArray
from sparse_lm.memory.memory import host_rows
from sparse_lm.memory.owners import Owners, split
from sparse_lm.memory.placement import OnHost, most_rows
from sparse_lm.memory.row_optimizer import RowSGD
from sparse_lm.memory.table import TableSpec, look_up, update
from sparse_lm.memory.working_set import wanted_rows

STEP = tiny.jit(update, static_argnums=0)


@pytest.mark.parametrize(
    ("process", "axes", "processes", "pieces"),
    [
        ([[0, 0], [1, 1]], (0, 1), [[0], [1]], [[0, 1], [2, 3]]),
        ([[0, 1], [0, 1]], (0, 1), [[0], [1]], [[0, 2], [1, 3]]),
        ([[2, 2], [0, 0]], (0,), [[2], [0]], [[0], [1]]),  # in the order of the mesh; axis 1 keeps copies in a process
        ([[0, 1], [2, 3]], (0,), [[0, 1], [2, 3]], [[0], [1]]),  # axis 1 keeps copies in another process
        ([[0], [1]], (), [[0, 1]], [[0]]),
    ],
)
def test_owners_by_hand(process: list, axes: tuple, processes: list, pieces: list) -> None:
    found = split(np.array(process), axes, here=0)
    assert (found.processes_OK.tolist(), found.pieces_OM.tolist()) == (processes, pieces)
    assert 0 in found.processes_OK[found.own]


@pytest.mark.parametrize(
    ("process", "axes", "message"),
    [
        ([[0, 1], [1, 0]], (0, 1), "process 0 has devices that are no box"),
        ([[0, 0, 1]], (1,), r"processes hold pieces \[0\]: \[0, 1\], \[1\]: \[2\]"),
        ([[0, 2], [0, 1], [3, 1]], (0,), "processes hold pieces"),  # pieces 0 and 1, 1 and 2: piece 1 is in two parts
    ],
)
def test_uneven_meshes_are_refused(process: list, axes: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.memory\.placement = 'OnHost' .* OnDevice on a mesh .* {message}"):
        split(np.array(process), axes, here=0)


def test_places_and_rows_by_hand() -> None:
    """Two owners with pieces 0, 2 and 1, 3 of two rows each; the first has three of five distinct rows.

    Its rows fill piece 0 (places 0, 1) and begin piece 2 (place 4), those of the second fill piece 1 (2, 3); there is no place 8.
    """
    owners = Owners(np.array([[0], [1]]), np.array([[0, 2], [1, 3]]), own=1)
    starts = owners.starts(np.array([0, 4, 7, 8, 15]), 16)
    assert starts.tolist() == [0, 3, 5]
    assert owners.places(starts, 4).tolist() == [0, 1, 4, 2, 3, 8]
    assert owners.rows(16) == slice(8, 16)
    placement = OnHost(room=0.5)
    spec = Engram(at=(0,), heads=1, orders=(1,), width=4, rows=2000).tables()["0"]
    # 100 addresses: 50 of room, 25 at each of two owners, which two pieces make 26; all 100 may be one owner's.
    assert (placement.size(spec, 100, False, 2, 2), placement.size(spec, 100, True, 2, 2)) == (26, 100)


def test_the_most_rows_of_an_owner_by_hand() -> None:
    """Heads of 101, 103 and 107 rows, 512 in all, so 128 to each of four owners, and 60 tokens of three addresses.

    The first owner keeps all of head 0 and 27 rows of head 1: at most 60 + 27. The second has 76 of head 1 and 52 of head 2: 60 + 52.
    The third has the last 55 of head 2. One owner of all is asked for 3 * 60, and for 311 where every row may be read.
    """
    spec = TableSpec((101, 103, 107), 4, jnp.float32, RowSGD(), 0.0)
    assert spec.rows == 512
    assert [most_rows(spec, 180, owners) for owners in (4, 1)] == [112, 180]
    assert most_rows(spec, 3000, 1) == 311


def test_a_table_held_in_parts() -> None:
    whole = np.arange(12, dtype=np.float32).reshape(6, 2)
    part = HostArray(whole[3:].copy(), rows=6, first=3)
    assert part.shape == (6, 2) and not part.whole
    assert part.with_rows(10 * whole).values.tolist() == (10 * whole[3:]).tolist()
    with pytest.raises(AssertionError, match="other processes"):
        np.asarray(part)
    with pytest.raises(AssertionError, match="other processes"):
        part.readable()


@pytest.mark.parametrize("room", [0.9, 0.3])
def test_two_owners_make_the_working_set_of_one(room: float) -> None:
    """Each finds, fetches and writes back its own rows; the step sees both parts, and the table is that of one process."""
    placement = OnHost(room=room)
    memory = Engram(at=(0,), heads=2, width=8, rows=60, deviation=0.5, optimizer=RowSGD(), placement=placement)
    hashes, spec = memory.hashes(tiny.VOCABULARY, None), memory.tables()["0"]
    pieces_OM = np.array([[0, 2], [1, 3]])
    both = [Owners(np.array([[0], [1]]), pieces_OM, own) for own in range(2)]
    parts = [host_rows(memory, jax.random.key(3), owners)["rows"]["0"] for owners in both]
    table = jnp.array(host_rows(memory, jax.random.key(3))["rows"]["0"].values)
    assert [len(part.values) for part in parts] == [spec.rows // 2] * 2
    for number in range(3):
        batch = tiny.batch((10, 4), (9,), (16,), (3, 3, 3), vocabulary=8, seed=number)
        grads = jnp.asarray(np.random.default_rng(number).normal(size=(4, 16, 16)), jnp.float32)
        address = memory.addresses_on_host(hashes, batch["tokens_BL"], batch["segments_BL"], batch["positions_BL"])["0"]
        wanted = [wanted_rows(memory, hashes, batch, owners=owners) for owners in both]
        assert wanted[0].full == wanted[1].full == (room == 0.3)
        places, size = wanted[0].places["0"], wanted[0].sizes["0"]
        np.testing.assert_array_equal(places, wanted[1].places["0"])
        # Where each owner's rows are: its pieces, each of half of its rows.
        where = (pieces_OM[:, :, None] * (size // 2) + np.arange(size // 2)).reshape(2, size)
        rows = np.zeros((2 * size, 4), np.float32)
        for own in range(2):
            unique = wanted[own].unique["0"]
            rows[where[own][: len(unique)]] = parts[own].values[unique]
        assert (np.asarray(look_up(jnp.asarray(rows), places)) == np.asarray(look_up(table, address))).all()
        table, _ = STEP(spec, table, {}, address, grads, 0.01, number + 1)
        new, _ = STEP(spec, jnp.asarray(rows), {}, places, grads, 0.01, number + 1)
        for own in range(2):
            unique = wanted[own].unique["0"]
            parts[own].values[unique] = np.asarray(new)[where[own][: len(unique)]]
    tiny.assert_same({"": np.concatenate([part.values for part in parts])}, {"": table})
