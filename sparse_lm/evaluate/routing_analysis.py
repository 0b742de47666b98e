"""What the experts of a trained model do: who gets which text, what each is worth, how routing moves on other text.

Every number comes from recorded routes: one pass over validation text gives the loss and the experts of every token.

Legend: B batch, L length, T tokens, R most experts of a token, E experts.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_lm.data import packing
from sparse_lm.data.pipeline import validation_batches
from sparse_lm.evaluate.load import Loaded
from sparse_lm.layers.tree_paths import flatten
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.model.definition import Batch, for_documents
from sparse_lm.train.state import unstack
from sparse_lm.train.validation import MODEL_ARRAYS


class Routed(NamedTuple):
    """Tokens with their losses and routes.

    Attributes:
      tokens_T: token ids (the inputs, whose next token the loss is about).
      losses_T: nats.
      experts: {block: experts of each token [T, R], -1 where there is none}.
    """

    tokens_T: np.ndarray
    losses_T: np.ndarray
    experts: dict[int, np.ndarray]


class Analyst:
    """Runs a model over text and records its routes.

    Raises:
      ValueError: for a model without routed feed-forwards, or a population (choose a member first).
    """

    def __init__(self, loaded: Loaded):
        if loaded.population.active:
            raise ValueError(f"the run is a population; allowed: one member of it, 0 to {loaded.members - 1}")
        model = loaded.recipe.model
        self.loaded = loaded
        self.experts = {layer: model.feed_forward_of(layer).routes for layer in range(model.layers)}
        self.experts = {layer: experts for layer, experts in self.experts.items() if experts}
        if not self.experts:
            raise ValueError("the model has no router that chooses among experts")
        self._program = functools.cache(self._compiled)

    def _compiled(self, documents: int, replay: bool) -> Any:
        definition = for_documents(self.loaded.definition, documents)

        def run(params: Any, state: Any, batch: Batch, choices: Any) -> Any:
            losses_BL, aux = definition.token_losses(params, state, batch, choices if replay else None)
            return losses_BL, aux.choices

        return jax.jit(run)

    def run(self, batch: Batch, replay: Any = None) -> tuple[np.ndarray, Any]:
        """Returns (losses [B, L], recorded choices in the model's layout) of a batch."""
        arrays = {name: batch[name] for name in MODEL_ARRAYS}
        most = self.loaded.definition.config.attention.max_documents
        program = self._program(documents_bucket(most, int(batch["segments_BL"].max())), replay is not None)
        losses_BL, choices = program(self.loaded.params, self.loaded.model_state, arrays, replay)
        return np.asarray(losses_BL, np.float64), jax.device_get(choices)

    def by_layer(self, choices: Any) -> dict[int, np.ndarray]:
        """Returns {block: experts [B, L, R], -1 where there is none} of recorded choices."""
        flat = flatten(unstack(choices, 0))
        found = {layer: np.asarray(flat[f"{layer}.feed_forward"]) for layer in self.experts}
        return {layer: np.where(expert < self.experts[layer], expert, -1) for layer, expert in found.items()}

    def route(self, batches: Iterable[Batch]) -> Routed:
        """Routes batches; padding is left out. Blocks that take a part of the tokens (`depth`) are refused by name."""
        tokens, losses, experts = [], [], collections.defaultdict(list)
        for batch in batches:
            valid_BL = batch["segments_BL"] > 0
            losses_BL, choices = self.run(batch)
            tokens.append(batch["tokens_BL"][valid_BL])
            losses.append(losses_BL[valid_BL])
            for layer, expert_BLR in self.by_layer(choices).items():
                if expert_BLR.shape[:2] != valid_BL.shape:
                    raise ValueError(
                        f"blocks.{layer} takes a part of the tokens; allowed: models whose blocks take all"
                    )
                experts[layer].append(expert_BLR[valid_BL])
        if not tokens:
            raise ValueError("there is no text to route")
        return Routed(
            np.concatenate(tokens), np.concatenate(losses), {layer: np.concatenate(e) for layer, e in experts.items()}
        )

    def domain_batches(self, domain: str, max_tokens: int) -> Iterator[Batch]:
        """Yields validation batches of one of the run's domains."""
        recipe = self.loaded.recipe
        size = recipe.validation.batch_size
        return validation_batches(self.loaded.dataset, recipe.data, domain, batch_size=size, max_tokens=max_tokens)

    def text_batches(self, texts: Sequence[str], max_tokens: int) -> Iterator[Batch]:
        """Yields other text as batches, each text a document of its own rows."""
        recipe, encoder = self.loaded.recipe, self.loaded.dataset.tokenizer
        length, size, end = recipe.data.sequence_length, recipe.validation.batch_size, encoder.end_of_text
        rows: list[packing.Row] = []
        for text in texts:
            ids = encoder.encode(text)
            for start in range(0, max(len(ids) - 1, 0), length):
                piece = ids[start : start + length + 1]
                rows.append(
                    packing.row_from_pieces([piece[:length]], [0], int((*piece, end)[len(piece[:length])]), length, end)
                )
        rows = rows[: max(1, -(-max_tokens // length))]
        empty = packing.row_from_pieces([np.zeros(0, np.int32)], [0], end, length, end)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            batch += [empty] * (size - len(batch))
            yield {name: np.stack([row[name] for row in batch]) for name in empty}


def loads(expert_TR: np.ndarray, experts: int) -> np.ndarray:
    """Returns the fraction of assignments by expert."""
    counts_E = np.bincount(expert_TR[expert_TR >= 0], minlength=experts)
    return counts_E / max(counts_E.sum(), 1)


def divergence(other_E: np.ndarray, base_E: np.ndarray, tokens: int) -> float:
    """Kullback-Leibler divergence of one load from another, in nats; half a token is added everywhere, so that none is infinite."""
    p, q = ((load * tokens + 0.5) / (load * tokens + 0.5).sum() for load in (other_E, base_E))
    return float(np.sum(p * np.log(p / q)))


def loss_by_expert(routed: Routed, layer: int, experts: int) -> list[float | None]:
    """Returns the mean loss of the tokens of each expert; None for an expert without tokens."""
    has_TE = (routed.experts[layer][..., None] == np.arange(experts)).any(1)
    counts = has_TE.sum(0)
    sums = (has_TE * routed.losses_T[:, None]).sum(0)
    return [float(s / c) if c else None for s, c in zip(sums, counts)]


def tokens_by_expert(routed: Routed, layer: int, experts: int, most: int = 8) -> list[list[tuple[int, float]]]:
    """Returns for each expert the token ids that say most about it, with the share of the token that it takes.

    Ranked by tokens above what the expert's load would give it: count - load * count of the token everywhere.
    """
    expert_TR = routed.experts[layer]
    vocabulary = int(routed.tokens_T.max()) + 1
    total_V = np.bincount(routed.tokens_T, minlength=vocabulary)
    found = []
    for expert in range(experts):
        taken_V = np.bincount(routed.tokens_T[(expert_TR == expert).any(1)], minlength=vocabulary)
        excess_V = taken_V - taken_V.sum() / max(len(routed.tokens_T), 1) * total_V
        best = np.argsort(-excess_V, kind="stable")[:most]
        found.append([(int(v), float(taken_V[v] / total_V[v])) for v in best if excess_V[v] > 0])
    return found


def paths(routed: Routed, most: int = 12) -> dict[str, Any]:
    """Describes the paths of tokens: their first experts, block after block.

    Returns:
      {"distinct", "explained": share of the variance of the loss that the path explains, "frequent": [{"path", "share", "loss"}]}.
      With few tokens a path, much is explained by chance: compare runs at equal tokens.
    """
    first = np.stack([expert_TR[:, 0] for _, expert_TR in sorted(routed.experts.items())], axis=-1)
    unique, inverse, counts = np.unique(first, axis=0, return_inverse=True, return_counts=True)
    means = np.bincount(inverse.ravel(), routed.losses_T) / counts
    variance = routed.losses_T.var()
    between = float((counts * np.square(means - routed.losses_T.mean())).sum() / counts.sum())
    order = np.argsort(-counts, kind="stable")[:most]
    return {
        "distinct": len(unique),
        "explained": between / variance if variance else 0.0,
        "frequent": [
            {"path": unique[i].tolist(), "share": float(counts[i] / counts.sum()), "loss": float(means[i])}
            for i in order
        ],
    }


def ablations(analyst: Analyst, batches: Sequence[Batch]) -> dict[int, list[float]]:
    """Returns {block: rise of the mean loss, in nats a token, when an expert's outputs are left out}, by expert.

    All other routes are replayed as they were, so the number is what the expert contributes where it was chosen. Weights that a
    router renormalises are renormalised without it.
    """
    recorded = [(batch, *analyst.run(batch)) for batch in batches]
    tokens = sum(int((batch["segments_BL"] > 0).sum()) for batch in batches)
    base = sum(float(losses.sum()) for _, losses, _ in recorded)
    found: dict[int, list[float]] = {}
    for layer, experts in analyst.experts.items():
        effects = []
        for expert in range(experts):
            total = 0.0
            for batch, _, choices in recorded:
                total += float(analyst.run(batch, without(choices, layer, expert, experts))[0].sum())
            effects.append((total - base) / max(tokens, 1))
        found[layer] = effects
    return found


def without(choices: Any, layer: int, expert: int, experts: int) -> Any:
    """Returns recorded choices with one expert of one block taken out."""
    changed = dict(choices)
    for run, parts in choices.items():
        if "feed_forward" not in parts:
            continue
        first, _, last = run.partition("_to_")
        if not int(first) <= layer <= int(last or first):
            continue
        chosen = np.array(parts["feed_forward"])
        where: Any = layer - int(first) if last else slice(None)
        chosen[where] = np.where(chosen[where] == expert, experts, chosen[where])
        changed[run] = {**parts, "feed_forward": chosen}
    return changed


def analyse(
    analyst: Analyst, *, max_tokens: int, ablation_tokens: int, other: dict[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Analyses a model's routing.

    Args:
      analyst: the model.
      max_tokens: tokens of each domain.
      ablation_tokens: tokens of the first domains on which experts are ablated, one pass for each expert of each block; 0: none.
      other: {name: texts} of corpora to compare routing on.

    Returns:
      {"domains": {domain: {"tokens", "loss"}}, "paths": see `paths`, "layers": {block: {"experts", "loads": {domain: by expert},
      "loss": by expert, "tokens": by expert [[text, share]], "shift": {domain or other corpus: KL from all domains, nats},
      "ablation": by expert}}}.
    """
    loaded = analyst.loaded
    by_domain = {domain: analyst.route(analyst.domain_batches(domain, max_tokens)) for domain in loaded.dataset.domains}
    elsewhere = {name: analyst.route(analyst.text_batches(texts, max_tokens)) for name, texts in (other or {}).items()}
    everything = Routed(
        np.concatenate([r.tokens_T for r in by_domain.values()]),
        np.concatenate([r.losses_T for r in by_domain.values()]),
        {layer: np.concatenate([r.experts[layer] for r in by_domain.values()]) for layer in analyst.experts},
    )
    effects: dict[int, list[float]] = {}
    if ablation_tokens:
        each = -(-ablation_tokens // len(by_domain))
        batches = [list(analyst.domain_batches(domain, each)) for domain in by_domain]
        effects = ablations(analyst, list(itertools.chain.from_iterable(batches)))
    decode = loaded.dataset.tokenizer.decode
    layers = {}
    for layer, experts in analyst.experts.items():
        base_E = loads(everything.experts[layer], experts)
        found = {name: loads(r.experts[layer], experts) for name, r in {**by_domain, **elsewhere}.items()}
        sizes = {name: len(r.tokens_T) for name, r in {**by_domain, **elsewhere}.items()}
        layers[str(layer)] = {
            "experts": experts,
            "loads": {name: load.tolist() for name, load in found.items()},
            "loss": loss_by_expert(everything, layer, experts),
            "tokens": [
                [[decode([token]), share] for token, share in best]
                for best in tokens_by_expert(everything, layer, experts)
            ],
            "shift": {name: divergence(load, base_E, sizes[name]) for name, load in found.items()},
            "ablation": effects.get(layer),
        }
    return {
        "step": loaded.step,
        "domains": {
            name: {"tokens": len(r.tokens_T), "loss": float(r.losses_T.mean()), "trained": name in by_domain}
            for name, r in {**by_domain, **elsewhere}.items()
        },
        "paths": paths(everything),
        "layers": layers,
    }
