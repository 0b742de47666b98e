"""The report shows what a run directory holds, leaves out what it does not, and asks nothing of the network."""

import html.parser
import json
import re
import warnings

import numpy as np
import pytest

from sparse_lm.evaluate import report, report_figures, report_page
from sparse_lm.evaluate.run_files import Run
from sparse_lm.train.metrics import JsonLines

DOCUMENTS = {
    "config.json": {
        "schema": 1,
        "recipe": {"name": "tiny", "seed": 3, "model": {"layers": 2, "attention": {"window": None}}},
    },
    "environment.json": {
        "python": "3.12.1",
        "device_kind": "NVIDIA H100 80GB HBM3",
        "devices": 8,
        "packages": {"jax": "0.11.2"},
    },
    "accounting.json": [
        {
            "component": "experts",
            "parameters": 3000,
            "active_parameters": 1000,
            "flops_per_token": 6000.0,
            "bytes": 12000,
        },
        {
            "component": "attention_scores",
            "parameters": 0,
            "active_parameters": 0,
            "flops_per_token": 2000.0,
            "bytes": 0,
        },
    ],
    "data.json": {"hash": "abc", "domains": {"speeches": {"train": {"documents": 12, "tokens": 34567}}}},
    "evaluation.json": {
        "domains": {
            "speeches": {
                "bits_per_byte": 1.5,
                "interval": [1.4, 1.6],
                "xz_bits_per_byte": 2.0,
                "xz_primed_bits_per_byte": 1.3,
                "loss": 3.0,
                "perplexity": 20.1,
            }
        }
    },
    "sparsity.json": {
        "matrices": [
            {"path": f"blocks.{n}.attention.query.weight", "shape": [20, 50], "matrices": 1, "kept": 250 - 100 * n}
            for n in range(2)
        ],
        "dense": {"head": "head"},
        "dense_operations": 6000.0,
        "allocations": {"erk": {"weights": 400.0, "operations": 2800.0}},
        "masked": True,
    },
    "samples.json": [{"prompt": "Fellow <citizens>", "text": "Fellow <citizens> & friends"}],
    "memory.json": {
        "step": 60,
        "counted_steps": 60,
        "tables": {
            "1": {
                "rows": 10_344_164,
                "touched": 0.25,
                "batch_rows": 1234.5,
                "batch_addresses": 4096,
                "distinct_ngrams": 900,
                "collisions": 0.0125,
                "expected_collisions": 0.0123,
                "full_collisions": 0.0,
            }
        },
        "domains": {
            "speeches": {
                "tokens": 700,
                "loss": 2.5,
                "loss_without": 2.75,
                "buckets": [
                    {"from": 0, "tokens": 500, "loss": 3.0, "loss_without": 3.0},
                    {"from": 4, "tokens": 200, "loss": 1.25, "loss_without": 2.125},
                ],
                "top": [{"text": " <i>the state", "tokens": 40, "gain": 35.5}],
                "top_gates": {"1": [{"text": "\nof the", "tokens": 12, "gate": 0.875}]},
            }
        },
    },
}

ABOUT = (
    "Configuration",
    "Environment",
    "Parameters and operations",
    "Data",
    "Against a compressor",
    "Weight sparsity",
    "Samples",
    "Memory",
)
"""The section of each document."""


def write_run(directory, steps=6, members=None, without=()):
    directory.mkdir(exist_ok=True)
    for name, document in DOCUMENTS.items():
        if name not in without:
            (directory / name).write_text(json.dumps(document))
    if "metrics.jsonl" in without:
        return directory
    lines = JsonLines(directory / "metrics.jsonl")

    def value(x):
        return [x + 0.1 * i for i in range(members)] if members else x

    for step in range(10, 10 * steps + 1, 10):
        totals = {"step": step, "tokens": 4096 * step, "seconds": 0.5 * step, "flops": 1e9 * step}
        loss = None if step == 30 else 9.0 / step
        measured = {
            "loss": value(loss) if loss else loss,
            "learning_rate": value(1e-3),
            "grad_norm": value(1.0),
            "skipped": 0,
        }
        timed = {"tokens_per_s": 8192.0, "step_s": 0.5, "data_wait_s": 0.01, "mfu": 0.4}
        load = [0.5, 0.25, 0.125, 0.125]
        experts = {
            "router/blocks.10/load": [load] * members if members else load,
            "router/blocks.10/max_violation": value(1.0),
        }
        experts |= {
            "router/blocks.2/load": [load] * members if members else load,
            "router/blocks.2/max_violation": value(0.5),
            "memory/blocks.1/gate": value(0.4),
        }
        layers, bins = [0.25, 0.15], [0.0, 0.5, 0.5, 0.0]
        experts |= {
            "sparsity/density": value(0.2),
            "sparsity/requested": value(0.2),
            "sparsity/mean_density": value(0.3),
            "sparsity/mean_flops_per_token": value(9000.0),
            "sparsity/attention.query/density": [layers] * members if members else layers,
            "sparsity/attention.query/fan_in": [bins] * members if members else bins,
        }
        lines.write({"kind": "train"} | totals | measured | timed | (experts if step > 10 else {}))
        domains = {"speeches": {"loss": value(8.0 / step), "bits_per_byte": value(1.0)}}
        lines.write({"kind": "validation"} | totals | {"domains": domains, "loss": value(8.0 / step)})
    if "sparsity.json" not in without:
        (directory / "sparsity").mkdir(exist_ok=True)
        picture = np.zeros((4, 5), np.float16)
        np.savez(directory / "sparsity" / "60.npz", **{"blocks.0.attention.query.weight": picture})
    lines.write({"kind": "event", "step": 20, "event": "skipped", "groups": ["blocks"]})
    lines.close()
    return directory


class Outline(html.parser.HTMLParser):
    """Checks nesting and collects headings, text, ids and whatever could load something."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, source):
        super().__init__()
        self.open, self.words, self.ids, self.links, self.headings = [], [], [], [], []
        self.feed(source)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = report.write_report(write_run(tmp_path_factory.mktemp("run")), extra={"starts": 2})
    assert path.name == "report.html"
    return Outline(path.read_text()), path.read_text()


def test_every_section_is_there_with_its_numbers(whole):
    outline, _ = whole
    assert outline.headings == [heading for heading, _ in report.SECTIONS]
    for words in (
        "tiny",
        "60 steps, 246k tokens, 30s of training",
        "8 x NVIDIA H100 80GB HBM3",
        "1.500 bits per byte, speeches, 25% below xz",
        "40.0% MFU, median",
        "3k parameters, 1k active",
        "2 starts",
        "1.500 (1.400 to 1.600)",
        "20.0%",  # the upper end of the interval, 1.6, against 2.0
        "attention scores",
        "34,567",
        "15.0% to 25.0%",  # 150 and 250 of 1000
        "Mean density over training 30.00%; at the end 20.00%",
        "3k on average, 50% of the dense model's 6k",  # 9000 / 3 of 6000
        "2 to 3",  # a bin of the fan-in
        "model.attention.window",
        "groups blocks",
        "10,344,164",
        "4+ times 200 1.250 2.125 0.875",
        "' <i>the state' 40 35.5",
        "The gate of block 1 is widest after",
        r"'\nof the' 12 0.88",
    ):
        assert words in outline.text, words


def test_nothing_is_loaded_and_text_is_escaped(whole):
    outline, source = whole
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    assert not re.search(r"url\((?!#)|@import|<script|<img(?! alt=\"[^\"]*\" src=\"data:)", source)
    assert "<b>Fellow &lt;citizens&gt;</b> &amp; friends" in source
    assert len(outline.ids) == len(set(outline.ids))


def test_no_colour_of_a_figure_is_fixed(whole):
    _, source = whole
    assert source.count("<svg viewBox") > 8
    drawings = re.findall(r"<svg viewBox=.*?</svg>", source, flags=re.DOTALL)
    assert not [colour for drawing in drawings for colour in re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", drawing)]
    assert "DejaVu" not in source


@pytest.mark.parametrize(("name", "heading"), list(zip(DOCUMENTS, ABOUT)))
def test_any_file_may_be_missing(tmp_path, name, heading):
    path = report.write_report(write_run(tmp_path / "run", without=("metrics.jsonl", name)))
    expected = [other for other, _ in report.SECTIONS if other in ABOUT and other != heading]
    assert Outline(path.read_text()).headings == expected


def test_metrics_alone_suffice(tmp_path):
    path = report.write_report(write_run(tmp_path / "run", steps=2, without=DOCUMENTS))
    assert Outline(path.read_text()).headings == ["Learning", "Experts", "Memory", "Speed"]


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing to report"):
        report.write_report(tmp_path)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_population_and_a_run_that_has_just_begun(tmp_path, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Outline(report.write_report(write_run(tmp_path / "run", steps=steps, members=3)).read_text()).text
    assert "a population of 3" in text and "training, mean of 3" in text


def test_layers_are_in_their_order_and_members_are_averaged(tmp_path):
    run = Run(write_run(tmp_path / "run", members=2))
    worst = run.per_layer("max_violation")
    assert list(worst) == ["blocks.2", "blocks.10"]
    np.testing.assert_allclose(worst["blocks.2"], [np.nan, 0.55, 0.55, 0.55, 0.55, 0.55])
    np.testing.assert_allclose(run.per_layer("load")["blocks.10"][-1], [0.5, 0.25, 0.125, 0.125])


def test_thinning_and_smoothing_keep_means():
    x, y = np.arange(5003.0), np.random.default_rng(0).normal(size=5003)
    thin_x, thin_y = report_figures.thin(x, y)
    assert len(thin_x) == report_figures.POINTS and abs(thin_y.mean() - y.mean()) < 1e-3
    np.testing.assert_allclose(report_figures.smooth(x), x)  # a symmetric window leaves a straight line alone
    assert report_figures.smooth(y).std() < 0.3 * y.std()


def test_nested_values_are_flattened():
    nested = {"a": {"b": [1, 2], "c": [{"d": None}, {"d": True}]}, "n": 123456, "e": {}}
    assert report_page.flatten(nested) == [
        ("a.b", "1, 2"),
        ("a.c.0.d", "none"),
        ("a.c.1.d", "yes"),
        ("n", "123,456"),
        ("e", "none"),
    ]
