"""The stream that training reads: exact resumption, hosts that share one order, mixtures, validation that covers every byte."""

import dataclasses
import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.data import pipeline
from sparse_lm.data.dataset import UNLIMITED
from sparse_lm.data.files import Files
from sparse_lm.data.pipeline import DataConfig, prepare, train_stream, validation_batches
from sparse_lm.data.source import MissingSource
from sparse_lm.data.synthetic import KHop, Markov, PlantedVocabulary, Recall
from sparse_lm.data.tokenizer import BPE, Bytes


def quiet(line):
    pass


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return a.keys() == b.keys() and all(
        np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_batches_have_the_contracted_form(dataset, config):
    batch, state = next(iter(train_stream(dataset, config, seed=0)))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens_BL": ((4, 48), np.int32),
        "targets_BL": ((4, 48), np.int32),
        "positions_BL": ((4, 48), np.int32),
        "segments_BL": ((4, 48), np.int32),
        "domains_BL": ((4, 48), np.int8),
    }
    assert state == json.loads(json.dumps(state)) and state["windows"] == 4
    assert set(dataset.domains) == {"odd", "even"} and len(dataset.hash) == 16


def test_resume_is_bitwise_across_json_and_epochs(dataset, config):
    per_epoch = dataset.parts[0].training_windows(48, dataset.tokenizer.end_of_text, (3, 0)).windows_per_epoch
    count = 2 * per_epoch // config.batch_size + 3
    whole = take(train_stream(dataset, config, seed=3), count)
    for stop in (1, per_epoch // config.batch_size, count - 2):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        rest = take(train_stream(dataset, config, seed=3, state=state), count - stop)
        assert all(same(a[0], b[0]) and a[1] == b[1] for a, b in zip(whole[stop:], rest, strict=True))


def test_an_epoch_holds_every_stored_token_once(dataset, config):
    per_epoch = dataset.parts[0].training_windows(48, dataset.tokenizer.end_of_text, (0, 0)).windows_per_epoch
    one = dataclasses.replace(config, batch_size=1)
    batches = [batch for batch, _ in take(train_stream(dataset, one, seed=0), per_epoch)]
    used = sum(int((batch["segments_BL"] > 0).sum()) for batch in batches)
    assert used == dataset.train_tokens
    counts = np.bincount(np.concatenate([b["tokens_BL"][b["segments_BL"] > 0] for b in batches]))
    shards = dataset.parts[0].shards["train"]
    stored = np.concatenate([shards.read(d) for d in range(len(shards))])
    assert counts.tolist() == np.bincount(stored).tolist()


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1, 2, 3]]])
def test_processes_read_their_rows_of_one_global_order(dataset, config, parts):
    whole = take(train_stream(dataset, config, seed=1), 30)
    streams = [take(train_stream(dataset, config, seed=1, rows=rows), 30) for rows in parts]
    for n, (batch, state) in enumerate(whole):
        for rows, stream in zip(parts, streams):
            assert same({name: array[rows] for name, array in batch.items()}, stream[n][0])
            assert stream[n][1] == state
    # A run stopped on two processes continues on one.
    assert same(next(iter(train_stream(dataset, config, seed=1, state=streams[1][9][1])))[0], whole[10][0])


def hashes(batch) -> list[str]:
    """The hash of every window of a batch."""
    rows = zip(*(batch[name] for name in sorted(batch)))
    return [hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in row)).hexdigest() for row in rows]


@pytest.mark.parametrize("before, after, workers", [(2, 4, 0), (4, 1, 2), (1, 2, 3)])
def test_each_window_is_read_by_one_process_once_though_their_number_changes(dataset, config, before, after, workers):
    # 15 batches on `before` processes without threads, then 15 on `after` processes with `workers` threads.
    def run(count, config, state, batches):
        share = config.batch_size // count
        rows = [range(p * share, (p + 1) * share) for p in range(count)]
        return [take(train_stream(dataset, config, seed=3, rows=r, state=state), batches) for r in rows]

    first = run(before, config, None, 15)
    second = run(after, dataclasses.replace(config, workers=workers), first[-1][-1][1], 15)
    expected = [h for batch, _ in take(train_stream(dataset, config, seed=3), 30) for h in hashes(batch)]
    found = [
        h for part in (first, second) for batches in zip(*part, strict=True) for b, _ in batches for h in hashes(b)
    ]
    assert found == expected and len(found) == 30 * config.batch_size
    # Within an epoch no window comes twice: that is what "once" means, beside the order.
    one_epoch = found[: dataset.parts[0].training_windows(config.sequence_length, 0, (3, 0)).windows_per_epoch]
    assert len(set(one_epoch)) == len(one_epoch)


def test_threads_change_nothing(dataset, config):
    ahead = dataclasses.replace(config, workers=3)
    for a, b in zip(
        take(train_stream(dataset, config, seed=2), 25), take(train_stream(dataset, ahead, seed=2), 25), strict=True
    ):
        assert same(a[0], b[0]) and a[1] == b[1]


def test_seed_decides_the_order(dataset, config):
    first = next(iter(train_stream(dataset, config, seed=0)))[0]
    assert same(first, next(iter(train_stream(dataset, config, seed=0)))[0])
    assert not same(first, next(iter(train_stream(dataset, config, seed=1)))[0])


@pytest.mark.parametrize(
    "other, seed", [({"sequence_length": 32}, 0), ({}, 1), ({"sources": (Files(paths=("x",), weight=2.0),)}, 0)]
)
def test_a_state_of_another_stream_is_refused(dataset, config, other, seed):
    _, state = next(iter(train_stream(dataset, config, seed=0)))
    with pytest.raises(ValueError, match="belongs to stream"):
        train_stream(dataset, dataclasses.replace(config, **other), seed=seed, state=state)


def test_batch_size_may_change_on_resume(dataset, config):
    whole = take(train_stream(dataset, config, seed=0), 4)
    double = dataclasses.replace(config, batch_size=8)
    batch, state = next(iter(train_stream(dataset, double, seed=0, state=whole[1][1])))
    assert state["windows"] == 16
    assert np.array_equal(batch["tokens_BL"], np.concatenate([whole[2][0]["tokens_BL"], whole[3][0]["tokens_BL"]]))


@pytest.mark.parametrize("rows", [[], [0, 0], [1, 0], [3, 4], [-1]])
def test_rows_must_be_of_the_batch(dataset, config, rows):
    with pytest.raises(ValueError, match=r"rows = .*; allowed: ascending numbers from 0 to 3"):
        train_stream(dataset, config, seed=0, rows=rows)


def test_validation_predicts_every_byte_of_every_document(dataset, config):
    for domain in dataset.domains:
        texts = dataset.validation_text(domain)
        predicted = {}
        for batch in validation_batches(dataset, config, domain, batch_size=4):
            used = batch["segments_BL"] > 0
            assert batch["documents_BL"].shape == (4, 48)
            assert (batch["documents_BL"][~used] == -1).all()
            assert (batch["domains_BL"][used] == dataset.domains.index(domain)).all()
            for number, target in zip(
                batch["documents_BL"][used].tolist(), batch["targets_BL"][used].tolist(), strict=True
            ):
                predicted.setdefault(number, []).append(target)
        assert sorted(predicted) == list(range(len(texts)))
        for number, text in enumerate(texts):
            assert predicted[number][-1] == dataset.tokenizer.end_of_text
            assert dataset.tokenizer.decode(predicted[number][:-1]) == text


def test_validation_limits(dataset, config):
    full = list(validation_batches(dataset, config, "odd", batch_size=2))
    some = list(validation_batches(dataset, config, "odd", batch_size=2, max_tokens=100))
    assert len(some) == 2 and same(some[0], full[0])
    assert sum(int((batch["segments_BL"].sum(1) > 0).sum()) for batch in some) == 3
    with pytest.raises(ValueError, match="domain = 'oddd'; allowed: "):
        list(validation_batches(dataset, config, "oddd", batch_size=2))
    with pytest.raises(ValueError, match="batch_size = 0"):
        list(validation_batches(dataset, config, "odd", batch_size=0))


def test_describe_is_json_and_adds_up(dataset, config, records):
    facts = json.loads(json.dumps(dataset.describe()))
    lines = [json.loads(line) for line in open(records, encoding="utf-8")]
    for domain in dataset.domains:
        mine = [record["text"] for record in lines if record["domain"] == domain]
        splits = facts["domains"][domain]
        assert splits["train"]["documents"] + splits["validation"]["documents"] == len(mine)
        assert splits["train"]["bytes"] + splits["validation"]["bytes"] == sum(len(text.encode()) for text in mine)
        assert sorted(dataset.training_text(domain) + dataset.validation_text(domain)) == sorted(mine)
    assert sum(d["train"]["tokens"] for d in facts["domains"].values()) == dataset.train_tokens == facts["train_tokens"]
    assert sum(d["validation"]["documents"] for d in facts["domains"].values()) == 24
    assert facts["parts"][0]["bytes_exact"] is True
    assert set(facts["parts"][0]["overlap_13gram"]["odd"]) == {"found", "total", "share"}


def test_prepared_work_is_reused_and_found_without_the_input(records, tmp_path):
    source = tmp_path / "copy.jsonl"
    shutil.copy(records, source)
    config = DataConfig(
        sources=(Files(paths=(str(source),)),), tokenizer=BPE(vocab_size=300), directory=str(tmp_path / "data")
    )
    lines = []
    first = prepare(config, report=lines.append)
    assert any("training BPE" in line for line in lines)
    lines.clear()
    again = prepare(config, report=lines.append)
    assert again.hash == first.hash and not any(line.startswith(("tokens:", "tokenizer:", "corpus:")) for line in lines)
    # The corpus is needed only to make shards.
    shutil.rmtree(tmp_path / "data" / "corpus")
    assert prepare(config, report=quiet).hash == first.hash
    # The same content under another name is the same data; other content is not.
    with open(source, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    assert prepare(config, report=quiet).hash != first.hash


def test_shards_serve_a_machine_without_the_source(dataset, config, monkeypatch):
    def missing(self):
        raise MissingSource("the package 'x' is not installed")

    monkeypatch.setattr(Files, "fingerprint", missing)
    lines = []
    assert prepare(config, report=lines.append).hash == dataset.hash
    assert "not installed" in lines[0] and "token shards" in lines[1]
    with pytest.raises(MissingSource):
        prepare(dataclasses.replace(config, tokenizer=BPE(vocab_size=301)), report=quiet)


def test_mixture_follows_the_weights(records, tmp_path, dataset, config):
    mixed_config = DataConfig(
        sources=(dataclasses.replace(config.sources[0], weight=3.0), Markov(weight=1.0, length=31)),
        tokenizer=Bytes(),
        sequence_length=256,
        batch_size=8,
        directory=str(tmp_path),
    )
    mixed = prepare(mixed_config, report=quiet)
    assert mixed.train_tokens == UNLIMITED
    markov = mixed.domains.index("markov")
    batches = [batch for batch, _ in take(train_stream(mixed, mixed_config, seed=0), 100)]
    share = np.mean([(batch["domains_BL"][:, 0] == markov).mean() for batch in batches])
    assert abs(share - 0.25) < 0.01
    resumed = train_stream(
        mixed, mixed_config, seed=0, state=take(train_stream(mixed, mixed_config, seed=0), 41)[-1][1]
    )
    assert same(next(iter(resumed))[0], batches[41])
    # Sources differ in their weights only: nothing is made again.
    assert pipeline.stream_identity(mixed, mixed_config, 0) != pipeline.stream_identity(
        mixed, dataclasses.replace(mixed_config, sources=(config.sources[0], mixed_config.sources[1])), 0
    )


def test_two_planted_sources_stream_and_validate(tmp_path):
    config = DataConfig(
        sources=(KHop(validation_documents=20), Recall(validation_documents=10)),
        tokenizer=PlantedVocabulary(),
        sequence_length=128,
        batch_size=4,
        directory=str(tmp_path),
    )
    data = prepare(config, report=quiet)
    whole = take(train_stream(data, config, seed=0), 40)
    part = take(train_stream(data, config, seed=0, rows=[1, 3], state=whole[19][1]), 5)
    for a, b in zip(whole[20:25], part, strict=True):
        assert np.array_equal(a[0]["tokens_BL"][1::2], b[0]["tokens_BL"])
    for domain, count in (("k_hop", 20), ("recall", 10)):
        batches = list(validation_batches(data, config, domain, batch_size=3))
        numbers = np.unique(np.concatenate([batch["documents_BL"].ravel() for batch in batches]))
        assert numbers.tolist() == list(range(-1, count))
    json.dumps(data.describe())
