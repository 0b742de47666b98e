"""Planted sources: the truth they state is the truth of what they draw."""

import collections
import dataclasses
import math

import numpy as np
import pytest

from sparse_lm.data.pipeline import DataConfig, prepare, train_stream
from sparse_lm.data.synthetic import Biographies, KHop, Markov, PlantedVocabulary, Recall
from sparse_lm.data.tokenizer import BPE

SOURCES = [
    Biographies(people=500, attributes=4, values=8),
    KHop(nodes=7, hops=3, queries=4),
    Recall(keys=12, values=9, pairs=5),
    Markov(states=16, order=2, branches=3, length=60),
]
by_name = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.default_domain)


def words(source, sample):
    return [text.split() for text in source.texts(sample)]


@by_name
def test_mean_optimal_loss_is_the_stated_one(source):
    sample = source.draw("train", 4000, 0)
    assert sample.symbols_DN.shape == (4000, source.document_length)
    assert sample.symbols_DN.min() >= 0 and sample.symbols_DN.max() < len(source.symbols())
    per_document = sample.nats_DN.sum(1, dtype=np.float64)
    error = per_document.std() / math.sqrt(4000)
    assert abs(per_document.mean() - source.truth()["nats_per_document"]) <= 4 * error + 1e-3
    assert (sample.nats_DN >= 0).all() and (sample.nats_DN[sample.answers_DN > 0] == 0).all()


@by_name
def test_draws_are_functions_of_their_key(source):
    a, b = source.draw("train", 50, 1, 2), source.draw("train", 50, 1, 2)
    assert all(np.array_equal(x, y) for x, y in zip(a, b))
    others = [source.draw("train", 50, 1, 3), source.draw("validation", 50, 1, 2)]
    others.append(dataclasses.replace(source, seed=1).draw("train", 50, 1, 2))
    assert all(not np.array_equal(a.symbols_DN, other.symbols_DN) for other in others)


def test_biographies_state_the_same_facts_everywhere():
    source = SOURCES[0]
    facts, people = {}, set()
    for split in ("train", "validation"):
        for person in words(source, source.draw(split, 6000, 0)):
            name = tuple(person[:3])
            people.add(name)
            assert sorted(person[3::2]) == [f"attribute{a}" for a in range(4)]
            for attribute, value in zip(person[3::2], person[4::2]):
                assert value.startswith(f"value{attribute.removeprefix('attribute')}.")
                assert facts.setdefault((name, attribute), value) == value
    assert len(people) == 500, "names are unique and everyone appears"
    counts = collections.Counter(value.split(".")[1] for value in facts.values())
    assert len(counts) == 8 and max(counts.values()) < 1.25 * len(facts) / 8
    truth = source.truth()
    assert truth["facts"] == len(facts) == 2000 and truth["bits"] == 2000 * 3


def test_biography_name_probabilities_are_those_of_the_population():
    source = SOURCES[0]
    sample = source.draw("train", 2000, 0)
    # Names are drawn uniformly from the people, whichever way the three words share the surprise.
    assert np.allclose(sample.nats_DN[:, :3].sum(1), math.log(500), atol=1e-5)
    first = collections.Counter(sample.symbols_DN[:, 0].tolist())
    symbol, count = first.most_common(1)[0]
    stated = math.exp(-sample.nats_DN[sample.symbols_DN[:, 0] == symbol][0, 0])
    assert abs(count / 2000 - stated) < 5 * math.sqrt(stated / 2000)


def test_k_hop_answers_follow_the_pairs():
    source = SOURCES[1]
    sample = source.draw("train", 300, 0)
    for document, depths in zip(words(source, sample), sample.answers_DN):
        successor = dict(zip(document[0:14:2], document[1:14:2]))
        assert len(successor) == 7 and len(set(successor.values())) == 7
        node, orbit = "node0", 0
        while orbit == 0 or node != "node0":
            node, orbit = successor[node], orbit + 1
        assert orbit == 7, "one cycle"
        queries = document[14:]
        for hop, start, answer, depth in zip(queries[0::3], queries[1::3], queries[2::3], depths[16::3]):
            node = start
            for _ in range(int(hop.removeprefix("hop"))):
                node = successor[node]
            assert node == answer != start and depth == int(hop.removeprefix("hop"))
    assert (sample.answers_DN > 0).sum() == 300 * 4


def test_recall_answers_follow_the_pairs():
    source = SOURCES[2]
    for document in words(source, source.draw("train", 300, 0)):
        pairs = dict(zip(document[0:10:2], document[1:10:2]))
        assert len(pairs) == 5
        assert dict(zip(document[10::2], document[11::2])) == pairs
        assert sorted(document[10::2]) == sorted(document[0:10:2])


def test_markov_contexts_have_the_stated_distribution():
    source = dataclasses.replace(SOURCES[3], states=4, branches=3, length=400)
    p = source.probabilities()
    assert abs(p.sum() - 1) < 1e-12 and np.allclose(p[1:] / p[:-1], 0.5, atol=1e-6)
    successors = collections.defaultdict(collections.Counter)
    symbols = source.draw("train", 300, 0).symbols_DN
    for row in np.pad(symbols, ((0, 0), (2, 0))).tolist():
        for a, b, c in zip(row, row[1:], row[2:]):
            successors[a, b][c] += 1
    for counts in successors.values():
        total = counts.total()
        assert len(counts) <= 3
        if total > 2000:
            observed = sorted((n / total for n in counts.values()), reverse=True)
            assert np.allclose(observed, p, atol=0.05)
    entropy = source.truth()["nats_per_symbol"]
    assert math.isclose(entropy, -sum(q * math.log(q) for q in p))
    equal = dataclasses.replace(source, decay=1.0, branches=4)
    assert math.isclose(equal.truth()["nats_per_symbol"], math.log(4), rel_tol=1e-6)


def test_training_windows_hold_whole_documents(tmp_path):
    source = dataclasses.replace(SOURCES[1], validation_documents=40)
    config = DataConfig(
        sources=(source,), tokenizer=PlantedVocabulary(), sequence_length=60, batch_size=8, directory=str(tmp_path)
    )
    dataset = prepare(config, report=lambda line: None)
    stored = source.document_length + 1
    batch, _ = next(iter(train_stream(dataset, config, seed=0)))
    assert (batch["segments_BL"].max(1) == 60 // stored).all()
    assert ((batch["segments_BL"] > 0).sum(1) == 60 // stored * stored).all()
    rows = list(dataset.validation_rows("k_hop", 60))
    truth = list(dataset.truth_rows("k_hop", 60))
    assert len(rows) == len(truth) == 20
    names = dict(enumerate(["<|endoftext|>", *source.symbols()]))
    total = 0.0
    for row, known in zip(rows, truth):
        total += known["optimal_nats_BL"].sum()
        assert (known["optimal_nats_BL"][row["segments_BL"] == 0] == 0).all()
        for at in np.flatnonzero(known["answers_BL"]):
            assert names[int(row["tokens_BL"][at - 1])] == f"hop{known['answers_BL'][at]}"
    assert math.isclose(total / 40, source.truth()["nats_per_document"], rel_tol=1e-5)
    assert dataset.validation_text("k_hop") == source.texts(source.draw("validation", 40))
    assert dataset.describe()["parts"][0]["optimum"]["nats_per_token"] == source.optimum()["nats_per_token"]


def test_planted_text_under_an_ordinary_tokenizer(tmp_path):
    source = dataclasses.replace(SOURCES[0], validation_documents=30)
    config = DataConfig(sources=(source,), tokenizer=BPE(vocab_size=300), sequence_length=200, directory=str(tmp_path))
    dataset = prepare(config, report=lambda line: None)
    assert dataset.validation_text("biographies") == source.texts(source.draw("validation", 30))
    batch, _ = next(iter(train_stream(dataset, config, seed=0)))
    people = dataset.tokenizer.decode(batch["tokens_BL"][0][batch["segments_BL"][0] == 1]).split()
    assert len(people) == source.document_length and people[0].startswith("first")
    with pytest.raises(ValueError, match="only under the tokenizer `planted`"):
        list(dataset.truth_rows("biographies", 200))
    with pytest.raises(ValueError, match=r"sequence_length = 10 is too short for Biographies"):
        next(iter(train_stream(dataset, dataclasses.replace(config, sequence_length=10), seed=0)))


def test_planted_vocabulary(tmp_path):
    PlantedVocabulary().build(tmp_path / "v.json", [], ["a", "b", "a", "cc"])
    encoder = PlantedVocabulary().load(tmp_path / "v.json")
    assert encoder.vocab_size == 4 and encoder.end_of_text == 0
    assert encoder.encode("a cc b").tolist() == [1, 3, 2] and encoder.decode([0, 1, 3, 2]) == "a cc b"
    assert encoder.token_bytes_V.tolist() == [0, 2, 2, 3]
    with pytest.raises(ValueError, match="outside the planted vocabulary: nope"):
        encoder.encode("a nope")
