"""One run of training: the model and what is trained in memory, a state on the disk to go on from, a folder at the end."""

import hashlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import torch

from qcli import __version__
from qcli.devices import gpus_of
from qcli.errors import Interrupted, NonFiniteError, QcliError
from qcli.finetuning import samples
from qcli.finetuning.loss import Loss, packs_rows
from qcli.finetuning.plan import Plan
from qcli.finetuning.ranks import Ranks
from qcli.finetuning.result import Finetuned
from qcli.finetuning.state import Progress as State
from qcli.finetuning.state import read_state, save_state
from qcli.finetuning.trained import base_name
from qcli.finetuning.training import Step, Stopped, Trainer
from qcli.loading import out_of_memory
from qcli.loading.load import load_source
from qcli.process import peak_memory
from qcli.progress import Advance, Progress, shown
from qcli.quantization.staging import Staging

_STATE, LOG = "state.safetensors", "log.jsonl"
_SAVE_SECONDS = 60.0  # that a crash may cost, and at most a twentieth of the time is spent on saving


class Run:
    """Use as a context manager: it holds the output's lock, and ends the group of processes if there are several."""

    def __init__(self, plan: Plan, *, overwrite: bool = False):
        self.plan = plan
        self.ranks = Ranks()
        self.staging = Staging(plan, overwrite=overwrite) if self.ranks.first else None
        self._asked_to_stop = False

    def __enter__(self) -> "Run":
        if self.staging:
            self.staging.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self.staging:
                self.staging.__exit__(*exc)
        finally:
            self.ranks.close()

    def train(self, progress: Progress | None) -> Finetuned:
        """Loads, trains to the end, and writes the folder. Raises Interrupted where the user stops it, NonFiniteError."""
        started = time.monotonic()
        try:
            self._load()
            self._go_on_or_start()
            with self._stoppable():
                self._steps(progress)
            return self._finish(started)
        except out_of_memory.KINDS as e:
            if not out_of_memory.is_out_of_memory(e):
                raise
            raise QcliError(
                f"out of memory while training {self.plan.skeleton.source.label}",
                "Try --set checkpointing=true, --set sequences_at_a_time=1, or a smaller --max-tokens.",
            ) from e

    def _load(self) -> None:
        plan, options = self.plan, self.plan.options
        model, self.tokenizer = load_source(
            plan.skeleton.source, plan.trained.recipe, dtype=plan.dtype, placement=plan.placement, int8_activations=True
        )
        del plan.skeleton.model  # its buffers and resident units are not needed any more
        self.model, self.parameters = model, plan.trained.put_in(model)
        loss = Loss(model, torch.device(model.device), plan.skeleton.source.label, plan.checkpointing)
        self.trainer = Trainer(model, loss, self.parameters, options, packs_rows(loss), self.ranks)
        self.trainer.stopping = lambda: self._asked_to_stop

    def _go_on_or_start(self) -> None:
        found = read_state(self.staging.state / _STATE) if self.staging else None
        found = self.ranks.told(found)
        if found is None:
            self.state = State(base_hash=self._base_hash())
            if self.plan.rows.held_out:
                self.state.before = before = self.trainer.held_out(self.plan.rows.held_out)
                if not math.isfinite(before):
                    raise NonFiniteError(
                        f"{self.plan.skeleton.source.label}: its held-out loss is {before} before any step",
                        "Try --dtype float32; where that does not help, a weight is damaged.",
                    )
                self.state.samples = self._continued()
            self.best = self._copy()
            self._save()
        else:
            self.state, values, self.best, optimizer = found
            if self.state.base_hash != self._base_hash():
                raise QcliError(
                    f"the weights of {self.plan.skeleton.source.label} are others than when this run began",
                    "Delete the .partial folder to start anew.",
                )
            for name, parameter in self.parameters.items():
                parameter.data.copy_(values[name])
            whole = self.trainer.optimizer.state_dict()
            self.trainer.optimizer.load_state_dict(whole | {"state": optimizer})
        if self.staging:
            self._log = self.staging.folder / LOG
            self._log.touch()
            with self._log.open("r+b") as file:
                file.truncate(self.state.logged)
        self._saved, self._saving = time.monotonic(), 0.0

    def _steps(self, progress: Progress | None) -> None:
        plan, state, order, rows = self.plan, self.state, self.plan.order, self.plan.rows
        sizes = [sum(len(rows.train[i]) for i in order.step(n)) for n in range(plan.steps)]
        try:
            with shown(progress if self.ranks.first else None, sum(sizes), sum(sizes[: state.step])) as advance:
                for number in range(state.step, plan.steps):
                    self._step(number, sizes[number], advance)
        except Stopped:
            self._save()
            raise Interrupted(
                f"interrupted after {state.step:,} of {plan.steps:,} steps", "Run the same command again: it goes on there."
            ) from None

    def _step(self, number: int, tokens: int, advance: Advance) -> None:
        plan, state, held_out = self.plan, self.state, self.plan.rows.held_out
        rows, started = [plan.rows.train[i] for i in plan.order.step(number)], time.monotonic()
        lr = plan.options.learning_rate(number, plan.steps)
        found = self.trainer.step(rows, lr, number)
        if not found.finite:
            self._not_finite(number, found)
        if number == 0:
            self._check_learns()
        state.step, state.tokens = number + 1, state.tokens + tokens
        state.trained_seconds += time.monotonic() - started
        entry = {"step": state.step, "loss": found.loss, "grad_norm": found.grad_norm, "lr": lr, "trained_tokens": found.tokens}
        measured = bool(held_out) and (state.step % plan.eval_steps == 0 or state.step == plan.steps)
        if measured:
            entry["held_out_loss"] = loss = self.trainer.held_out(held_out)
            if all(loss < other for _, other in state.measured):
                self.best = {}  # two copies of all weights need never stand in memory
                self.best, state.best = self._copy(), state.step
            state.measured.append((state.step, loss))
        entry["tokens_per_second"] = round(state.tokens / state.trained_seconds, 2)
        self._note(entry)
        held = f", held out {state.measured[-1][1]:.4f}" if state.measured else ""
        advance(tokens, f"step {state.step:,} of {plan.steps:,}, loss {found.loss:.4f}{held}")
        due = time.monotonic() - self._saved >= max(_SAVE_SECONDS, 20 * self._saving)
        if measured or due:
            self._save()
        if self.ranks.agreed(self._asked_to_stop):
            raise Stopped

    def _not_finite(self, number: int, found: Step) -> None:
        """Keeps the last good step, and says so."""
        self._save()
        where = ""
        if self.staging and self.state.step:
            self._write(self._copy() if not self.state.best else self.best)
            where = f"; the {self.plan.trained.noun} of step {self.state.best or self.state.step:,} is in {self.staging.folder}"
        raise NonFiniteError(
            f"step {number + 1:,}: the loss is {found.loss:.4g} and the norm of its gradient {found.grad_norm:.4g}{where}",
            "Try a smaller --lr or --dtype float32; if it is the first step, a weight of the base is damaged.",
        )

    def _check_learns(self) -> None:
        """After the first step something has a gradient that is not zero, or nothing is learnt."""
        if not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in self.parameters.values()):
            raise QcliError(
                f"{self.plan.skeleton.source.label}: nothing that is trained has a gradient", "Report this with the model's name."
            )

    def _note(self, entry: dict[str, object]) -> None:
        if self.staging:
            with self._log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _save(self) -> None:
        if self.staging is None:
            return
        started = time.monotonic()
        log = self.staging.folder / LOG
        if log.exists():
            with log.open("rb") as file:
                os.fsync(file.fileno())
                self.state.logged = os.fstat(file.fileno()).st_size
        save_state(self.staging.state / _STATE, self.state, self._values(), self.best, self.trainer.optimizer)
        self._saved, self._saving = time.monotonic(), time.monotonic() - started

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._values().items()}

    def _prompts(self) -> list[list[int]]:
        return samples.prompts_of(self.plan.rows.held_out)

    def _continued(self) -> list[str]:
        with self.plan.trained.as_generated(self.model):
            return samples.continued(self.model, self.tokenizer, self._prompts())

    def _base_hash(self) -> str:
        """SHA-256 over all tensors that are not trained, in the order of their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted((*self.model.named_parameters(), *self.model.named_buffers())):
            if name not in self.parameters and not tensor.is_meta:
                digest.update(name.encode())
                digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def _finish(self, started: float) -> Finetuned:
        plan, state = self.plan, self.state
        if not plan.rows.held_out:
            self.best, state.best = self._copy(), state.step
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.best[name])
        after = self.trainer.held_out(plan.rows.held_out) if plan.rows.held_out else None
        written = self._continued() if state.samples else []
        if (now := self._base_hash()) != state.base_hash:
            raise QcliError("a tensor that is not trained has changed in training", "Report this with the model's name.")
        source = plan.skeleton.source
        losses = []
        if self.staging:
            self._write(self.best)
            losses = _losses(self._log)
            self.staging.publish()
        prompts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self._prompts()] if written else []
        gpus = gpus_of(self.model)
        return Finetuned(
            output=str(plan.output),
            base=source.label,
            steps=plan.steps,
            best=state.best,
            before=state.before,
            after=after,
            losses=losses,
            samples=list(zip(prompts, state.samples, written)),
            parameters=plan.parameters,
            tokens=state.tokens,
            tokens_per_second=state.tokens / state.trained_seconds if state.trained_seconds else 0.0,
            seconds=time.monotonic() - started,
            peak_memory=sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else peak_memory(),
            base_hash=now,
            train=plan.options.rare.train,
            next=plan.trained.next,
        )

    def _write(self, values: dict[str, torch.Tensor]) -> None:
        """Puts the folder's files into the staged one."""
        assert self.staging is not None
        source, trained = self.plan.skeleton.source, self.plan.trained
        base = {"name": base_name(source), "revision": source.revision, "fingerprint": source.fingerprint}
        about = {
            "qcli": __version__,
            "base": base | {"sha256": self.state.base_hash},
            "quantized_as_read": trained.recipe.summary() if trained.recipe else None,
            "steps": self.plan.steps,
            "best_step": self.state.best,
            "held_out_loss": {"before": self.state.before, "measured": self.state.measured},
        }
        trained.write(self.staging, values, self.tokenizer, about)
        self.staging.add_file("README.md", self._card().encode())

    def _card(self) -> str:
        state, gain = self.state, ""
        if state.before is not None and state.measured:
            gain = f"Held-out loss: {state.before:.4f} before, {min(loss for _, loss in state.measured):.4f} after, nats a token.\n"
        front, what = self.plan.trained.card()
        trained = f"Trained by qcli {__version__} for {state.step:,} steps of {self.plan.options.batch} rows."
        return "\n".join(("---", *front, "---", "", what, "", f"{trained} {gain}"))

    def _stoppable(self) -> "_Stoppable":
        return _Stoppable(self)

    def stop(self) -> None:
        """The run ends soon, and can go on later."""
        self._asked_to_stop = True


class _Stoppable:
    """While this lasts, Ctrl-C and SIGTERM let the batch that is running end. A second one interrupts at once."""

    def __init__(self, run: Run):
        self.run = run
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: object) -> None:
        if self.run._asked_to_stop:
            raise KeyboardInterrupt
        self.run.stop()


def _losses(log: Path) -> list[tuple[int, float, float | None]]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry.get("held_out_loss")) for entry in entries]
