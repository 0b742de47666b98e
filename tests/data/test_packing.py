"""Windows over a stream of documents: every token once, targets that follow, segments and positions that restart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.data import packing

END = 0


class Documents:
    """Stands in for token shards: document d is [END, unique ids ...]."""

    def __init__(self, lengths):
        self.lengths_d = np.array(lengths, np.int64)
        self.domains_d = (np.arange(len(lengths)) % 3).astype(np.int8)
        starts = np.cumsum(self.lengths_d) - self.lengths_d
        self.ids = [np.arange(start + 1, start + 1 + n).astype(np.uint16) for start, n in zip(starts, lengths)]
        for ids in self.ids:
            ids[0] = END

    def __len__(self):
        return len(self.lengths_d)

    def read(self, document, start=0, stop=None):
        return self.ids[document][start:stop]


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)
windows = st.integers(2, 25)


def check_row(row, documents, L):
    """Checks one window against the documents it was cut from."""
    used = row["segments_BL"] > 0
    assert {name: array.shape for name, array in row.items() if name != "documents_BL"} == dict.fromkeys(
        ["tokens_BL", "targets_BL", "positions_BL", "segments_BL", "domains_BL"], (L,)
    )
    assert not (np.diff(used.astype(int)) > 0).any(), "padding only at the end"
    owner = {int(i): d for d, ids in enumerate(documents.ids) for i in ids[1:]}
    for segment in range(1, row["segments_BL"].max() + 1):
        at = np.flatnonzero(row["segments_BL"] == segment)
        assert (np.diff(at) == 1).all() and len(at)
        assert row["positions_BL"][at].tolist() == list(range(len(at)))
        assert not (row["tokens_BL"][at[1:]] == END).any(), "a document begins only at a segment's start"
        if segment > 1:
            assert row["tokens_BL"][at[0]] == END, "only a window's first segment may continue a document"
        assert (row["targets_BL"][at[:-1]] == row["tokens_BL"][at[1:]]).all()
        owners = {owner[int(i)] for i in row["tokens_BL"][at] if i != END}
        assert len(owners) <= 1
        for document in owners:
            assert (row["domains_BL"][at] == documents.domains_d[document]).all()
            last = row["tokens_BL"][at[-1]]
            ids = documents.ids[document]
            if last != END:
                place = int(np.flatnonzero(ids == last)[0])
                expected = ids[place + 1] if place + 1 < len(ids) else END
                assert row["targets_BL"][at[-1]] == expected


@given(lengths, windows, st.integers(0, 3), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_every_token_once_per_epoch(document_lengths, L, seed, epoch):
    documents = Documents(document_lengths)
    stream = packing.StoredWindows(documents, L, END, (seed, 0))
    seen = []
    for index in range(stream.windows_per_epoch):
        row = stream[epoch * stream.windows_per_epoch + index]
        check_row(row, documents, L)
        seen += row["tokens_BL"][row["segments_BL"] > 0].tolist()
    assert sorted(seen) == sorted(np.concatenate(documents.ids).tolist())


@given(lengths, windows, st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_validation_counts_each_token_once_in_order(document_lengths, L, overlap):
    documents, overlap = Documents(document_lengths), min(overlap, L - 1)
    every = np.arange(len(documents))
    rows = list(packing.validation_rows(documents, every, L, END, numbers_from=7, overlap=overlap))
    for i, row in enumerate(rows):
        check_row(row, documents, L)
        context = (np.arange(L) < overlap) & (i > 0)
        assert ((row["documents_BL"] == -1) == ((row["segments_BL"] == 0) | context)).all()
        if i:
            assert row["tokens_BL"][:overlap].tolist() == rows[i - 1]["tokens_BL"][L - overlap :].tolist()
    tokens, targets, numbers = (
        np.concatenate([row[name][row["documents_BL"] >= 0] for row in rows])
        for name in ("tokens_BL", "targets_BL", "documents_BL")
    )
    stored = np.concatenate(documents.ids)
    assert tokens.tolist() == stored.tolist()
    assert targets.tolist() == [*stored[1:].tolist(), END]
    assert (np.bincount(numbers - 7, minlength=len(documents)) == documents.lengths_d).all()
    # Each document is predicted whole and ends in end_of_text.
    for d, ids in enumerate(documents.ids):
        assert targets[numbers == d + 7].tolist() == [*ids[1:].tolist(), END]


def test_epochs_differ_and_repeat_exactly():
    documents = Documents([9, 4, 17, 30, 2, 8, 25, 3])
    stream = packing.StoredWindows(documents, 8, END, (1, 0))
    W = stream.windows_per_epoch

    def epoch(number, stream=stream):
        return [stream[number * W + i]["tokens_BL"].tolist() for i in range(W)]

    again = packing.StoredWindows(documents, 8, END, (1, 0))
    assert epoch(3) == epoch(3, again)
    assert epoch(0) == epoch(0, again), "an epoch that was dropped from memory comes back the same"
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, packing.StoredWindows(documents, 8, END, (2, 0)))
    assert epoch(0) != epoch(0, packing.StoredWindows(documents, 8, END, (1, 1)))


def test_windows_are_shuffled_not_only_documents():
    documents = Documents([400])
    stream = packing.StoredWindows(documents, 8, END, (0, 0))
    firsts = [int(stream[i]["tokens_BL"][0]) for i in range(stream.windows_per_epoch)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_stored_types_become_int32(dtype):
    row = packing.row_from_pieces([np.array([0, 5, 6], dtype)], [2], 9, 5, END)
    assert row["tokens_BL"].tolist() == [0, 5, 6, 0, 0] and row["targets_BL"].tolist() == [5, 6, 9, 0, 0]
    assert row["tokens_BL"].dtype == row["targets_BL"].dtype == np.int32 and row["domains_BL"].dtype == np.int8
