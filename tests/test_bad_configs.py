"""Impossible configurations: each is refused before anything is compiled, by field path, value and what is allowed."""

import dataclasses
import pathlib
from typing import Any

import pytest
import tiny

from sparse_lm.components import lookup
from sparse_lm.config import Config, ConfigError, override, validate
from sparse_lm.layers.feed_forward import DenseFeedForward
from sparse_lm.layers.parametrization import MuP, PathDensity, SparseMuP
from sparse_lm.memory.engram import Engram
from sparse_lm.memory.ngram_embedding import NgramEmbedding
from sparse_lm.memory.placement import OnHost
from sparse_lm.memory.row_optimizer import LazyAdam, RowAdagrad
from sparse_lm.model.depth import MixtureOfDepths
from sparse_lm.model.transformer import Model
from sparse_lm.parallel.mesh import MeshShape
from sparse_lm.recipe import Recipe
from sparse_lm.routing.experts import MoEFeedForward
from sparse_lm.routing.hash_router import HashRouter
from sparse_lm.routing.soft_moe import SoftMoEFeedForward
from sparse_lm.routing.token_choice import GroupLimitedRouter, GShardRouter, SinkhornRouter, SwitchRouter
from sparse_lm.routing.top_k import TopKRouter
from sparse_lm.routing.variable import ExpertChoiceRouter, ExpertThresholdRouter, ReMoERouter
from sparse_lm.train.adafactor import Adafactor
from sparse_lm.train.initialize import StartFrom
from sparse_lm.train.muon import Muon
from sparse_lm.train.optimizer import AdamW, Group
from sparse_lm.train.schedule import Cosine, Linear, WarmupStableDecay
from sparse_lm.train.session import open_session
from sparse_lm.weight_sparsity.algorithms import Lottery
from sparse_lm.weight_sparsity.growth import RigL
from sparse_lm.weight_sparsity.learned_permutation import Shuffle
from sparse_lm.weight_sparsity.masked import Masked
from sparse_lm.weight_sparsity.packed import Packed
from sparse_lm.weight_sparsity.schedules import Periodic
from sparse_lm.weight_sparsity.structures import Block

NAN, INFINITY = float("nan"), float("inf")
MOE = Recipe(model=Model(pattern=(MoEFeedForward(), DenseFeedForward(), MoEFeedForward())))

# (changes by path, path in the message, value in the message, words of what is allowed)
BAD: list[tuple[dict[str, Any], str, Any, str]] = [
    # the recipe itself
    ({"name": ""}, "name", "", "a directory name"),
    ({"name": "a/b"}, "name", "a/b", "a directory name"),
    ({"name": ".."}, "name", "..", "a directory name"),
    ({"seed": -1}, "seed", -1, "0 to 2**31 - 1"),
    ({"seed": 2**31}, "seed", 2**31, "0 to 2**31 - 1"),
    # types
    ({"seed": "0"}, "seed", "0", "a value of type int"),
    ({"seed": True}, "seed", True, "a value of type int"),
    ({"train.steps": 10.5}, "train.steps", 10.5, "a value of type int"),
    ({"train.clip_norm": True}, "train.clip_norm", True, "a value of type float | None"),
    ({"model.attention.window": True}, "model.attention.window", True, "a value of type int | None"),
    ({"population.seeds": (0, True)}, "population.seeds", (0, True), "tuple[int, ...]"),
    ({"population.seeds": [0, 1]}, "population.seeds", [0, 1], "tuple[int, ...]"),
    ({"model.execution": "scaned"}, "model.execution", "scaned", "Literal['scanned', 'unrolled']"),
    ({"model.compute_dtype": "float16"}, "model.compute_dtype", "float16", "Literal['float32', 'bfloat16']"),
    ({"model.attention": None}, "model.attention", None, "a value of type Attention"),
    ({"model.pattern": (AdamW(),)}, "model.pattern", (AdamW(),), "FeedForward"),
    ({"model.pattern.0.router": Cosine()}, "model.pattern.0.router", Cosine(), "a value of type Router"),
    ({"optimizer.learning_rate": INFINITY}, "optimizer.learning_rate", INFINITY, "finite"),
    (
        {"population.learning_rate_multipliers": (1.0, NAN)},
        "population.learning_rate_multipliers",
        (1.0, NAN),
        "finite",
    ),
    # memory
    ({"model.memory": Engram(at=(4,))}, "model.memory.at", (4,), "blocks below layers (4)"),
    ({"model.memory": Engram(at=())}, "model.memory.at", (), "ascending block numbers"),
    ({"model.memory": Engram(at=(2, 1))}, "model.memory.at", (2, 1), "ascending block numbers"),
    ({"model.memory": Engram(orders=(3, 2))}, "model.memory.orders", (3, 2), "ascending lengths from 1"),
    ({"model.memory": Engram(width=100)}, "model.memory.width", 100, "a multiple of heads (8)"),
    ({"model.memory": Engram(width=48, dtype="float8")}, "model.memory.width", 48, "a multiple of 4 * heads"),
    ({"model.memory": Engram(rows=200_000_000)}, "model.memory.rows", 200_000_000, "counted in 31 bits"),
    ({"model.memory": Engram(gate="tanh")}, "model.memory.gate", "tanh", "Literal['sigmoid', 'signed_root', 'none']"),
    ({"model.memory": Engram(taps=17)}, "model.memory.taps", 17, "0 to 16"),
    ({"model.memory": NgramEmbedding(at=(1,))}, "model.memory.at", (1,), "(0,)"),
    ({"model.memory": Engram(optimizer=LazyAdam(beta2=1.0))}, "model.memory.optimizer.beta2", 1.0, "0 to below 1"),
    ({"model.memory": Engram(optimizer=RowAdagrad(epsilon=0.0))}, "model.memory.optimizer.epsilon", 0.0, "above 0"),
    ({"model.memory": Engram(placement=OnHost(room=0.0))}, "model.memory.placement.room", 0.0, "above 0, at most 1"),
    (
        {"model.memory": Engram(placement=OnHost()), "population.seeds": (1, 2)},
        "model.memory.placement",
        "OnHost",
        "OnDevice in a population",
    ),
    # weight sparsity
    ({"weight_sparsity": Packed(shuffle=Shuffle(end=0.0))}, "weight_sparsity.shuffle.end", 0.0, "above 0, at most 1"),
    ({"weight_sparsity": Packed(shuffle=Shuffle(every=0))}, "weight_sparsity.shuffle.every", 0, "at least 1"),
    (
        {"weight_sparsity": Masked(algorithm=RigL(), schedule=Periodic()), "optimizer": Muon()},
        "weight_sparsity.algorithm",
        "RigL with Muon",
        "an elementwise one such as adamw",
    ),
    (
        {"weight_sparsity": Masked(structure=Block(inputs=48))},
        "weight_sparsity.structure.inputs",
        48,
        "sizes that divide every matrix",
    ),
    (
        {"weight_sparsity": Masked(exclude=("*.gate.x",))},
        "weight_sparsity.exclude.0",
        "*.gate.x",
        "a glob that matches",
    ),
    ({"start_from": StartFrom(run="x", rewind=5)}, "start_from.rewind", 5, "the algorithm lottery"),
    (
        {"weight_sparsity": Masked(algorithm=Lottery())},
        "start_from.rewind",
        None,
        "a step of start_from.run",
    ),
    # data
    ({"data.sources": ()}, "data.sources", (), "at least one source"),
    ({"data.sources.0.weight": 0.0}, "data.sources.0.weight", 0.0, "a positive finite number"),
    ({"data.sequence_length": 1}, "data.sequence_length", 1, "at least 2"),
    ({"data.batch_size": 0}, "data.batch_size", 0, "at least 1"),
    ({"data.workers": -1}, "data.workers", -1, "0 to 256"),
    ({"data.tokenizer.vocab_size": 256}, "data.tokenizer.vocab_size", 256, "257"),
    # model
    ({"model.vocab_size": 0}, "model.vocab_size", 0, "at least 1"),
    ({"model.d_model": 0}, "model.d_model", 0, "at least 1"),
    ({"model.layers": 0}, "model.layers", 0, "at least 1"),
    ({"model.pattern": ()}, "model.pattern", (), "at least one feed-forward"),
    ({"model.leading": (DenseFeedForward(),) * 5}, "model.leading", (DenseFeedForward(),) * 5, "layers (4)"),
    ({"model.logit_softcap": 0.0}, "model.logit_softcap", 0.0, "None or above 0"),
    ({"model.z_coefficient": -1e-4}, "model.z_coefficient", -1e-4, "0 or above"),
    ({"model.norm_epsilon": 0.0}, "model.norm_epsilon", 0.0, "between 0 and 1"),
    ({"model.remat": "names", "model.saved_names": ()}, "model.saved_names", (), "query, key"),
    ({"model.saved_names": ("scores",)}, "model.saved_names", ("scores",), "Literal['query'"),
    ({"model.attention.heads": 0}, "model.attention.heads", 0, "at least 1"),
    ({"model.attention.kv_heads": 3}, "model.attention.kv_heads", 3, "a divisor of heads (4)"),
    ({"model.attention.kv_heads": -2}, "model.attention.kv_heads", -2, "a divisor of heads (4)"),
    ({"model.attention.head_dim": 7}, "model.attention.head_dim", 7, "an even number"),
    ({"model.attention.rope_theta": 1.0}, "model.attention.rope_theta", 1.0, "above 1"),
    ({"model.attention.window": 0}, "model.attention.window", 0, "None or at least 1"),
    ({"model.attention.max_documents": 0}, "model.attention.max_documents", 0, "at least 1"),
    # feed-forwards and routers
    ({"model.pattern.1.hidden": 0}, "model.pattern.1.hidden", 0, "at least 1"),
    ({"model.pattern.0.hidden": 0}, "model.pattern.0.hidden", 0, "at least 1"),
    ({"model.pattern.0.experts": 0}, "model.pattern.0.experts", 0, "at least 1"),
    ({"model.pattern.0.shared_hidden": -1}, "model.pattern.0.shared_hidden", -1, "0 (none) or above"),
    ({"model.pattern.0.group_sequences": 0}, "model.pattern.0.group_sequences", 0, "at least 1"),
    ({"model.pattern.0.receive_factor": 0.5}, "model.pattern.0.receive_factor", 0.5, "at least 1"),
    ({"model.pattern.2.group_sequences": 2}, "model.pattern.2.group_sequences", 2, "1, as in the other routed layers"),
    ({"model.pattern.2.router.k": 9}, "model.pattern.2.router.k", 9, "the number of experts, 8"),
    ({"model.pattern.0.router.k": 0}, "model.pattern.0.router.k", 0, "at least 1"),
    ({"model.pattern.0.router.scale": 0.0}, "model.pattern.0.router.scale", 0.0, "above 0"),
    ({"model.pattern.0.router.bias_rate": -0.1}, "model.pattern.0.router.bias_rate", -0.1, "0 or above"),
    ({"model.pattern.0.router.z_coefficient": NAN}, "model.pattern.0.router.z_coefficient", NAN, "finite"),
    (
        {"model.pattern.0.router.balance_coefficient": -1.0},
        "model.pattern.0.router.balance_coefficient",
        -1.0,
        "0 or above",
    ),
    (
        {"model.pattern.0.router.scores": "relu"},
        "model.pattern.0.router.scores",
        "relu",
        "Literal['softmax', 'sigmoid']",
    ),
    # routers, each by a field of its own
    *(
        ({"model.pattern.0.router": router}, f"model.pattern.0.router.{field}", getattr(router, field), allowed)
        for router, field, allowed in (
            (TopKRouter(capacity_factor=0.0), "capacity_factor", "None or above 0"),
            (TopKRouter(capacity_order="score"), "capacity_order", "as long as no capacity_factor"),
            (SwitchRouter(jitter=1.0), "jitter", "0 to below 1"),
            (GShardRouter(k=1), "k", "at least 2"),
            (GShardRouter(renormalize=False), "renormalize", "sampled by their renormalised weight"),
            (GroupLimitedRouter(groups_kept=3), "groups_kept", "1 to expert_groups (2)"),
            (GroupLimitedRouter(expert_groups=0), "expert_groups", "at least 1"),
            (GroupLimitedRouter(expert_groups=3), "expert_groups", "a divisor of the number of experts, 8"),
            (SinkhornRouter(iterations=0), "iterations", "at least 1"),
            (HashRouter(z_coefficient=0.1), "z_coefficient", "0, because this router has no weight"),
            (HashRouter(seed=-1), "seed", "0 to 2**31 - 1"),
            (HashRouter(frozen=True), "frozen", "nothing to freeze"),
            (HashRouter(balance_over="step"), "balance_over", "no balance loss"),
            (ReMoERouter(k=0.0), "k", "above 0"),
            (ReMoERouter(factor=1.0), "factor", "above 1"),
            (ReMoERouter(first_coefficient=0.0), "first_coefficient", "above 0"),
            (ReMoERouter(rows_per_token=0.0), "rows_per_token", "None or above 0"),
            (ExpertThresholdRouter(decay=1.0), "decay", "0 to below 1"),
            (ExpertChoiceRouter(most_experts=1), "most_experts", "k (2) to 8"),
        )
    ),
    ({"model.pattern.0.zero_computation.identity": -1}, "model.pattern.0.zero_computation.identity", -1, "0 or above"),
    ({"model.pattern.1": SoftMoEFeedForward(slots=0)}, "model.pattern.1.slots", 0, "at least 1"),
    ({"model.depth": MixtureOfDepths(every=0)}, "model.depth.every", 0, "at least 1"),
    ({"model.depth": MixtureOfDepths(router=TopKRouter(k=2))}, "model.depth.router.k", 2, "number of experts, 1"),
    (
        {"model.depth": MixtureOfDepths(router=ExpertChoiceRouter(k=0.5))},
        "model.depth.router.scores",
        "softmax",
        "the softmax of one expert",
    ),
    # parametrization
    ({"model.parametrization.gain": -1.0}, "model.parametrization.gain", -1.0, ">= 0"),
    ({"model.parametrization": MuP(base_width=0)}, "model.parametrization.base_width", 0, "a width >= 1"),
    (
        {"model.parametrization": SparseMuP(densities=(PathDensity(path="*gate*", density=0.0),))},
        "model.parametrization.densities.0.density",
        0.0,
        "above 0, at most 1",
    ),
    (
        {"model.parametrization": SparseMuP(densities=(PathDensity(path="*gaet*", density=0.5),))},
        "model.parametrization.densities.0.path",
        "*gaet*",
        "a glob that matches a path",
    ),
    # optimizers and schedules
    ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate", 0.0, "> 0"),
    ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay", -0.1, ">= 0"),
    ({"optimizer.beta2": 1.0}, "optimizer.beta2", 1.0, "from 0 to below 1"),
    ({"optimizer.epsilon": 0.0}, "optimizer.epsilon", 0.0, "> 0"),
    ({"optimizer.groups": (Group(path=""),)}, "optimizer.groups.0.path", "", "a glob"),
    (
        {"optimizer.groups": (Group(path="*norm*"), Group(path="*nrom*"))},
        "optimizer.groups.1.path",
        "*nrom*",
        "matches",
    ),
    ({"optimizer": Muon(momentum=1.0)}, "optimizer.momentum", 1.0, "from 0 to below 1"),
    ({"optimizer": Muon(iterations=0)}, "optimizer.iterations", 0, ">= 1"),
    ({"optimizer": Adafactor(decay_exponent=0.0)}, "optimizer.decay_exponent", 0.0, "at most 1"),
    ({"optimizer.schedule.warmup_fraction": 1.5}, "optimizer.schedule.warmup_fraction", 1.5, "from 0 to 1"),
    ({"optimizer.schedule": Linear(final_fraction=2.0)}, "optimizer.schedule.final_fraction", 2.0, "from 0 to 1"),
    ({"train.steps": 50, "optimizer.schedule.warmup_steps": 51}, "optimizer.schedule.warmup_steps", 51, "the 50 steps"),
    (
        {"train.steps": 50, "optimizer.schedule": WarmupStableDecay(warmup_steps=20, decay_steps=40)},
        "optimizer.schedule.decay_steps",
        40,
        "starts after the warmup (20 steps) in a run of 50",
    ),
    (
        {"train.steps": 50, "optimizer.schedule": WarmupStableDecay(decay_start=40, decay_steps=20)},
        "optimizer.schedule.decay_start",
        40,
        "50, the steps of the run (now 60)",
    ),
    (
        {"optimizer.schedule": WarmupStableDecay(decay_start=40)},
        "optimizer.schedule.decay_start",
        40,
        "together with decay_steps",
    ),
    # the step, populations, mesh
    ({"train.steps": 0}, "train.steps", 0, "at least 1"),
    ({"train.microbatches": 0}, "train.microbatches", 0, "at least 1"),
    ({"train.clip_norm": 0.0}, "train.clip_norm", 0.0, "None or above 0"),
    ({"train.ema_decay": 1.0}, "train.ema_decay", 1.0, "between 0 and 1"),
    ({"train.skip_limit": -1}, "train.skip_limit", -1, "0 or above"),
    ({"train.microbatches": 3}, "data.batch_size", 16, "train.microbatches (3)"),
    ({"population.seeds": (1, 1)}, "population.seeds", (1, 1), "different seeds"),
    ({"population.seeds": (-1,)}, "population.seeds", (-1,), "from 0"),
    (
        {"population.learning_rate_multipliers": (0.0,)},
        "population.learning_rate_multipliers",
        (0.0,),
        "factors above 0",
    ),
    ({"mesh.data": 0}, "mesh.data", 0, "at least 1, or -1"),
    ({"mesh.fsdp": -1}, "mesh.fsdp", -1, "-1 on one axis only (data has it)"),
    ({"mesh.data": 1, "mesh.tensor": 7}, "mesh", "tensor=7", "the 1 devices of this run"),
    # starting points, validation, checkpoints, logs
    ({"start_from.step": 5}, "start_from.step", 5, "None unless run is given"),
    ({"start_from.keep": "everything"}, "start_from.keep", "everything", "unless run is given"),
    ({"start_from.run": "r", "start_from.step": -1}, "start_from.step", -1, "0 and above"),
    ({"start_from.run": "r", "start_from.rename": ("a",)}, "start_from.rename", ("a",), "old=new"),
    ({"start_from.run": "r", "start_from.rename": ("(=b",)}, "start_from.rename", ("(=b",), "regular expressions"),
    (
        {"start_from.run": "r", "start_from.keep": "everything", "start_from.exclude": ("head",)},
        "start_from.keep",
        "everything",
        "parameters, when include or exclude",
    ),
    ({"validation.every": -1}, "validation.every", -1, "0 (only at the end)"),
    ({"validation.tokens_per_domain": 0}, "validation.tokens_per_domain", 0, "None or at least 1"),
    ({"validation.batch_size": 0}, "validation.batch_size", 0, "at least 1"),
    ({"validation.overlap": -1}, "validation.overlap", -1, "0 or above"),
    ({"validation.overlap": 512}, "validation.overlap", 512, "below data.sequence_length (512)"),
    ({"checkpoint.every": -5}, "checkpoint.every", -5, "0 (only at the end)"),
    ({"checkpoint.keep_last": 0}, "checkpoint.keep_last", 0, "at least 1"),
    ({"checkpoint.keep_every": 0}, "checkpoint.keep_every", 0, "None or at least 1"),
    ({"checkpoint.keep_best": -1}, "checkpoint.keep_best", -1, "0 or above"),
    ({"checkpoint.keep_best": 2, "validation.every": 0}, "checkpoint.keep_best", 2, "validation.every = 0"),
    ({"log.log_every": 0}, "log.log_every", 0, "at least 1"),
    ({"log.profile_start": -1}, "log.profile_start", -1, "None or a step from 0"),
    ({"log.profile_steps": 0}, "log.profile_steps", 0, "at least 1"),
    ({"log.display": "loud"}, "log.display", "loud", "Literal['auto'"),
]

GROUPED = dataclasses.replace(
    MOE, model=Model(pattern=(MoEFeedForward(group_sequences=4), DenseFeedForward(), MoEFeedForward(group_sequences=4)))
)
BAD_GROUPS = [
    ({"data.batch_size": 6}, "data.batch_size", 6, "group_sequences of the routed layers (4)"),
    (
        {"train.microbatches": 8},
        "data.batch_size",
        16,
        "train.microbatches (8) x group_sequences of the routed layers (4)",
    ),
    ({"validation.batch_size": 6}, "validation.batch_size", 6, "group_sequences of the routed layers (4)"),
]


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr("jax._src.compiler.backend_compile_and_load", refuse)


def refused(base: Recipe, changes: dict[str, Any]) -> ConfigError:
    """Returns the error that a recipe with these changes gives when it is validated and placed on one device."""
    import jax

    recipe = base
    for path, value in changes.items():
        recipe = override(recipe, path, value)
    with pytest.raises(ConfigError) as error:
        open_session(validate(recipe), jax.devices()[:1])
    return error.value


CASES = [(MOE, *case) for case in BAD] + [(GROUPED, *case) for case in BAD_GROUPS]


@pytest.mark.parametrize(
    ("base", "changes", "path", "value", "allowed"), CASES, ids=[f"{i}-{case[2]}" for i, case in enumerate(CASES)]
)
@pytest.mark.usefixtures("nothing_compiles")
def test_refused_by_path_value_and_what_is_allowed(
    base: Recipe, changes: dict[str, Any], path: str, value: Any, allowed: str
) -> None:
    error = refused(base, changes)
    assert str(error).startswith(f"{path} = {value!r} is not possible; allowed: "), error
    assert allowed in error.allowed, error


COMPONENTS: list[tuple[str, str, dict[str, Any], str, Any, str]] = [
    ("source", "files", {}, "paths", (), "at least one file or folder"),
    ("source", "files", {"paths": ("/no/such/folder",)}, "paths", "/no/such/folder", "an existing file or folder"),
    ("source", "packaged", {"speeches": False, "api_docs": False}, "speeches", False, "at least one of"),
    ("source", "packaged", {"documents_per_domain": 0}, "documents_per_domain", 0, "a positive number"),
    ("source", "tfds", {"name": "c4 en"}, "name", "c4 en", "name[/config]"),
    ("source", "tfds", {"validation_split": "train"}, "validation_split", "train", "other than train_split"),
    ("source", "installed", {"code": False, "text": False}, "code", False, "code, text or both"),
    ("source", "biographies", {"people": 0}, "people", 0, "1 to 10000000"),
    ("source", "k_hop", {"nodes": 2}, "nodes", 2, "3 to 10000"),
    ("source", "k_hop", {"hops": 0}, "hops", 0, ""),
    ("source", "recall", {"pairs": 65}, "pairs", 65, "64"),
    ("source", "markov", {"states": 48}, "states", 48, "a power of two"),
    ("tokenizer", "huggingface", {}, "path", "", "an existing tokenizer.json file"),
    ("optimizer", "muon", {"precision": "float16"}, "precision", "float16", "Literal"),
    ("optimizer", "adafactor", {"clip_threshold": 0.0}, "clip_threshold", 0.0, "> 0"),
    ("schedule", "wsd", {"decay_shape": "cosine"}, "decay_shape", "cosine", "Literal"),
    ("schedule", "constant", {"warmup_steps": -1}, "warmup_steps", -1, ">= 0"),
    ("weight_sparsity", "masked", {"density": 0.0}, "density", 0.0, "above 0"),
    ("weight_sparsity", "masked", {"roles": ()}, "roles", (), "at least one of"),
    ("sparse_structure", "n_m", {"m": 1}, "m", 1, "at least 2"),
    ("sparse_structure", "block", {"inputs": 0}, "inputs", 0, "at least 1"),
    ("sparse_schedule", "cubic", {"begin": 0.8}, "begin", 0.8, "below end (0.75)"),
    ("sparse_schedule", "periodic", {"dense_tail": 0.5}, "end", 0.75, "at most 1 - dense_tail"),
    ("sparse_schedule", "one_shot", {"at": 1.0}, "at", 1.0, "below 1 - dense_tail"),
    ("sparse_algorithm", "synflow", {"rounds": 0}, "rounds", 0, "at least 1"),
    ("sparse_algorithm", "top_k_ast", {"extra": 1.0}, "extra", 1.0, "below 1"),
    ("sparse_algorithm", "srigl", {"least": 0.0}, "least", 0.0, "above 0"),
]


@pytest.mark.parametrize(("kind", "name", "fields", "path", "value", "allowed"), COMPONENTS)
@pytest.mark.usefixtures("nothing_compiles")
def test_components_refuse_by_themselves(kind, name, fields, path, value, allowed) -> None:
    config: Config = lookup(kind, name)(**fields)
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert (error.value.field, error.value.value) == (path, value)
    assert allowed in error.value.allowed


@pytest.mark.parametrize(
    ("shape", "devices", "sizes"),
    [
        (MeshShape(), 8, (8, 1, 1, 1, 1)),
        (MeshShape(data=2, fsdp=-1), 8, (2, 4, 1, 1, 1)),
        (MeshShape(data=2, expert=2, tensor=2), 8, (2, 1, 2, 2, 1)),
        (MeshShape(tensor=4), 4, (1, 1, 1, 4, 1)),
    ],
)
def test_the_inferred_axis_takes_the_devices_that_are_left(
    shape: MeshShape, devices: int, sizes: tuple[int, ...]
) -> None:
    assert tuple(shape.sizes(devices).values()) == sizes


@pytest.mark.parametrize(
    ("shape", "written"),
    [
        (MeshShape(tensor=3), "data=-1 x tensor=3"),
        (MeshShape(data=4), "data=4"),
        (MeshShape(data=2, fsdp=8), "data=2 x fsdp=8"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_it_needs(shape: MeshShape, written: str) -> None:
    with pytest.raises(ConfigError) as error:
        shape.sizes(8)
    assert error.value.value == written and "the 8 devices" in error.value.allowed


@pytest.mark.usefixtures("nothing_compiles")
def test_a_vocabulary_below_the_tokenizers_is_refused_before_compiling(tmp_path: pathlib.Path) -> None:
    from sparse_lm.train.loop import train

    tiny.corpus(tmp_path / "text")
    with pytest.raises(
        ConfigError, match=r"^model\.vocab_size = 200 is not possible; allowed: at least the tokenizer's 257$"
    ):
        train(tiny.recipe(tmp_path, model__vocab_size=200), tmp_path / "run")


@pytest.mark.usefixtures("nothing_compiles")
def test_the_guard_against_compiling_works() -> None:
    import jax

    with pytest.raises(AssertionError, match="something was compiled"):
        jax.jit(lambda x: x * 3 + 1)(2.0)
