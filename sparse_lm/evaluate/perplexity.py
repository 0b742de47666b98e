"""Loss, perplexity and bits per byte of every domain over all validation documents, with intervals over documents.

Legend: B batch, L length, P members of a population, d documents, R resamples.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_lm.data.pipeline import validation_batches
from sparse_lm.evaluate.load import Loaded
from sparse_lm.train.validation import MODEL_ARRAYS, DocumentLosses, EvalStep, build_eval_step, document_losses

RESAMPLES = 2000
"""Bootstrap resamples of the documents."""

CHUNK = 1 << 22
"""Most resampled document counts held at once."""


def bootstrap_interval(
    nats_d: np.ndarray, bytes_d: np.ndarray, *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap of bits per byte over documents (Efron and Tibshirani 1993, chapter 13).

    Each resample draws as many documents as there are, with replacement, and takes the ratio of sums,
    sum(nats) / (ln 2 * sum(bytes)): documents count by their size, as in the estimate itself.

    Args:
      nats_d: nats of each document.
      bytes_d: its bytes.
      resamples: R.
      level: coverage.
      seed: of the draws.

    Returns:
      (low, high) bits per byte; None with fewer than two documents, about whose spread nothing is known.
    """
    documents = len(nats_d)
    if documents < 2:
        return None
    rng = np.random.default_rng(seed)
    even_d = np.full(documents, 1.0 / documents)
    ratios = []
    for start in range(0, resamples, step := max(1, CHUNK // documents)):
        counts_Rd = rng.multinomial(documents, even_d, size=min(step, resamples - start))
        ratios.append((counts_Rd @ nats_d) / np.maximum(counts_Rd @ bytes_d, 1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail]) / math.log(2)
    return float(low), float(high)


def whole_groups(batch_size: int, group_sequences: int) -> int:
    """Returns the batch size rounded up to whole routing groups."""
    return -(-batch_size // group_sequences) * group_sequences


def domain_row(losses: DocumentLosses, *, seed: int = 0) -> dict[str, Any]:
    """Summarises one domain.

    Args:
      losses: sums over documents; nats [d], or [P, d] for a population.
      seed: of the bootstrap.

    Returns:
      {"loss" (nats per token), "perplexity", "bits_per_byte", "interval" (95%, or None), "tokens", "bytes", "documents"}. Of a
      population these are of the mean over its members, and "members" has each member's "loss" and "bits_per_byte" with their
      standard deviation over members.
    """
    nats_d = losses.nats if losses.nats.ndim == 1 else losses.nats.mean(0)
    mean = losses._replace(nats=nats_d)
    loss = float(mean.loss())
    row: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": float(mean.bits_per_byte()),
        "interval": bootstrap_interval(nats_d, losses.bytes, seed=seed),
        "tokens": int(losses.tokens.sum()),
        "bytes": int(losses.bytes.sum()),
        "documents": int((losses.tokens > 0).sum()),
    }
    if losses.nats.ndim > 1:
        values = {"loss": losses.loss(), "bits_per_byte": losses.bits_per_byte()}
        row["members"] = {
            name: {
                "values": [float(v) for v in value],
                "deviation": float(np.std(value, ddof=1)) if len(value) > 1 else None,
            }
            for name, value in values.items()
        }
    return row


def evaluate_domain(
    loaded: Loaded,
    domain: str,
    *,
    eval_step: EvalStep | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Evaluates one domain; see `domain_row` for what comes back, and `against_optimum` for planted domains.

    Args:
      loaded: from `open_run`.
      domain: one of the dataset's domains.
      eval_step: from `build_eval_step`, to share one compile between domains.
      batch_size: sequences in a batch; None: the recipe's validation.batch_size.
      max_tokens: stop after so many tokens; None: all documents.

    Raises:
      ValueError: for an unknown domain.
    """
    step = eval_step or build_eval_step(loaded.definition, loaded.population)
    size = whole_groups(batch_size or loaded.recipe.validation.batch_size, loaded.definition.group_sequences())
    losses = document_losses(
        step,
        loaded.params,
        loaded.model_state,
        loaded.dataset,
        loaded.recipe.data,
        domain,
        batch_size=size,
        max_tokens=max_tokens,
        overlap=loaded.recipe.validation.overlap,
    )
    row = domain_row(losses)
    optimum = against_optimum(loaded, domain, step, batch_size=size, max_tokens=max_tokens)
    return {**row, "optimum": optimum} if optimum else row


def _truth_batches(loaded: Loaded, domain: str, batch_size: int) -> Iterator[dict[str, np.ndarray]] | None:
    """Yields the optimal losses in the batches of `validation_batches`; None for domains whose optimum is unknown."""
    rows = loaded.dataset.truth_rows(domain, loaded.recipe.data.sequence_length)
    try:
        first = next(rows)
    except (ValueError, StopIteration):
        return None

    def batches() -> Iterator[dict[str, np.ndarray]]:
        every = itertools.chain([first], rows)
        while batch := list(itertools.islice(every, batch_size)):
            batch += [{name: np.zeros_like(array) for name, array in first.items()}] * (batch_size - len(batch))
            yield {name: np.stack([row[name] for row in batch]) for name in first}

    return batches()


def against_optimum(
    loaded: Loaded, domain: str, eval_step: EvalStep, *, batch_size: int, max_tokens: int | None = None
) -> dict[str, Any] | None:
    """Compares a planted domain's losses with those of a predictor that knows the planted world.

    Returns:
      None for other domains. Otherwise nats per token: {"loss", "excess"} over all tokens (excess: above the optimum) and
      "answers": {depth: {"loss", "excess", "tokens"}} over the tokens that knowledge or reasoning determines, by the number of
      look-ups they need; "all" is every answer. Of a population, the mean over its members.
    """
    truth = _truth_batches(loaded, domain, batch_size)
    if truth is None:
        return None
    losses, optimal, depths = [], [], []
    data = loaded.recipe.data
    batches = validation_batches(loaded.dataset, data, domain, batch_size=batch_size, max_tokens=max_tokens)
    for batch, known in zip(batches, truth):
        arrays = {name: jnp.asarray(batch[name]) for name in MODEL_ARRAYS}
        nats = np.asarray(eval_step(loaded.params, loaded.model_state, arrays), np.float64)
        valid_BL = batch["segments_BL"] > 0
        losses.append(nats[..., valid_BL].reshape(-1, int(valid_BL.sum())).mean(0))
        optimal.append(known["optimal_nats_BL"][valid_BL].astype(np.float64))
        depths.append(known["answers_BL"][valid_BL])
    loss_T, optimal_T, depth_T = (np.concatenate(pieces) for pieces in (losses, optimal, depths))

    def line(chosen_T: np.ndarray) -> dict[str, Any]:
        loss = float(loss_T[chosen_T].mean())
        return {"loss": loss, "excess": loss - float(optimal_T[chosen_T].mean()), "tokens": int(chosen_T.sum())}

    found = line(np.ones_like(depth_T, bool))
    answers = {str(depth): line(depth_T == depth) for depth in sorted(set(depth_T.tolist()) - {0})}
    if answers:
        answers["all"] = line(depth_T > 0)
    return {**found, "answers": answers}


def chosen_domains(loaded: Loaded, domains: Sequence[str]) -> list[str]:
    """Returns the domains to evaluate: those asked for, or all.

    Raises:
      ValueError: for an unknown domain.
    """
    for domain in domains:
        if domain not in loaded.dataset.domains:
            raise ValueError(f"domain = {domain!r}; allowed: {', '.join(loaded.dataset.domains)}")
    return list(domains) or list(loaded.dataset.domains)
