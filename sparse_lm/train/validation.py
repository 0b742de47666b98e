"""Validation: nats and bytes per document, summed by domain, with the state left as it is.

Legend: B batch, L length, P members of a population.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sparse_lm.config import Config
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import DataConfig, validation_batches
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.model.definition import Batch, Definition, for_documents
from sparse_lm.parallel import rules
from sparse_lm.train.population import Population, over_members

MODEL_ARRAYS = ("tokens_BL", "targets_BL", "positions_BL", "segments_BL")
"""The arrays of a batch that go to the device."""

EvalStep = Callable[[Any, Any, Batch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation(Config):
    """In-loop validation."""

    every: int = 500
    """Steps between two validations; 0: only at the end."""
    tokens_per_domain: int | None = 65536
    """Most tokens of each domain in the loop; None: all. The final evaluation always reads all."""
    batch_size: int = 16
    """Sequences in a validation batch."""
    overlap: int = 0
    """Tokens of every window that come from the window before it and give context only; each token still counts once.

    Without it the first tokens of a window are predicted from nothing. Half of the sequence length doubles the time of validation.
    """

    def check(self) -> None:
        """See Config.check."""
        self.require(self.every >= 0, "every", "0 (only at the end) or above")
        self.require(
            self.tokens_per_domain is None or self.tokens_per_domain >= 1, "tokens_per_domain", "None or at least 1"
        )
        self.require(self.batch_size >= 1, "batch_size", "at least 1")
        self.require(self.overlap >= 0, "overlap", "0 or above")


class DocumentLosses(NamedTuple):
    """Sums over each document of one domain.

    Attributes:
      nats: float64 [documents], or [P, documents] for a population.
      tokens: int64 [documents], targets counted.
      bytes: int64 [documents], bytes that those targets stand for.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def loss(self) -> Any:
        """Nats per token."""
        return self.nats.sum(-1) / max(int(self.tokens.sum()), 1)

    def bits_per_byte(self) -> Any:
        """Bits per byte of text."""
        return self.nats.sum(-1) / math.log(2) / max(int(self.bytes.sum()), 1)


def build_eval_step(definition: Definition, population: Population, mesh: Mesh | None = None) -> EvalStep:
    """Builds the jitted step (params, model_state, batch) -> cross-entropy [B, L], or [P, B, L]; it changes no state.

    Args:
      definition: the model.
      population: the members that the parameters hold.
      mesh: where the parameters are, if not on one device: every process gives the whole batch and gets all losses.
    """

    @functools.cache
    def program(most_documents: int) -> EvalStep:
        sized = for_documents(definition, most_documents)

        def losses(params: Any, model_state: Any, batch: Batch) -> jax.Array:
            return sized.token_losses(params, model_state, batch)[0]

        whole = None if mesh is None else rules.replicated(mesh)
        return jax.jit(over_members(losses, population, (0, 0, None)), out_shardings=whole)

    def step(params: Any, model_state: Any, batch: Batch) -> jax.Array:
        found = int(np.max(batch["segments_BL"]))
        most = documents_bucket(definition.config.attention.max_documents, found)
        return program(most)(params, model_state, batch)

    return step


def document_losses(
    eval_step: EvalStep,
    params: Any,
    model_state: Any,
    dataset: Dataset,
    data: DataConfig,
    domain: str,
    *,
    batch_size: int,
    max_tokens: int | None = None,
    overlap: int = 0,
) -> DocumentLosses:
    """Evaluates one domain's validation documents.

    Args:
      eval_step: from `build_eval_step`.
      params: parameters, or their average.
      model_state: model state; not changed.
      dataset: the prepared data.
      data: its config.
      domain: one of dataset.domains.
      batch_size: sequences in a batch.
      max_tokens: stop after so many tokens; None: all documents.
      overlap: see Validation.overlap.
    """
    token_bytes_V = np.asarray(dataset.tokenizer.token_bytes_V)
    pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for batch in validation_batches(
        dataset, data, domain, batch_size=batch_size, max_tokens=max_tokens, overlap=overlap
    ):
        arrays = {name: batch[name] for name in MODEL_ARRAYS}
        losses = np.asarray(eval_step(params, model_state, arrays), np.float64)
        valid_BL = batch["documents_BL"] >= 0
        pieces.append(
            (losses[..., valid_BL], batch["documents_BL"][valid_BL], token_bytes_V[batch["targets_BL"][valid_BL]])
        )
    documents = np.concatenate([document for _, document, _ in pieces])
    nats, size = np.concatenate([nats for nats, _, _ in pieces], axis=-1), int(documents.max(initial=-1)) + 1
    rows = nats.reshape(-1, nats.shape[-1])
    sums = np.stack([np.bincount(documents, row, size) for row in rows]).reshape(*nats.shape[:-1], size)
    tokens = np.bincount(documents, minlength=size)
    byte_sums = np.bincount(documents, np.concatenate([b for _, _, b in pieces]), size).astype(np.int64)
    return DocumentLosses(sums, tokens, byte_sums)


def validation_row(
    eval_step: EvalStep, params: Any, model_state: Any, dataset: Dataset, data: DataConfig, config: Validation
) -> dict[str, Any]:
    """Returns {"loss", "bits_per_byte", "domains": {name: {"loss", "bits_per_byte", "tokens", "bytes"}}}; overall is by token and byte."""
    results = {
        domain: document_losses(
            eval_step,
            params,
            model_state,
            dataset,
            data,
            domain,
            batch_size=config.batch_size,
            max_tokens=config.tokens_per_domain,
            overlap=config.overlap,
        )
        for domain in dataset.domains
    }
    nats = sum(result.nats.sum(-1) for result in results.values())
    tokens = sum(int(result.tokens.sum()) for result in results.values())
    total_bytes = sum(int(result.bytes.sum()) for result in results.values())
    return {
        "loss": nats / max(tokens, 1),
        "bits_per_byte": nats / math.log(2) / max(total_bytes, 1),
        "domains": {
            domain: {
                "loss": result.loss(),
                "bits_per_byte": result.bits_per_byte(),
                "tokens": int(result.tokens.sum()),
                "bytes": int(result.bytes.sum()),
            }
            for domain, result in results.items()
        },
    }
