"""Tokenizers: lossless, exact in bytes, the same file for the same text, special strings kept as text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.data.tokenizer import BPE, END_OF_TEXT, Bytes, HuggingFace

TEXTS = [f"Sentence number {i}: the house of Ünïcode, <|endoftext|> and 2024 numbers.\n" * 3 for i in range(60)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "t.json"
    BPE(vocab_size=400).build(path, iter(TEXTS), [])
    return path, BPE(vocab_size=400).load(path)


@pytest.fixture(scope="module")
def encoders(bpe, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "t.json"
    Bytes().build(path, [], [])
    return [bpe[1], Bytes().load(path), HuggingFace(path=str(bpe[0])).load(bpe[0])]


@given(
    text=st.text(max_size=80)
    | st.sampled_from([END_OF_TEXT, f"a{END_OF_TEXT}b", " leading", "tabs\t\n\n", "日本語 🙂", "12345"])
)
@settings(max_examples=150, deadline=None)
def test_round_trip_and_bytes(encoders, text):
    for encoder in encoders:
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text
        assert encoder.end_of_text not in ids.tolist()
        assert int(encoder.token_bytes_V[ids].sum()) == len(text.encode())


def test_vocabulary(encoders):
    for encoder in encoders:
        assert encoder.token_bytes_V.shape == (encoder.vocab_size,) and encoder.token_bytes_V.dtype == np.int32
        assert encoder.token_bytes_V[encoder.end_of_text] == 0
        assert 0 <= encoder.end_of_text < encoder.vocab_size
        assert len(encoder.hash) == 64
        assert encoder.decode([encoder.end_of_text, *encoder.encode("x")]) == "x"
    assert encoders[1].vocab_size == 257
    assert encoders[0].vocab_size <= 400


def test_training_learns_and_repeats(bpe, tmp_path):
    path, encoder = bpe
    assert len(encoder.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    BPE(vocab_size=400).build(tmp_path / "again.json", iter(TEXTS), [])
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert BPE().load(path).hash == BPE().load(tmp_path / "again.json").hash


def test_digits_stay_single(bpe):
    assert len(bpe[1].encode("2024")) == 4


def test_batch_equals_singles(bpe):
    batch = bpe[1].encode_batch(TEXTS[:7])
    assert all(np.array_equal(a, bpe[1].encode(t)) for a, t in zip(batch, TEXTS))


def test_missing_end_of_text_is_named(bpe):
    with pytest.raises(ValueError, match=r"no token '</s>'.*<\|endoftext\|>"):
        HuggingFace(path=str(bpe[0]), end_of_text="</s>").load(bpe[0])


def test_sentencepiece_style_bytes(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {"</s>": 0, "\u2581the": 1, "\u2581": 2, "é": 3, **{f"<0x{b:02X}>": 4 + b for b in range(256)}}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token=None))
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens([AddedToken("</s>", special=True)])
    (tmp_path / "t.json").write_text(library.to_str())
    encoder = HuggingFace(path=str(tmp_path / "t.json"), end_of_text="</s>").load(tmp_path / "t.json")
    assert encoder.token_bytes_V[:6].tolist() == [0, 4, 1, 2, 1, 1]
    assert encoder.decode([1, 3]) == " theé"


def test_fingerprint_follows_content(bpe, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe[0].read_bytes())
    assert HuggingFace(path=str(copy)).fingerprint() == HuggingFace(path=str(bpe[0])).fingerprint()
    changed = json.loads(copy.read_text())
    changed["version"] = "1.1"
    copy.write_text(json.dumps(changed))
    assert HuggingFace(path=str(copy)).fingerprint() != HuggingFace(path=str(bpe[0])).fingerprint()
