"""The loop around the pure step: data in, numbers out, saves, validation, and clear stops.

The numbers of step n are read while step n + 1 runs, so the device never waits for the host.
"""

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels import backend
from sparse_lm.accounting import Account, absent_operations, account, measured_in
from sparse_lm.config import ConfigError, to_dict, validate
from sparse_lm.data.dataset import Dataset
from sparse_lm.data.pipeline import prepare, stream_identity, train_stream
from sparse_lm.memory.device_tables import DeviceTables, Tables
from sparse_lm.memory.diagnostics import memory_row
from sparse_lm.model.cudnn_attention import documents_bucket
from sparse_lm.parallel.distributed import Cluster
from sparse_lm.parallel.watchdog import RESUMABLE
from sparse_lm.recipe import SCHEMA, Recipe
from sparse_lm.routing.diagnostics import RouterWatch, router_row
from sparse_lm.train import machine
from sparse_lm.train.ballot import Ballot
from sparse_lm.train.checkpoint import Checkpointer, checkpoint_directory
from sparse_lm.train.churn import RoutingProbe, probe_batch
from sparse_lm.train.metrics import Meter, Writers, open_writers, read_rows
from sparse_lm.train.prefetch import Prefetch
from sparse_lm.train.progress import Progress
from sparse_lm.train.session import Session, check_addresses, open_session
from sparse_lm.train.start import check_same_run, check_shared, restored_or_new, write_description
from sparse_lm.train.state import TrainState
from sparse_lm.train.step import PULSE
from sparse_lm.train.termination import Termination
from sparse_lm.train.validation import EvalStep, build_eval_step, validation_row
from sparse_lm.weight_sparsity.pictures import MaskPictures
from sparse_lm.weight_sparsity.sparse_activations import activations_row, split_metrics
from sparse_lm.weight_sparsity.telemetry import absent, sparsity_row


class TrainingDiverged(RuntimeError):
    """More steps in a row than allowed were not finite."""


def train(
    recipe: Recipe, run_dir: pathlib.Path, *, cluster: Cluster | None = None, require_kernels: bool = False
) -> int:
    """Trains a recipe in a run directory, continuing what is there.

    Args:
      recipe: the recipe.
      run_dir: where the run lives; process 0 alone writes there, checkpoints apart.
      cluster: the processes that train together, from `distributed.join`; None: this one alone.
      require_kernels: make it an error that an operation falls back to plain JAX on a GPU or TPU.

    Returns:
      0 when all steps are done, RESUMABLE when a signal stopped the run after saving.

    Raises:
      ConfigError: for a recipe that cannot be run, before anything is compiled.
      TrainingDiverged: when too many steps in a row were not finite.
      Disagreement: when the processes were started with different things.
      CheckpointError: when a save fails, or a checkpoint does not fit.
    """
    validate(recipe)
    cluster = cluster or Cluster(recipe.distributed, None, 0, 1)
    cluster.agree("setup", lambda: machine.facts(recipe))
    checkpoints = checkpoint_directory(run_dir, recipe.checkpoint)
    if cluster.first:
        check_same_run(recipe, checkpoints)
    check_shared(checkpoints, cluster)

    def report(line: str) -> None:
        cluster.progress("preparing data")
        if cluster.first:
            print(line)

    dataset = cluster.first_then_others("waiting for the data", lambda: prepare(recipe.data, report=report))
    identity = stream_identity(dataset, recipe.data, recipe.seed)
    cluster.agree("data", lambda: {"hash": dataset.hash, "stream": identity})
    if dataset.tokenizer.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            "model.vocab_size", recipe.model.vocab_size, f"at least the tokenizer's {dataset.tokenizer.vocab_size}"
        )
    cluster.progress("opening the session")
    session = open_session(recipe, encoder=dataset.tokenizer)
    if cluster.first:
        write_description(session, dataset, run_dir)
    progress = Progress(recipe.name, recipe.train.steps, recipe.log.display if cluster.first else "off")
    latest, state, data_state, checkpointer = restored_or_new(session, checkpoints, cluster, progress)
    check_addresses(session.definition, state.tables, f"checkpoint {latest}")
    checkpointer.prepare(state)
    first = int(np.asarray(state.step).reshape(-1)[0])
    writers = Writers()
    if cluster.first:
        writers = open_writers(run_dir, recipe.log, latest, session.members, to_dict(recipe))
    backend.clear_choices()
    kernels = backend.require_kernels("cuda", "tpu") if require_kernels else contextlib.nullcontext()
    with Termination() as termination, writers, progress, kernels:
        run = Run(session, dataset, run_dir, checkpointer, writers, progress, termination, cluster)
        try:
            finished = run.steps(state, data_state, first)
        finally:
            checkpointer.close()
    return 0 if finished else RESUMABLE


class Run:
    """The steps of one run from one starting point."""

    def __init__(
        self,
        session: Session,
        dataset: Dataset,
        run_dir: pathlib.Path,
        checkpointer: Checkpointer,
        writers: Writers,
        progress: Progress,
        termination: Termination,
        cluster: Cluster,
    ):
        self.session, self.dataset, self.run_dir = session, dataset, run_dir
        self.checkpointer, self.writers, self.progress, self.termination = checkpointer, writers, progress, termination
        self.cluster = cluster
        self.ballot = Ballot(session.mesh)
        self.recipe = session.recipe
        self.checkpoints = checkpoint_directory(run_dir, self.recipe.checkpoint)
        self.eval_step: EvalStep = build_eval_step(session.definition, self.recipe.population, session.mesh)
        self.energy = machine.Energy()
        self.validation_loss = math.nan
        self.profiling = False
        self.unread: tuple[int, dict[str, Any], Any] | None = None
        self.stop = False
        self.documents: collections.deque[int] = collections.deque()
        self.tables: Tables = DeviceTables()
        self.tokens_before = 0
        self.watch = RouterWatch()
        self.churn: dict[str, Any] = {}
        if (run_dir / "metrics.jsonl").exists():
            self.watch.restore(read_rows(run_dir / "metrics.jsonl", "train"))
        routed = any(forward.routes for _, forward in session.definition.config.runs())
        probe = routed and probe_batch(dataset, self.recipe.data, self.recipe.validation.batch_size)
        placed = (session.definition, self.recipe.population, session.mesh, run_dir)
        self.probe = RoutingProbe(*placed, probe) if probe else None
        self.pictures = MaskPictures(session.sparsifier, run_dir, population=self.recipe.population.active)
        self.effective = jax.jit(session.sparsifier.forward_params)

    def steps(self, state: TrainState, data_state: dict[str, Any] | None, first: int) -> bool:
        """Runs from step `first` to the end; returns whether the end was reached."""
        recipe, session = self.recipe, self.session
        programs, compile_s = self._programs(first)
        meter = self._meter(first)
        self.tokens_before = meter.tokens
        self.progress.start(first, self._note(compile_s, first))
        stream = train_stream(
            self.dataset,
            recipe.data,
            seed=recipe.seed,
            rows=session.rows,
            state=data_state,
        )
        self.tables = session.tables(state)
        prefetch = Prefetch(stream, session.put, self.tables.find)
        total = recipe.train.steps
        # The vote that rides behind a step carries the documents of the batch two steps later, so two batches are known ahead.
        ahead = collections.deque([prefetch.next(), prefetch.next()] if first < total else [])
        for batch, wanted, _, _ in ahead:
            self.tables.prefetch(wanted, batch)
        if ahead:
            most = max(documents for _, _, documents, _ in ahead)
            vote = self.ballot.read(self.ballot.cast(False, most, np.zeros(())))
            self.documents.extend([vote.documents] * 2)
        try:
            for step in range(first, total):
                self._profile(step)
                self.cluster.progress(f"waiting for the batch of step {step + 1}")
                with meter.waiting():
                    ahead.append(prefetch.next())
                    self.tables.prefetch(ahead[-1][1], ahead[-1][0])
                batch, _, _, data_state = ahead.popleft()
                program = programs(self.documents.popleft(), session.sparsifier.apart(step), self.tables.full())
                lent = dataclasses.replace(state, tables=self.tables.lend(state.tables, program))
                state, metrics = program(lent, batch)
                state = dataclasses.replace(state, tables=self.tables.give_back(state.tables))
                self.cluster.progress(f"step {step + 1}")
                self._report(meter)
                done = step + 1
                vote = self.ballot.cast(self.termination.requested, ahead[1][2], metrics["pulse"])
                self.unread = (done, metrics, vote)
                self.checkpointer.poll()
                if self._due(recipe.validation.every, done) and done < total:
                    self._report(meter)
                    with meter.paused():
                        self._validate(state, done, meter)
                # One process need not wait for the count of its own vote.
                stop = (self.stop or (self.cluster.count == 1 and self.termination.requested)) and done < total
                due = self._due(recipe.checkpoint.every, done) or done == total
                if due and self.probe is not None:
                    with meter.paused():
                        self.tables.settle()
                        held = self.tables.reading(state.inference_state(), self.probe.batch)
                        self.churn = self.probe(done, self._weights(state), held)
                if due:
                    self.pictures(done, state.sparsity)
                if stop or (due and done < total):
                    self._report(meter)
                    self._save(state, data_state, done)
                if stop:
                    self.progress.close(
                        f"stopped by a signal after step {done}, saved; run the same command again to go on"
                    )
                    return False
            self._report(meter)
            if first < total:
                with meter.paused():
                    self._validate(state, total, meter)
                self._save(state, data_state, total)
            self.progress.close(f"finished {total} steps; checkpoints in {self.checkpoints}")
            return True
        finally:
            prefetch.close()
            self.tables.close()
            if self.profiling:
                jax.profiler.stop_trace()

    def _lines(self) -> Account:
        return account(self.recipe.model, self.recipe.data.sequence_length)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def _meter(self, first: int) -> Meter:
        recipe, device = self.recipe, jax.devices()[0]
        lines = self._lines()
        peak = machine.peak_flops(device.device_kind, recipe.model.compute_dtype)
        peak = peak and peak * self.session.mesh.size
        flops = lines.train_flops * (self.session.members or 1)
        tokens, seconds, spent = 0, 0.0, 0.0
        path = self.run_dir / "metrics.jsonl"
        if first and path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines() if line]
            trained = [row for row in rows if row.get("kind") == "train" and row["step"] <= first]
            if trained:
                tokens, seconds = trained[-1]["tokens"], trained[-1]["seconds"]
                per_step = tokens / trained[-1]["step"]
                unlogged = round(per_step * (first - trained[-1]["step"]))
                tokens += unlogged
                spent = trained[-1]["flops"] * (self.session.members or 1) + unlogged * flops
        return Meter(flops, peak, tokens, seconds, spent)

    def _note(self, compile_s: float, first: int) -> str:
        recipe, lines = self.recipe, self._lines()
        device = jax.devices()[0]
        members = f", {self.session.members} members" if self.session.members else ""
        start = f"continuing after step {first}" if first else "from fresh initial values"
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.session.mesh.shape.items() if size > 1)
        return "\n".join(
            [
                f"{recipe.name}: {lines.parameters / 1e6:.2f} M parameters, {lines.active_parameters / 1e6:.2f} M active{members}; {start}",
                f"{self.session.mesh.size} x {device.device_kind}{f' ({mesh})' if mesh else ''}; step compiled in {compile_s:.1f} s",
                machine.peak_statement(device.device_kind, recipe.model.compute_dtype, self.session.mesh.size),
                *self.session.sparsifier.notes(),
                *([backend.backend_report()] if backend.recorded_choices() else []),
            ]
        )

    def _programs(self, step: int) -> tuple[Callable[[int, bool, bool], Any], float]:
        """Returns (the compiled step, seconds of the first compile, which is for step number `step`).

        It is chosen by a batch's most documents in a row, `Sparsifier.apart`, and whether its rows outgrow the tables' room.
        """
        first = self.recipe.model.attention.max_documents
        apart = self.session.sparsifier.apart(step)
        compiled, seconds = self.session.compile_step(first, **({"changes": True} if apart else {}))
        programs = {(first, apart, False): compiled}

        def program(documents: int, changes: bool, full: bool) -> Any:
            most = documents_bucket(first, documents)
            if (most, changes, full) not in programs:
                arguments = {name: True for name, asked in (("changes", changes), ("full", full)) if asked}
                programs[most, changes, full], seconds = self.session.compile_step(most, **arguments)
                what = " that changes masks or topology" * changes + " for all rows of a batch" * full
                self.progress.event(f"compiled a step{what} for up to {most} documents in a row in {seconds:.1f} s")
            return programs[most, changes, full]

        return program, seconds

    def _profile(self, step: int) -> None:
        log = self.recipe.log
        if log.profile_start is None:
            return
        if step == log.profile_start:
            jax.profiler.start_trace(str(self.run_dir / "profile"))
            self.profiling = True
        if step == log.profile_start + log.profile_steps and self.profiling:
            jax.profiler.stop_trace()
            self.profiling = False
            self.progress.event(f"profile written to {self.run_dir / 'profile'}")

    def _report(self, meter: Meter) -> None:
        """Reads the numbers of the last unread step, if any; writes a row when one is due; stops a run that has diverged."""
        if self.unread is None:
            return
        (done, metrics, vote), self.unread = self.unread, None
        vote = self.ballot.read(vote)
        self.stop |= vote.stop
        self.documents.append(vote.documents)
        self.cluster.progress(f"the numbers of step {done}")
        pulse = dict(zip(PULSE, np.moveaxis(np.asarray(metrics["pulse"]), -1, 0)))
        meter.step(int(pulse["tokens"].max()))
        if (pulse["skipped"] > 0).any():
            self._skipped(done, pulse, metrics)
        if done % self.recipe.log.log_every and done != self.recipe.train.steps and not self.churn:
            return
        row: dict[str, Any] = {"kind": "train", "step": done, **meter.read()}
        row["flops"] /= self.session.members or 1  # like tokens: of one member
        row.update({name: pulse[name] for name in ("loss", "learning_rate", "grad_norm", "skipped")})
        routers, activations = split_metrics(jax.device_get(metrics["blocks"]))
        row.update(router_row(routers, population=self.recipe.population.active) | self.churn)
        row.update(activations_row(activations))
        self.churn = {}
        found, alarms = self.watch.update(row)
        row.update(found)
        if measured := measured_in(row):
            flops = account(self.recipe.model, self.recipe.data.sequence_length, measured=measured).train_flops
            row["flops_per_token"] = flops
            meter.flops_per_token = flops * (self.session.members or 1)
        row.update(memory_row(jax.device_get(metrics["memory"])) | self.tables.read())
        row.update(self._sparsity(jax.device_get(metrics["sparsity"]), measured))
        if (statistics := machine.memory_statistics()) is not None:
            row["memory_peak_bytes"] = statistics["peak_bytes"]
        if (joules := self.energy.joules()) is not None:
            row["joules_per_token"] = joules / max((meter.tokens - self.tokens_before) * (self.session.members or 1), 1)
        self.writers.write(row)
        self.progress.update(row)
        for alarm in alarms:
            self.writers.write({"kind": "event", "step": done, "event": "routing alarm", "alarm": alarm})
            self.progress.event(f"step {done}, {alarm}")

    def _sparsity(self, found: dict[str, Any], measured: Any) -> dict[str, Any]:
        """Returns a row's entries on weight sparsity, with the operations per token that the weights that exist need."""
        if not found:
            return {}
        members, model = self.recipe.population.active, self.recipe.model
        all_there = account(model, self.recipe.data.sequence_length, measured=measured).train_flops
        factor = 0.0 if self.session.sparsifier.accounted else 3.0
        row = sparsity_row(found, members)
        for name, mean in (("flops_per_token", False), ("mean_flops_per_token", True)):
            saved = factor * absent_operations(model, absent(found, members, mean=mean), measured)
            row[f"sparsity/{name}"] = np.asarray(all_there - saved).tolist()
        return row

    def _skipped(self, done: int, pulse: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        norms = jax.device_get(metrics["group_norms"])
        groups = sorted(name for name, norm in norms.items() if not np.isfinite(norm).all())
        self.writers.write(
            {"kind": "event", "step": done, "event": "skipped", "skipped": pulse["skipped"], "groups": groups}
        )
        self.progress.event(f"step {done} skipped: not finite in {', '.join(groups) or 'the loss'}")
        # A population goes on while any member is sound.
        if (pulse["skipped"] > self.recipe.train.skip_limit).all():
            self.checkpointer.wait()
            raise TrainingDiverged(
                f"{int(pulse['skipped'].min())} steps in a row up to step {done} were not finite (train.skip_limit = "
                f"{self.recipe.train.skip_limit}); gradients not finite in: {', '.join(groups) or 'none, only the loss'}; "
                f"last good checkpoint: {max(self.checkpointer.steps(), default=None)} in {self.checkpoints}"
            )

    def _validate(self, state: TrainState, done: int, meter: Meter) -> None:
        self.cluster.progress(f"validating after step {done}")
        self.tables.settle()
        params, recipe = self._weights(state, averaged=True), self.recipe

        def losses(params: Any, model_state: Any, batch: Any) -> jax.Array:
            return self.eval_step(params, self.tables.reading(model_state, batch), batch)

        numbers = validation_row(losses, params, state.inference_state(), self.dataset, recipe.data, recipe.validation)
        totals = {"tokens": meter.tokens, "seconds": meter.seconds, "flops": meter.flops / (self.session.members or 1)}
        row = {"kind": "validation", "step": done, **totals, **numbers}
        self.validation_loss = float(np.mean(numbers["loss"]))
        self.writers.write(row)
        self.progress.validation(row)

    def _weights(self, state: TrainState, *, averaged: bool = False) -> Any:
        """Returns what the model computes with, from the parameters or (if there is one) their average."""
        params = state.ema if averaged and state.ema else state.params
        return self.effective(params, state.sparsity, state.step) if self.session.sparsifier.forward_reads else params

    def _save(self, state: TrainState, data_state: dict[str, Any] | None, done: int) -> None:
        assert data_state is not None, "a step was taken, so a batch was consumed"
        self.cluster.progress(f"saving step {done}")
        self.tables.settle()
        recipe = {"schema": SCHEMA, "recipe": to_dict(self.recipe)}
        self.checkpointer.save(done, state, data_state, recipe, self.validation_loss)
