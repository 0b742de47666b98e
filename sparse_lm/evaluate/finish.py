"""What happens after the last step: evaluate every domain beside a compressor, write samples and the report, say it in a table."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparse_lm.data.dataset import Dataset
from sparse_lm.evaluate.compression import PRIMING_BYTES, Compression
from sparse_lm.evaluate.generate import Generator, Sampling, encode_prompt
from sparse_lm.evaluate.load import Loaded, open_run
from sparse_lm.evaluate.perplexity import chosen_domains, evaluate_domain
from sparse_lm.evaluate.report import write_report
from sparse_lm.train.validation import build_eval_step

SAMPLES = 3
"""Prompts that a finished run answers."""

SAMPLE_TOKENS = 120
"""Tokens of each answer."""

PROMPT_WORDS = 8
"""Words of a validation document that make a prompt."""

SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""How the samples of a finished run are drawn."""


def evaluate(
    loaded: Loaded,
    domains: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    priming_bytes: int = PRIMING_BYTES,
) -> dict[str, Any]:
    """Evaluates domains and compresses the same text meanwhile.

    Args:
      loaded: from `open_run`; of a population, every member is evaluated at once.
      domains: which; empty: all.
      batch_size: sequences in a batch; None: the recipe's validation.batch_size.
      max_tokens: stop each domain after so many tokens; None: all documents. The compressor reads the documents that were begun.
      priming_bytes: most training text of a domain that primes xz; 0: no primed xz.

    Returns:
      The content of evaluation.json: {"step", "averaged", "domains": {name: `perplexity.evaluate_domain` and `Compression.row`}}.

    Raises:
      ValueError: for an unknown domain.
    """
    names = chosen_domains(loaded, domains)
    eval_step = build_eval_step(loaded.definition, loaded.population)

    def measure(domain: str) -> dict[str, Any]:
        return evaluate_domain(loaded, domain, eval_step=eval_step, batch_size=batch_size, max_tokens=max_tokens)

    if max_tokens is None:
        with Compression(loaded.dataset, dict.fromkeys(names), priming_bytes=priming_bytes) as compression:
            rows = {domain: measure(domain) for domain in names}
            rows = {domain: {**row, **compression.row(domain)} for domain, row in rows.items()}
    else:
        rows = {domain: measure(domain) for domain in names}
        read = {domain: row["documents"] for domain, row in rows.items()}
        with Compression(loaded.dataset, read, priming_bytes=priming_bytes) as compression:
            rows = {domain: {**row, **compression.row(domain)} for domain, row in rows.items()}
    return {"step": loaded.step, "averaged": loaded.averaged, "domains": rows}


def sample_prompts(dataset: Dataset, count: int = SAMPLES, words: int = PROMPT_WORDS) -> list[tuple[str, str]]:
    """Returns (domain, prompt) pairs: the first words of validation documents, taking the domains in turn."""
    openings: dict[str, list[str]] = {}
    for domain in dataset.domains:
        found = (opening(text, words) for text in dataset.validation_text(domain))
        openings[domain] = [text for text in found if text]
    pairs: list[tuple[str, str]] = []
    for turn in range(count):
        for domain, texts in openings.items():
            # From the middle of the split: the first documents in order are often the oldest or the shortest.
            index = len(texts) // 2 + turn
            if index < len(texts) and len(pairs) < max(count, min(len(openings), count)):
                pairs.append((domain, texts[index]))
    return pairs


def opening(text: str, words: int) -> str:
    """Returns the first words of a text as they stand, white space between them kept; empty for a shorter text."""
    pieces = text.split(maxsplit=words)
    return text[: len(text) - len(pieces[words])].rstrip() if len(pieces) > words else ""


def draw_samples(loaded: Loaded, prompts: Sequence[tuple[str, str]], *, seed: int = 0) -> list[dict[str, str]]:
    """Returns the content of samples.json: [{"prompt", "text", "domain"}], text with its prompt."""
    if not prompts:
        return []
    encoder, longest = loaded.dataset.tokenizer, loaded.recipe.data.sequence_length
    ids = [encode_prompt(encoder, prompt) for _, prompt in prompts]
    tokens = min(SAMPLE_TOKENS, max(1, longest - max(map(len, ids))))
    generator = Generator(loaded.definition, loaded.params, loaded.model_state, encoder.end_of_text)
    rows = generator.generate(ids, tokens, SAMPLING, seed=seed)
    return [
        {"prompt": prompt, "text": prompt + continuation(encoder, row, len(start)), "domain": domain}
        for (domain, prompt), start, row in zip(prompts, ids, rows)
    ]


def continuation(encoder: Any, row: np.ndarray, prompt_length: int) -> str:
    """Returns the text that follows the prompt's tokens."""
    return encoder.decode(row)[len(encoder.decode(row[:prompt_length])) :]


def best_member(evaluation: dict[str, Any]) -> int:
    """Returns the member of a population with the lowest loss, domains weighted by tokens; 0 for a single model."""
    rows = [row for row in evaluation["domains"].values() if "members" in row]
    if not rows:
        return 0
    totals = sum(np.array(row["members"]["loss"]["values"]) * row["tokens"] for row in rows)
    return int(np.nanargmin(totals))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def summary(evaluation: dict[str, Any]) -> Table:
    """Returns the table of an evaluation."""
    table = Table(title=f"Held-out text after step {evaluation['step']}", title_justify="left")
    rows = evaluation["domains"]
    table.add_column("domain")
    population = any("members" in row for row in rows.values())
    spread = ["± members"] if population else []
    columns = ["bits per byte", "95% interval", *spread, "xz -9", "below xz", "xz primed", "loss", "perplexity"]
    for column in [*columns, "tokens", "documents"]:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        low, high = row["interval"] or (None, None)
        plain, primed = row.get("xz_bits_per_byte"), row.get("xz_primed_bits_per_byte")
        deviation = (
            [_form(row["members"]["bits_per_byte"]["deviation"], ".4f")] if "members" in row else spread and [""]
        )
        table.add_row(
            name,
            f"{row['bits_per_byte']:.3f}",
            f"{low:.3f} to {high:.3f}" if low is not None else "",
            *deviation,
            _form(plain, ".3f"),
            f"{1 - row['bits_per_byte'] / plain:.1%}" if plain else "",
            _form(primed, ".3f"),
            f"{row['loss']:.3f}",
            f"{row['perplexity']:.4g}",
            f"{row['tokens']:,}",
            f"{row['documents']:,}",
        )
    return table


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def remarks(evaluation: dict[str, Any]) -> list[str]:
    """Returns what a reader of the table must know: capped priming, averages, planted optima."""
    lines = []
    for name, row in evaluation["domains"].items():
        share = row.get("xz_primed_share")
        if share is not None and 0 < share < 0.999:
            lines.append(
                f"{name}: xz was primed with {row['xz_primed_with_bytes'] / 1e6:.1f} MB, {share:.0%} of the training text, documents evenly spaced"
            )
        if "optimum" in row:
            optimum = row["optimum"]
            line = f"{name}: {optimum['excess']:.4f} nats a token above the known optimum"
            answers = optimum["answers"].get("all")
            lines.append(line + (f"; {answers['excess']:.4f} on its {answers['tokens']:,} answers" if answers else ""))
    if evaluation.get("averaged"):
        lines.append("the parameters are the moving average of the run's")
    return lines


def show(evaluation: dict[str, Any], console: Console) -> None:
    """Prints the table of an evaluation and its remarks."""
    console.print(summary(evaluation))
    for line in remarks(evaluation):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def output() -> Console:
    """Returns the console; at least 130 columns wide where nobody looks at a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=130, highlight=False)


def finish(run_dir: pathlib.Path, *, console: Console | None = None) -> None:
    """Evaluates a finished run, writes evaluation.json, samples.json and report.html, and prints a summary.

    Args:
      run_dir: the run's directory.
      console: where to print; None: standard output.

    Raises:
      FileNotFoundError, CheckpointError: when the run has nothing to evaluate.
    """
    console = console or output()
    loaded = open_run(run_dir)
    evaluation = evaluate(loaded)
    write_json(run_dir / "evaluation.json", evaluation)
    best = loaded.member(best_member(evaluation))
    samples = draw_samples(best, sample_prompts(loaded.dataset))
    write_json(run_dir / "samples.json", samples)
    report = write_report(run_dir)
    console.print()
    show(evaluation, console)
    for chosen in {sample["domain"]: sample for sample in reversed(samples)}.values():  # the first of each domain
        console.print(f"\nA sample ({chosen['domain']}; the prompt is in bold):", highlight=False)
        console.print(
            f"[bold]{_plain(chosen['prompt'])}[/bold]{_plain(chosen['text'][len(chosen['prompt']) :])}", soft_wrap=True
        )
    console.print(f"\nReport: {report}", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Escapes what the console would read as markup."""
    return text.replace("[", r"\[")
