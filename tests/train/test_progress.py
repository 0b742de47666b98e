"""The console shows what rows say: aligned lines off a terminal, a live picture on one, nothing when switched off."""

import io

import pytest
import rich.console

from sparse_lm.train import progress


def shown(mode="auto", terminal=False, total=400):
    now = [0.0]
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    return progress.Progress("quickstart", total, mode=mode, console=console, clock=lambda: now[0]), stream, now


def train(step, **changes):
    row = {
        "kind": "train",
        "step": step,
        "loss": 9.0,
        "grad_norm": 1.25,
        "learning_rate": 3e-4,
        "tokens_per_s": 48312.0,
    }
    return row | {"step_s": 0.5, "data_wait_s": 0.005, "mfu": None, "skipped": 0} | changes


def test_lines_are_aligned_and_complete():
    display, stream, now = shown()
    with display:
        display.start(note="hello")
        for step in (10, 20):
            now[0] += 5.0
            display.update(train(step))
        display.validation(
            {
                "step": 20,
                "bits_per_byte": 1.8,
                "domains": {"speeches": {"bits_per_byte": 1.9}, "api-docs": {"bits_per_byte": 1.7}},
            }
        )
        display.event("saved at step 20")
        display.update(train(30, skipped=2, mfu=0.412))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1].split() == ["step", "loss", "grad", "norm", "rate", "tokens/s", "a", "step", "wait", "MFU", "left"]
    # 0.5 s x 390 steps left by the row's own pace; then 10 steps in 5 s
    assert lines[2].split() == ["10/400", "9.0000", "1.25", "3.00e-04", "48.3k", "500ms", "1.0%", "–", "3m15s"]
    assert lines[3].split()[-1] == "3m10s"
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert lines[4] == "validation at step 20: api-docs 1.700, speeches 1.900, all 1.800 bits per byte"
    assert lines[5] == "saved at step 20"
    assert lines[6].endswith("2 skipped") and "41.2%" in lines[6]


def test_a_population_shows_the_mean_of_its_finite_members():
    display, stream, _ = shown("lines")
    display.start()
    display.update(train(10, loss=[2.0, None, 4.0], learning_rate=[1e-3, 1e-3, 1e-3]))
    display.validation({"step": 10, "loss": [1.0, 2.0], "domains": {}})
    assert " 3.0000 " in stream.getvalue()
    assert "validation at step 10: all 1.500 loss" in stream.getvalue()


def test_live_display_shows_progress_and_leaves_its_last_state():
    display, stream, _ = shown(terminal=True)
    assert display.mode == "live"
    display.start()
    display.update(train(400))
    display.close("done")
    display.close()
    text = stream.getvalue()
    assert "400/400" in text and "48.3k" in text and text.rstrip().endswith("done")


def test_off_is_silent():
    display, stream, _ = shown("off")
    with display:
        display.start(note="hello")
        display.update(train(10))
        display.validation({"step": 10, "loss": 1.0})
        display.event("saved")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (7, "7"), (999.7, "1k"), (48312, "48.3k"), (999_700, "1M"), (1.25e9, "1.25G"), (3e13, "30T")],
)
def test_counts(value, text):
    assert progress.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (367_200, "4d06h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
