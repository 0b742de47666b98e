"""Impossible data configs: each is refused before any work, naming field, value and what is allowed."""

import pathlib

import pytest

from sparse_lm.config import ConfigError, from_dict, swap, to_dict, validate
from sparse_lm.data.corpus import Tfds
from sparse_lm.data.files import Files
from sparse_lm.data.installed import Installed
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig, prepare
from sparse_lm.data.synthetic import Biographies, KHop, Markov, PlantedVocabulary, Recall
from sparse_lm.data.tokenizer import BPE, HuggingFace

HERE = str(pathlib.Path(__file__).parent)


def with_source(source, **changes):
    return DataConfig(sources=(source,), **changes)


BAD = {
    "no sources": (DataConfig(sources=()), "sources", "at least one source"),
    "sequence too short": (DataConfig(sequence_length=1), "sequence_length", "at least 2"),
    "no batch": (DataConfig(batch_size=0), "batch_size", "at least 1"),
    "negative workers": (DataConfig(workers=-1), "workers", "0 to 256"),
    "no directory": (DataConfig(directory=""), "directory", "a folder name"),
    "wrong type": (DataConfig(batch_size="many"), "batch_size", "a value of type int"),  # type: ignore[arg-type]
    "zero weight": (with_source(Packaged(weight=0.0)), "sources.0.weight", "a positive finite number"),
    "negative weight": (with_source(Packaged(weight=-1.0)), "sources.0.weight", "a positive finite number"),
    "infinite weight": (with_source(Packaged(weight=float("inf"))), "sources.0.weight", "finite number"),
    "nothing packaged": (with_source(Packaged(speeches=False, api_docs=False)), "sources.0.speeches", "at least one of"),
    "no documents": (with_source(Packaged(documents_per_domain=0)), "sources.0.documents_per_domain", "a positive number"),
    "no paths": (with_source(Files()), "sources.0.paths", "at least one file or folder"),
    "missing path": (with_source(Files(paths=("/no/such/place",))), "sources.0.paths", "an existing file or folder"),
    "all held out": (with_source(Files(paths=(HERE,), validation=("*",))), "sources.0.validation", "some but not all"),
    "none held out": (with_source(Files(paths=(HERE,), validation=("zzz*",))), "sources.0.validation", "some but not all"),
    "fraction": (with_source(Files(paths=(HERE,), validation_fraction=1.0)), "sources.0.validation_fraction", "between 0 and 1"),
    "no text field": (with_source(Files(paths=(HERE,), text_field="")), "sources.0.text_field", "the name of a field"),
    "no domain": (with_source(Files(paths=(HERE,), domain="")), "sources.0.domain", "a name"),
    "tfds name": (with_source(Tfds(name="c4/en/3/4")), "sources.0.name", "name[/config]"),
    "tfds same split": (with_source(Tfds(validation_split="train")), "sources.0.validation_split", "other than train_split"),
    "tfds split": (with_source(Tfds(train_split="train[:")), "sources.0.train_split", "a TFDS split"),
    "tfds field": (with_source(Tfds(text_field="")), "sources.0.text_field", "the name of a text feature"),
    "nothing installed": (with_source(Installed(code=False, text=False)), "sources.0.code", "code, text or both"),
    "missing root": (with_source(Installed(roots=("/no/such/place",))), "sources.0.roots", "existing folders"),
    "installed fraction": (with_source(Installed(validation_fraction=0.9)), "sources.0.validation_fraction", "below 0.5"),
    "installed size": (with_source(Installed(megabytes=0)), "sources.0.megabytes", "a positive number"),
    "file size": (with_source(Installed(largest_file=1)), "sources.0.largest_file", "at least 1000"),
    "seed": (with_source(KHop(seed=-1)), "sources.0.seed", "0 or more"),
    "no validation": (with_source(KHop(validation_documents=0)), "sources.0.validation_documents", "at least 1"),
    "people": (with_source(Biographies(people=0)), "sources.0.people", "1 to 10000000"),
    "attributes": (with_source(Biographies(attributes=0)), "sources.0.attributes", "1 to 100"),
    "values": (with_source(Biographies(values=1)), "sources.0.values", "2 to 10000"),
    "nodes": (with_source(KHop(nodes=2)), "sources.0.nodes", "3 to 10000"),
    "hops": (with_source(KHop(nodes=5, hops=5)), "sources.0.hops", "1 to 4"),
    "queries": (with_source(KHop(queries=0)), "sources.0.queries", "at least 1"),
    "keys": (with_source(Recall(keys=1)), "sources.0.keys", "2 to 100000"),
    "recall values": (with_source(Recall(values=1)), "sources.0.values", "2 to 100000"),
    "pairs": (with_source(Recall(keys=8, pairs=9)), "sources.0.pairs", "1 to 8"),
    "states": (with_source(Markov(states=12)), "sources.0.states", "a power of two"),
    "order": (with_source(Markov(order=0)), "sources.0.order", "1 to 8"),
    "contexts": (with_source(Markov(states=65536, order=4)), "sources.0.order", "below 2**62"),
    "branches": (with_source(Markov(states=4, branches=5)), "sources.0.branches", "1 to 4"),
    "decay": (with_source(Markov(decay=0.0)), "sources.0.decay", "above 0"),
    "length": (with_source(Markov(length=0)), "sources.0.length", "at least 1"),
    "vocabulary": (DataConfig(tokenizer=BPE(vocab_size=256)), "tokenizer.vocab_size", "257"),
    "huge vocabulary": (DataConfig(tokenizer=BPE(vocab_size=2_000_000)), "tokenizer.vocab_size", "to 1000000"),
    "training bytes": (DataConfig(tokenizer=BPE(training_bytes=0)), "tokenizer.training_bytes", "a positive number"),
    "no tokenizer file": (DataConfig(tokenizer=HuggingFace(path="no.json")), "tokenizer.path", "an existing tokenizer.json"),
    "no end": (DataConfig(tokenizer=HuggingFace(path=__file__, end_of_text="")), "tokenizer.end_of_text", "a token"),
    "planted text": (DataConfig(tokenizer=PlantedVocabulary()), "tokenizer", "a text tokenizer"),
    "planted and short": (
        with_source(Markov(), tokenizer=PlantedVocabulary(), sequence_length=100), "sequence_length", "at least 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("config, field, allowed", BAD.values(), ids=BAD.keys())
def test_refused_before_any_work(config, field, allowed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        prepare(config)
    assert error.value.field == field and allowed in error.value.allowed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "swaps",
    [
        ["source=packaged", "tokenizer=bytes"],
        ["source=installed"],
        ["source=biographies", "tokenizer=planted"],
        ["source=k_hop", "tokenizer=planted"],
        ["source=recall", "tokenizer=planted"],
        ["source=markov", "tokenizer=planted"],
        ["source=tfds"],
        ["sources.0=markov", "tokenizer=bpe"],
    ],
)
def test_components_swap_and_read_back_equal(swaps):
    config = DataConfig()
    for assignment in swaps:
        config = swap(config, assignment)
    assert validate(config) is config
    assert from_dict(DataConfig, to_dict(config)) == config


def test_every_field_is_documented():
    import ast
    import inspect

    import sparse_lm.config
    from sparse_lm.data import corpus, files, installed, packaged, pipeline, planted, source, synthetic, tokenizer

    for module in (corpus, files, installed, packaged, pipeline, planted, source, synthetic, tokenizer):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            cls = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
            if cls is None or not issubclass(cls, sparse_lm.config.Config):
                continue
            for field, after in zip(node.body, [*node.body[1:], None]):
                if isinstance(field, ast.AnnAssign):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert text, f"{node.name}.{field.target.id} has no docstring"
