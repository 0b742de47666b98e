"""The arms of the comparison of memories: models of equal active operations and, but for the dense one, equal parameters.

A model without idle parameters cannot have as many as a sparse one at equal operations. So `dense` is equal in operations alone, and
`dense_unigram`, a dense model whose idle parameters are rows of single tokens, stands for it at equal parameters.

The feed-forward of block 0 is dense in every arm, and pays for what memory layers and routers compute: its width makes the operations
of all arms equal. Blocks 1 and above are dense or routed. The rows of the tables make the parameters equal to those of `moe`.
"""

import dataclasses
from typing import Any, NamedTuple

from sparse_lm.accounting import Account, account
from sparse_lm.layers.feed_forward import DenseFeedForward, FeedForward
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.memory import Memory, NoMemory
from sparse_lm.memory.row_optimizer import RowOptimizer, TouchAdam
from sparse_lm.memory.variants import Shuffled, Unigram
from sparse_lm.model.attention import Attention
from sparse_lm.model.transformer import Model
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.top_k import TopKRouter

TOLERANCE = 0.02
"""Largest relative difference of operations and of parameters."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the models; widths are multiples of 128, which the Hopper kernels take."""

    vocabulary: int = 512
    length: int = 128
    d_model: int = 256
    layers: int = 4
    heads: int = 2
    experts: int = 16
    experts_beside_memory: int = 12
    """Experts of the routed arms with a memory, whose rows take the place of the others."""
    hidden: int = 256
    """Of an expert; a dense block has k times as many units."""
    k: int = 2
    first_hidden: int = 768
    """Of block 0 in the dense arm."""
    width: int = 64
    """Of what each order of n-grams looks up."""
    row_heads: int = 2
    dtype: str = "bfloat16"
    rows_optimizer: RowOptimizer = TouchAdam()
    execution: str = "unrolled"
    """Equal blocks one by one, or "scanned", as a loop."""


class Kind(NamedTuple):
    """What an arm is made of: routed blocks or dense ones, and which memory."""

    routed: bool
    memory: str | None = None


KINDS = {
    "dense": Kind(False),
    "dense_engram": Kind(False, "engram"),
    "moe": Kind(True),
    "moe_engram": Kind(True, "engram"),
    "dense_unigram": Kind(False, "unigram"),
    "dense_shuffled": Kind(False, "shuffled"),
    "moe_unigram": Kind(True, "unigram"),
    "moe_shuffled": Kind(True, "shuffled"),
}
"""In order of importance."""


def memory(sizes: Sizes, name: str | None, rows: int) -> Memory:
    """Returns the memory of an arm, before block 1; as many rows are looked up for a token whatever its kind.

    There is no short convolution: its dilation is the longest order, so that the control of single tokens would see neighbours that
    the others do not.
    """
    if name is None:
        return NoMemory()
    shared: dict[str, Any] = {"at": (1,), "rows": rows, "taps": 0, "optimizer": sizes.rows_optimizer}
    if name == "unigram":
        orders = len(Engram().orders)
        return Unigram(**shared, heads=orders * sizes.row_heads, width=orders * sizes.width)
    return (Shuffled if name == "shuffled" else Engram)(**shared, heads=sizes.row_heads, width=sizes.width)


def build(sizes: Sizes, kind: Kind, first_hidden: int, rows: int) -> Model:
    """Returns the model of an arm with this width of block 0 and so many rows a head."""
    experts = sizes.experts_beside_memory if kind.memory else sizes.experts
    block: FeedForward = DenseFeedForward(hidden=sizes.k * sizes.hidden)
    if kind.routed:
        block = MoEFeedForward(experts=experts, hidden=sizes.hidden, router=TopKRouter(k=sizes.k))
    head_dim = sizes.d_model // sizes.heads
    return Model(
        vocab_size=sizes.vocabulary,
        d_model=sizes.d_model,
        layers=sizes.layers,
        # The plain path serves any number of documents: one program for all batches.
        attention=Attention(heads=sizes.heads, head_dim=head_dim, backend="plain", max_documents=sizes.length),
        leading=(DenseFeedForward(hidden=first_hidden),),
        pattern=(block,),
        memory=memory(sizes, kind.memory, rows),
        tied_embeddings=True,
        execution=sizes.execution,  # type: ignore[arg-type]
        compute_dtype=sizes.dtype,  # type: ignore[arg-type]
    )


def models(sizes: Sizes) -> dict[str, Model]:
    """Returns the model of every arm, in order of importance.

    Raises:
      ValueError: sizes at which operations or parameters cannot be made equal to 2%.
    """
    few = 2  # rows of a head, where their number is not known yet
    operations = count(build(sizes, KINDS["dense"], sizes.first_hidden, few), sizes).forward_flops
    unit = 6.0 * sizes.d_model  # operations of one hidden unit of SwiGLU
    widths = {}
    for name, kind in KINDS.items():
        more = count(build(sizes, kind, sizes.first_hidden, few), sizes).forward_flops - operations
        widths[name] = sizes.first_hidden - 8 * round(more / unit / 8)
        if widths[name] < 8:
            raise ValueError(f"first_hidden = {sizes.first_hidden} cannot pay for what {name} computes; allowed: more")
    total = count(build(sizes, KINDS["moe"], widths["moe"], few), sizes).parameters
    out = {}
    for name, kind in KINDS.items():
        model = build(sizes, kind, widths[name], few)
        if kind.memory:
            (table,) = model.memory.tables().values()
            left = total - count(model, sizes).parameters + table.rows * table.width
            # Heads have their own ranges of rows: primes from the number that is asked for.
            model = build(sizes, kind, widths[name], max(few, left // (len(table.primes) * table.width)))
        out[name] = model
    check_equal(out, sizes)
    return out


def count(model: Model, sizes: Sizes) -> Account:
    """Returns the account of a model in this comparison."""
    return account(model, sizes.length)


def check_equal(found: dict[str, Model], sizes: Sizes) -> None:
    """Compares all arms with `moe`: operations, and parameters of all but `dense`.

    Raises:
      ValueError: a difference above 2%.
    """
    accounts = {name: count(model, sizes) for name, model in found.items()}
    base = accounts["moe"]
    for name, one in accounts.items():
        pairs = {"forward operations": (one.forward_flops, base.forward_flops)}
        if name != "dense":
            pairs["parameters"] = (one.parameters, base.parameters)
        for what, (own, of_base) in pairs.items():
            if abs(own / of_base - 1) > TOLERANCE:
                raise ValueError(f"{name} has {own:,.0f} {what}, moe {of_base:,.0f}; allowed: within {TOLERANCE:.0%}")


def numbers(model: Model, sizes: Sizes) -> dict[str, Any]:
    """Returns what a table says of an arm's size: parameters, those a token passes through, rows' share, training operations."""
    found = count(model, sizes)
    rows = sum(row.parameters for row in found.rows if row.component == "memory_rows")
    return {
        "parameters": found.parameters,
        "active_parameters": found.active_parameters,
        "row_parameters": rows,
        "flops_per_token": found.train_flops,
    }
