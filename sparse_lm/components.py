"""The one table of components: (kind, name) -> the config class that builds it.

A component is a piece of the model or of the training run that can be swapped: `--with router=top_k` replaces every field of
kind `router` by the defaults of the component named `top_k`. A new component is a config class beside its code and one line here.
Entries are import paths, resolved on use, so that reading the table imports nothing.
"""

import difflib
import functools
import importlib
from typing import Any

TABLE: dict[str, dict[str, str]] = {
    "feed_forward": {
        "dense": "sparse_lm.layers.feed_forward:DenseFeedForward",
        "moe": "sparse_lm.routing.experts:MoEFeedForward",
        "soft_moe": "sparse_lm.routing.soft_moe:SoftMoEFeedForward",
    },
    "router": {
        "top_k": "sparse_lm.routing.top_k:TopKRouter",
        "switch": "sparse_lm.routing.token_choice:SwitchRouter",
        "noisy_top_k": "sparse_lm.routing.token_choice:NoisyTopKRouter",
        "gshard": "sparse_lm.routing.token_choice:GShardRouter",
        "batch_priority": "sparse_lm.routing.token_choice:BatchPriorityRouter",
        "bias_balanced": "sparse_lm.routing.token_choice:BiasBalancedRouter",
        "group_limited": "sparse_lm.routing.token_choice:GroupLimitedRouter",
        "sinkhorn": "sparse_lm.routing.token_choice:SinkhornRouter",
        "uniform": "sparse_lm.routing.token_choice:UniformRouter",
        "random": "sparse_lm.routing.token_choice:RandomRouter",
        "hash": "sparse_lm.routing.hash_router:HashRouter",
        "expert_choice": "sparse_lm.routing.variable:ExpertChoiceRouter",
        "expert_threshold": "sparse_lm.routing.variable:ExpertThresholdRouter",
        "remoe": "sparse_lm.routing.variable:ReMoERouter",
    },
    "depth": {
        "full": "sparse_lm.model.depth:FullDepth",
        "mixture_of_depths": "sparse_lm.model.depth:MixtureOfDepths",
        "adaptive": "sparse_lm.model.depth:AdaptiveDepth",
    },
    "memory": {
        "none": "sparse_lm.memory.memory:NoMemory",
        "engram": "sparse_lm.memory.engram:Engram",
        "engram_ungated": "sparse_lm.memory.variants:Ungated",
        "engram_uncompressed": "sparse_lm.memory.variants:Uncompressed",
        "engram_bigram": "sparse_lm.memory.variants:Bigram",
        "engram_unigram": "sparse_lm.memory.variants:Unigram",
        "engram_shuffled": "sparse_lm.memory.variants:Shuffled",
        "ngram_embedding": "sparse_lm.memory.ngram_embedding:NgramEmbedding",
    },
    "row_optimizer": {
        "touch_adam": "sparse_lm.memory.row_optimizer:TouchAdam",
        "lazy_adam": "sparse_lm.memory.row_optimizer:LazyAdam",
        "row_adagrad": "sparse_lm.memory.row_optimizer:RowAdagrad",
        "row_sgd": "sparse_lm.memory.row_optimizer:RowSGD",
    },
    "placement": {
        "device": "sparse_lm.memory.placement:OnDevice",
        "host": "sparse_lm.memory.placement:OnHost",
        "stale_host": "sparse_lm.memory.placement:StaleHost",
    },
    "projection": {
        "dense": "sparse_lm.layers.projection:DenseProjection",
        "block_sparse": "sparse_lm.weight_sparsity.projection:BlockSparseProjection",
        "block_sparse_low_rank": "sparse_lm.weight_sparsity.projection:BlockSparseLowRankProjection",
        "sparse_activations": "sparse_lm.weight_sparsity.sparse_activations:SparseActivationsProjection",
    },
    "optimizer": {
        "adamw": "sparse_lm.train.optimizer:AdamW",
        "muon": "sparse_lm.train.muon:Muon",
        "adafactor": "sparse_lm.train.adafactor:Adafactor",
    },
    "weight_sparsity": {
        "none": "sparse_lm.weight_sparsity.door:NoSparsity",
        "masked": "sparse_lm.weight_sparsity.masked:Masked",
        "packed": "sparse_lm.weight_sparsity.packed:Packed",
    },
    "block_algorithm": {
        "static": "sparse_lm.weight_sparsity.topology_update:StaticBlocks",
        "set": "sparse_lm.weight_sparsity.topology_update:SETBlocks",
        "rigl": "sparse_lm.weight_sparsity.topology_update:RigLBlocks",
        "magnitude": "sparse_lm.weight_sparsity.topology_update:MagnitudeBlocks",
    },
    "sparse_structure": {
        "unstructured": "sparse_lm.weight_sparsity.structures:Unstructured",
        "n_m": "sparse_lm.weight_sparsity.structures:NM",
        "block": "sparse_lm.weight_sparsity.structures:Block",
        "constant_fan_in": "sparse_lm.weight_sparsity.structures:ConstantFanIn",
        "neuron": "sparse_lm.weight_sparsity.structures:Neuron",
    },
    "sparse_allocation": {
        "uniform": "sparse_lm.weight_sparsity.allocation:Uniform",
        "er": "sparse_lm.weight_sparsity.allocation:ER",
        "erk": "sparse_lm.weight_sparsity.allocation:ERK",
        "by_hand": "sparse_lm.weight_sparsity.allocation:ByHand",
        "global": "sparse_lm.weight_sparsity.allocation:Global",
    },
    "sparse_schedule": {
        "constant": "sparse_lm.weight_sparsity.schedules:ConstantSparsity",
        "one_shot": "sparse_lm.weight_sparsity.schedules:OneShot",
        "cubic": "sparse_lm.weight_sparsity.schedules:CubicSparsity",
        "linear": "sparse_lm.weight_sparsity.schedules:LinearSparsity",
        "periodic": "sparse_lm.weight_sparsity.schedules:Periodic",
    },
    "sparse_algorithm": {
        "static": "sparse_lm.weight_sparsity.algorithms:Static",
        "magnitude": "sparse_lm.weight_sparsity.algorithms:Magnitude",
        "lottery": "sparse_lm.weight_sparsity.algorithms:Lottery",
        "snip": "sparse_lm.weight_sparsity.saliency:SNIP",
        "synflow": "sparse_lm.weight_sparsity.saliency:SynFlow",
        "wanda": "sparse_lm.weight_sparsity.saliency:Wanda",
        "set": "sparse_lm.weight_sparsity.growth:SET",
        "rigl": "sparse_lm.weight_sparsity.growth:RigL",
        "chts": "sparse_lm.weight_sparsity.growth:CHTs",
        "srigl": "sparse_lm.weight_sparsity.growth:SRigL",
        "ste": "sparse_lm.weight_sparsity.behind:STE",
        "sr_ste": "sparse_lm.weight_sparsity.behind:SRSTE",
        "top_k_ast": "sparse_lm.weight_sparsity.behind:TopKAST",
        "movement": "sparse_lm.weight_sparsity.behind:Movement",
        "abs_top_k": "sparse_lm.weight_sparsity.behind:AbsTopK",
    },
    "schedule": {
        "constant": "sparse_lm.train.schedule:Constant",
        "cosine": "sparse_lm.train.schedule:Cosine",
        "linear": "sparse_lm.train.schedule:Linear",
        "wsd": "sparse_lm.train.schedule:WarmupStableDecay",
    },
    "parametrization": {
        "standard": "sparse_lm.layers.parametrization:Standard",
        "mup": "sparse_lm.layers.parametrization:MuP",
        "sparse_mup": "sparse_lm.layers.parametrization:SparseMuP",
    },
    "tokenizer": {
        "bytes": "sparse_lm.data.tokenizer:Bytes",
        "bpe": "sparse_lm.data.tokenizer:BPE",
        "huggingface": "sparse_lm.data.tokenizer:HuggingFace",
        "planted": "sparse_lm.data.synthetic:PlantedVocabulary",
    },
    "source": {
        "packaged": "sparse_lm.data.packaged:Packaged",
        "files": "sparse_lm.data.files:Files",
        "tfds": "sparse_lm.data.corpus:Tfds",
        "installed": "sparse_lm.data.installed:Installed",
        "biographies": "sparse_lm.data.synthetic:Biographies",
        "k_hop": "sparse_lm.data.synthetic:KHop",
        "recall": "sparse_lm.data.synthetic:Recall",
        "markov": "sparse_lm.data.synthetic:Markov",
    },
}


def did_you_mean(wrong: str, allowed: Any) -> str:
    """Returns ' Did you mean ...?' for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(wrong, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def lookup(kind: str, name: str) -> type:
    """Returns the config class of component `name` of `kind`; ValueError names the nearest entry when there is none."""
    if kind not in TABLE:
        raise ValueError(f"unknown component kind {kind!r}; allowed: {', '.join(TABLE)}.{did_you_mean(kind, TABLE)}")
    if name not in TABLE[kind]:
        allowed = TABLE[kind]
        raise ValueError(f"unknown {kind} {name!r}; allowed: {', '.join(allowed)}.{did_you_mean(name, allowed)}")
    module, _, attribute = TABLE[kind][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def _names(kind: str) -> dict[str, str]:
    return {target: name for name, target in TABLE[kind].items()}


def name_of(kind: str, cls: type) -> str:
    """Returns the table name of a component's config class; ValueError when the class is not in the table."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    if target not in _names(kind):
        raise ValueError(f"{target} is not a registered {kind}; add it to sparse_lm/components.py")
    return _names(kind)[target]
