"""What a trained memory knows: loss with its rows and without, by how often an n-gram was seen, and how full its tables are.

Legend: B batch, L length, T valid tokens, H heads of a table.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.data.pipeline import train_stream, validation_batches
from sparse_lm.evaluate.load import Loaded
from sparse_lm.memory.hashing import Hash, addresses_on_host, suffixes
from sparse_lm.memory.ngram import NgramMemory
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.model.definition import for_documents
from sparse_lm.model.transformer import MEMORY
from sparse_lm.train.population import over_members
from sparse_lm.train.validation import MODEL_ARRAYS

SEEN_OFTEN = 4
"""Fewest tokens of an evaluated text after which an n-gram is listed by its mean gate."""
BUCKETS = (0, 1, 2, 4, 8, 16, 64, 256, 1024)
"""Smallest count of each bucket of n-gram frequency."""


def memory_of(loaded: Loaded) -> NgramMemory:
    """Returns the run's memory.

    Raises:
      ValueError: when the run has none.
    """
    memory = loaded.recipe.model.memory
    if not isinstance(memory, NgramMemory):
        raise ValueError(f"{loaded.directory} has no memory of n-grams to look at")
    return memory


def without_memory(loaded: Loaded) -> Loaded:
    """Returns the run as if no n-gram had been seen: tables without rows, of which every address reads zeros."""
    memory_of(loaded)
    tables = loaded.model_state["tables"]
    none = {name: np.zeros((*rows.shape[:-2], 0, rows.shape[-1]), rows.dtype) for name, rows in tables["rows"].items()}
    zeroed = {**tables, "rows": none}
    return dataclasses.replace(loaded, model_state={**loaded.model_state, "tables": zeroed})


def build_step(loaded: Loaded) -> Callable[[Any, Any, dict[str, np.ndarray]], tuple[Any, dict[str, Any]]]:
    """Builds (params, model_state, batch) -> (cross-entropy [B, L], {block: gate float32 [B, L]}), [P, B, L] each in a population."""

    @functools.cache
    def program(most_documents: int) -> Any:
        sized = for_documents(loaded.definition, most_documents)

        def run(params: Any, model_state: Any, batch: Any) -> Any:
            losses_BL, aux = sized.token_losses(params, model_state, batch)
            return losses_BL, {name.removeprefix(MEMORY): own["gate"] for name, own in aux.gates.items()}

        return jax.jit(over_members(run, loaded.population, (0, 0, None)))

    def step(params: Any, model_state: Any, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        most = loaded.definition.config.attention.max_documents
        found = program(documents_bucket(most, int(batch["segments_BL"].max())))
        return found(params, model_state, {name: jnp.asarray(batch[name]) for name in MODEL_ARRAYS})

    return step


def ngram_codes(hashing: Hash, batch: dict[str, np.ndarray], order: int) -> np.ndarray:
    """Returns one number for the n-gram that ends at each position, int64 [B, L]; different n-grams differ.

    Raises:
      ValueError: when n-grams of this order do not fit in 63 bits.
    """
    classes = int(hashing.classes_V.max()) + 2
    if classes**order >= 2**63:
        raise ValueError(
            f"order = {order}; allowed: orders whose n-grams of {classes} classes can be counted in 63 bits"
        )
    codes = np.zeros(batch["tokens_BL"].shape, np.int64)
    for k, classes_BL in enumerate(suffixes(hashing, batch["tokens_BL"], batch["segments_BL"], order, None)):
        inside = np.zeros(codes.shape, bool)
        inside[:, k:] = batch["segments_BL"][:, k:] == batch["segments_BL"][:, : codes.shape[1] - k]
        # Classes count from 1; what lies before the document is 0, so that the code tells it from the padding class.
        codes = codes * classes + np.where(inside, classes_BL + 1, 0)
    return codes


def training_batches(loaded: Loaded, most: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the first batches that the run trained on."""
    recipe = loaded.recipe
    stream = train_stream(loaded.dataset, recipe.data, seed=recipe.seed)
    for _, (batch, _) in zip(range(min(most, loaded.step)), stream):
        yield batch


def occupancy(loaded: Loaded, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Measures the tables on training batches.

    Returns:
      {table: {"rows", "touched" (fraction of all rows that are not zero), "batch_rows" (mean distinct rows of a batch),
      "batch_addresses" (addresses of a batch), "distinct_ngrams" (in these batches, counted exactly), "collisions" (fraction of
      them whose row, mean over heads, another one reads too), "expected_collisions" (of a uniform hash), "full_collisions"
      (fraction that shares the rows of all heads)}}; numbers of collisions are of the longest order.
    """
    memory, out = memory_of(loaded), {}
    hashes = loaded.definition.hashes()
    for table, spec in memory.tables().items():
        rows = np.asarray(loaded.model_state["tables"]["rows"][table])
        distinct, found, codes = [], [], []
        for batch in batches:
            salt = batch["positions_BL"] if memory.addressing == "shuffled" else None
            address = addresses_on_host(
                hashes[table], memory.orders, batch["tokens_BL"], batch["segments_BL"], salt_BL=salt
            )
            valid = batch["segments_BL"] > 0
            distinct.append(len(np.unique(address[valid])))
            found.append(address[valid][:, -memory.heads :])
            codes.append(ngram_codes(hashes[table], batch, memory.orders[-1])[valid])
        code, first = np.unique(np.concatenate(codes), return_index=True)
        address_NH = np.concatenate(found)[first]
        shared = [1 - _alone(address_NH[:, h]) for h in range(memory.heads)]
        primes = spec.primes[-memory.heads :]
        expected = [1 - (1 - 1 / p) ** (len(code) - 1) for p in primes]
        _, full = np.unique(address_NH, axis=0, return_counts=True)
        out[table] = {
            "rows": spec.addressed,
            "touched": float((rows.reshape(-1, *rows.shape[-2:])[0] != 0).any(axis=-1).sum() / spec.addressed),
            "batch_rows": float(np.mean(distinct)),
            "batch_addresses": int(np.mean([(b["segments_BL"] > 0).sum() for b in batches])) * len(spec.primes),
            "distinct_ngrams": len(code),
            "collisions": float(np.mean(shared)),
            "expected_collisions": float(np.mean(expected)),
            "full_collisions": float(full[full > 1].sum() / len(code)),
        }
    return out


def _alone(address_N: np.ndarray) -> float:
    """Returns the fraction of entries that no other entry equals."""
    _, counts = np.unique(address_N, return_counts=True)
    return float((counts == 1).sum() / len(address_N))


def by_frequency(
    loaded: Loaded, domain: str, seen: dict[int, int], *, batch_size: int, max_tokens: int | None, most: int = 20
) -> dict[str, Any]:
    """Evaluates one domain with the memory and with its rows zeroed, by how often the n-gram before each target was trained on.

    Args:
      loaded: a run with a memory.
      domain: one of the dataset's.
      seen: count of each n-gram of the longest order in training, by its code.
      batch_size: sequences in a batch.
      max_tokens: stop after so many tokens; None: all.
      most: n-grams listed.

    Returns:
      {"tokens", "loss", "loss_without", "buckets": [{"from", "tokens", "loss", "loss_without"}], "top": [{"text", "tokens",
      "gain"}], "top_gates": {block: [{"text", "tokens", "gate"}]}}: nats per token; top are the n-grams after which the memory gains most in
      all, top_gates those with the widest mean gate of a block among n-grams of `SEEN_OFTEN` tokens and more.
    """
    memory, zeroed = memory_of(loaded), without_memory(loaded)
    hashing = next(iter(loaded.definition.hashes().values()))
    step = build_step(loaded)
    losses: list[np.ndarray] = []
    bare: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    gates: dict[str, list[np.ndarray]] = {}
    texts: dict[int, np.ndarray] = {}
    order = memory.orders[-1]
    for batch in validation_batches(
        loaded.dataset, loaded.recipe.data, domain, batch_size=batch_size, max_tokens=max_tokens
    ):
        valid = batch["documents_BL"] >= 0

        def by_token(found: Any, valid: np.ndarray = valid) -> np.ndarray:
            return np.asarray(found, np.float64).reshape(-1, *valid.shape).mean(0)[valid]

        nats, gate = step(loaded.params, loaded.model_state, batch)
        losses.append(by_token(nats))
        bare.append(by_token(step(zeroed.params, zeroed.model_state, batch)[0]))
        for block, gate_BL in gate.items():
            gates.setdefault(block, []).append(by_token(gate_BL))
        code_BL = ngram_codes(hashing, batch, order)
        codes.append(code_BL[valid])
        for b, t in np.argwhere(valid):
            texts.setdefault(int(code_BL[b, t]), batch["tokens_BL"][b, max(0, t - order + 1) : t + 1])
    loss_T, bare_T, code_T = map(np.concatenate, (losses, bare, codes))
    count_T = np.array([seen.get(int(code), 0) for code in code_T])
    bucket_T = np.searchsorted(BUCKETS, count_T, side="right") - 1
    buckets = [
        {
            "from": low,
            "tokens": int((at := bucket_T == i).sum()),
            "loss": float(loss_T[at].mean()),
            "loss_without": float(bare_T[at].mean()),
        }
        for i, low in enumerate(BUCKETS)
        if (bucket_T == i).any()
    ]
    distinct, inverse = np.unique(code_T, return_inverse=True)
    gains, tokens = np.bincount(inverse, bare_T - loss_T), np.bincount(inverse)

    def listed(name: str, value: np.ndarray, order: np.ndarray) -> list[dict[str, Any]]:
        found = [(texts[int(distinct[i])], int(tokens[i]), float(value[i])) for i in order[:most]]
        return [{"text": loaded.dataset.tokenizer.decode(t), "tokens": n, name: v} for t, n, v in found]

    often = np.flatnonzero(tokens >= SEEN_OFTEN)
    top_gates = {}
    for block, parts in gates.items():
        mean = np.bincount(inverse, np.concatenate(parts)) / tokens
        top_gates[block] = listed("gate", mean, often[np.argsort(-mean[often])])
    top = listed("gain", gains, np.argsort(-gains))
    means = {"loss": float(loss_T.mean()), "loss_without": float(bare_T.mean())}
    return {"tokens": len(loss_T), **means, "buckets": buckets, "top": top, "top_gates": top_gates}


def evaluate_memory(
    loaded: Loaded, domains: Sequence[str], *, batch_size: int, max_tokens: int | None = None, training_steps: int = 200
) -> dict[str, Any]:
    """Returns the content of memory.json: {"step", "tables": `occupancy`, "domains": {name: `by_frequency`}}.

    Args:
      loaded: a run with a memory.
      domains: which.
      batch_size: sequences in a batch.
      max_tokens: stop each domain after so many tokens; None: all.
      training_steps: batches of training whose n-grams are counted, from the first.
    """
    memory = memory_of(loaded)
    hashing = next(iter(loaded.definition.hashes().values()))
    batches = list(training_batches(loaded, training_steps))
    codes = np.concatenate([ngram_codes(hashing, b, memory.orders[-1])[b["segments_BL"] > 0] for b in batches])
    seen = dict(zip(*(a.tolist() for a in np.unique(codes, return_counts=True))))
    return {
        "step": loaded.step,
        "counted_steps": len(batches),
        "tables": occupancy(loaded, batches[:50]),
        "domains": {
            name: by_frequency(loaded, name, seen, batch_size=batch_size, max_tokens=max_tokens) for name in domains
        },
    }


def summary(found: dict[str, Any]) -> list[str]:
    """Returns the lines that say what `evaluate_memory` found."""
    lines = []
    for name, table in found["tables"].items():
        lines.append(
            f"table {name}: {table['rows']:,} rows, {table['touched']:.1%} touched; a batch reads {table['batch_rows']:,.0f} rows at "
            f"{table['batch_addresses']:,} addresses; of {table['distinct_ngrams']:,} n-grams {table['collisions']:.2%} share a row "
            f"(uniform hash: {table['expected_collisions']:.2%}), {table['full_collisions']:.3%} all of theirs"
        )
    for domain, row in found["domains"].items():
        lines.append(
            f"{domain}: loss {row['loss']:.4f}, with rows of zeros {row['loss_without']:.4f} ({row['tokens']:,} tokens)"
        )
        lines.append(
            f"  {'n-gram seen':>12}  {'tokens':>9}  {'loss':>7}  {'without':>7}  {'gain':>7}   (in the first {found['counted_steps']} steps)"
        )
        for bucket in row["buckets"]:
            gain = bucket["loss_without"] - bucket["loss"]
            lines.append(
                f"  {bucket['from']:>11}+  {bucket['tokens']:>9,}  {bucket['loss']:>7.3f}  {bucket['loss_without']:>7.3f}  {gain:>7.3f}"
            )
        best = ", ".join(f"{entry['text']!r} {entry['gain']:.0f}" for entry in row["top"][:8])
        lines.append(f"  most nats gained after: {best}")
        for block, entries in row["top_gates"].items():
            widest = ", ".join(f"{entry['text']!r} {entry['gate']:.2f}" for entry in entries[:8])
            lines.append(f"  widest gate of block {block} after: {widest}")
    return lines
