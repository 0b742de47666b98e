"""Intervals, rows, planted optima, and the compressor beside them."""

import lzma
import math
import random

import numpy as np
import pytest

from sparse_lm.data.files import Files
from sparse_lm.data.pipeline import DataConfig, prepare, validation_batches
from sparse_lm.data.synthetic import KHop, PlantedVocabulary
from sparse_lm.data.tokenizer import Bytes
from sparse_lm.evaluate import perplexity
from sparse_lm.evaluate.compression import Compression, compressed_size, training_text
from sparse_lm.evaluate.load import Loaded
from sparse_lm.evaluate.perplexity import against_optimum, bootstrap_interval, domain_row, whole_groups
from sparse_lm.train.population import Population
from sparse_lm.train.validation import DocumentLosses


def test_the_interval_of_equal_documents_is_a_point_and_of_one_document_unknown():
    low, high = bootstrap_interval(np.full(20, 3.0), np.full(20, 4))
    assert low == high == pytest.approx(0.75 / math.log(2))
    assert bootstrap_interval(np.array([3.0]), np.array([4])) is None


def test_the_interval_is_that_of_a_plain_loop_over_resamples():
    draw = np.random.default_rng(5)
    size = draw.integers(20, 3000, 40)
    nats = size * draw.normal(1.2, 0.15, 40)
    low, high = bootstrap_interval(nats, size)
    ratios = []
    for _ in range(4000):
        chosen = draw.integers(0, 40, 40)
        ratios.append(nats[chosen].sum() / size[chosen].sum() / math.log(2))
    expected = np.quantile(ratios, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert abs(low - expected[0]) < 0.1 * width and abs(high - expected[1]) < 0.1 * width
    assert bootstrap_interval(nats, size) == (low, high) != bootstrap_interval(nats, size, seed=1)


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    """200 worlds whose true ratio is 1 bit per byte: 95% intervals of 60 documents should miss in about 10 of them."""
    draw = np.random.default_rng(0)
    missed = 0
    for world in range(200):
        size = draw.integers(100, 1000, 60)
        low, high = bootstrap_interval(size * draw.normal(1, 0.2, 60) * math.log(2), size, resamples=1000, seed=world)
        missed += not low <= 1 <= high
    assert 3 <= missed <= 22


def test_pieces_of_resamples_are_one_stream(monkeypatch):
    nats, size = np.arange(1.0, 11.0), np.arange(10, 0, -1)
    whole = bootstrap_interval(nats, size)
    monkeypatch.setattr(perplexity, "CHUNK", 77)
    assert bootstrap_interval(nats, size) == pytest.approx(whole)


def test_a_row_by_hand():
    row = domain_row(DocumentLosses(np.array([3.0, 5.0]), np.array([2, 2]), np.array([4, 6])))
    assert row["loss"] == 2.0  # 8 nats over 4 tokens
    assert row["perplexity"] == pytest.approx(math.exp(2))
    assert row["bits_per_byte"] == pytest.approx(0.8 / math.log(2))  # 8 nats over 10 bytes
    assert (row["tokens"], row["bytes"], row["documents"]) == (4, 10, 2)
    # Resamples are (1, 1), (1, 2), (2, 2): 0.75, 0.8 or 0.833 nats a byte.
    assert row["interval"] == pytest.approx((0.75 / math.log(2), 5 / 6 / math.log(2)))
    assert "members" not in row


def test_a_population_reports_its_mean_and_spread():
    row = domain_row(DocumentLosses(np.array([[3.0, 5.0], [5.0, 7.0]]), np.array([2, 2]), np.array([4, 6])))
    assert row["loss"] == 2.5
    assert row["members"]["loss"] == {"values": [2.0, 3.0], "deviation": pytest.approx(math.sqrt(0.5))}
    assert row["bits_per_byte"] == pytest.approx(np.mean(row["members"]["bits_per_byte"]["values"]))


def test_batches_are_rounded_up_to_whole_routing_groups():
    assert [whole_groups(16, 1), whole_groups(16, 4), whole_groups(5, 4), whole_groups(1, 3)] == [16, 16, 8, 3]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    source = KHop(nodes=5, hops=3, queries=3, validation_documents=10)
    data = DataConfig(
        sources=(source,),
        tokenizer=PlantedVocabulary(),
        sequence_length=48,
        directory=str(tmp_path_factory.mktemp("planted")),
    )
    return source, data, prepare(data, report=lambda line: None)


class _Recipe:
    """The one field of a recipe that the comparison reads."""

    def __init__(self, data):
        self.data = data


def loaded_of(data, dataset) -> Loaded:
    return Loaded(None, _Recipe(data), dataset, None, 0, {}, {}, Population(), False)


def test_losses_above_a_known_optimum(planted):
    """A fake model whose loss is the optimum everywhere but at answers, where it is 0.5 for each look-up needed."""
    source, data, dataset = planted
    known = list(dataset.truth_rows("k_hop", 48))
    windows = iter(range(0, 100, 4))

    def eval_step(params, state, batch):
        start = next(windows)
        rows = known[start : start + 4]
        losses = np.zeros((4, 48))
        for number, row in enumerate(rows):
            losses[number] = row["optimal_nats_BL"] + 0.5 * row["answers_BL"]
        return losses

    found = against_optimum(loaded_of(data, dataset), "k_hop", eval_step, batch_size=4)
    answers = np.concatenate([row["answers_BL"] for row in known])
    tokens = 10 * (source.document_length + 1)
    assert found["tokens"] == tokens
    assert found["excess"] == pytest.approx(0.5 * answers.sum() / tokens)
    for depth in range(1, 4):
        assert found["answers"][str(depth)]["excess"] == pytest.approx(0.5 * depth)
        assert found["answers"][str(depth)]["loss"] == pytest.approx(0.5 * depth)  # answers are certain
    assert found["answers"]["all"]["tokens"] == 10 * source.queries
    # The optimum of all tokens is that of the batches' own truth.
    total = sum(row["optimal_nats_BL"].sum() for row in known) / tokens
    assert found["loss"] - found["excess"] == pytest.approx(total)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(400)]
    for number in range(40):
        where = folder / ("held_out" if number % 8 == 7 else "train")
        where.mkdir(exist_ok=True)
        (where / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=300)))
    data = DataConfig(
        sources=(Files(paths=(str(folder),), validation=("held_out/*",)),),
        tokenizer=Bytes(),
        sequence_length=64,
        directory=str(tmp_path_factory.mktemp("prepared")),
    )
    return data, prepare(data, report=lambda line: None)


def test_text_has_no_known_optimum(text):
    data, dataset = text
    assert against_optimum(loaded_of(data, dataset), dataset.domains[0], None, batch_size=2) is None


def test_xz_and_xz_that_has_seen_the_training_text(text):
    data, dataset = text
    (domain,) = dataset.domains
    with Compression(dataset, {domain: None}) as compression:
        row = compression.row(domain)
    held_out, training = (
        "".join(texts).encode() for texts in (dataset.validation_text(domain), dataset.training_text(domain))
    )
    assert row["xz_bits_per_byte"] == pytest.approx(
        8 * len(lzma.compress(held_out, preset=9)) / len(held_out), rel=0.02
    )
    assert row["xz_primed_with_bytes"] == len(training) and row["xz_primed_share"] == pytest.approx(1.0)
    # The words are all known from the training text, so that xz needs to spell none of them.
    assert row["xz_primed_bits_per_byte"] < 0.8 * row["xz_bits_per_byte"]
    # And the bytes that the model is charged for are the bytes that xz compresses.
    token_bytes = dataset.tokenizer.token_bytes_V
    batches = validation_batches(dataset, data, domain, batch_size=4)
    charged = sum(int(token_bytes[batch["targets_BL"][batch["segments_BL"] > 0]].sum()) for batch in batches)
    assert charged == len(held_out)


def test_priming_text_is_capped_evenly_and_says_so(text):
    _, dataset = text
    (domain,) = dataset.domains
    whole = training_text(dataset, domain)
    capped = training_text(dataset, domain, limit=len(whole.content) // 4)
    assert whole.share == pytest.approx(1.0)
    assert len(capped.content) == pytest.approx(len(whole.content) / 4, rel=0.2)
    assert capped.share == pytest.approx(len(capped.content) / len(whole.content))
    # Evenly spaced: the kept text does not stop in the first half.
    last = capped.content[-200:]
    assert whole.content.index(last) > len(whole.content) // 2


def test_priming_can_be_left_out_and_documents_limited(text):
    _, dataset = text
    (domain,) = dataset.domains
    with Compression(dataset, {domain: 2}, priming_bytes=0) as compression:
        row = compression.row(domain)
    held_out = "".join(dataset.validation_text(domain)[:2]).encode()
    assert row == {"xz_bits_per_byte": 8 * compressed_size(held_out, len(held_out)) / len(held_out)}


def test_an_unlimited_source_has_no_share(planted):
    _, _, dataset = planted
    assert training_text(dataset, "k_hop").share is None
