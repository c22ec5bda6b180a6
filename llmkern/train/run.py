"""A whole pre-training: from a config and a folder of tokens to checkpoints, resumed wherever it was killed.

    with Run(RunConfig(data="data/shakespeare", out="runs/first")) as run:
        run.train()

A run that was killed at any moment and started again gives the same losses and weights, bit for bit, as one
that was not: the batches are functions of the step, and a checkpoint holds everything else.
"""

import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import filelock
import torch

from .. import durable
from ..errors import UserError
from ..models import BERT, GPT, PRESETS, BERTConfig, GPTConfig
from ..text.batches import Batches
from ..text.masking import MaskedBatches
from ..text.shards import Data
from ..text.tokenizer import MASK
from . import checkpoint, rng
from .config import FREE, RunConfig
from .log import JsonLog, Log, TensorBoardLog, read_log
from .loop import IndexedBatches, NotFinite, Trainer, evaluate
from .stop import StopSignal
from .team import team_of
from .tensors import fill_optimizer

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")


class Stopped(Exception):
    """A signal stopped the run after it was saved.

    Attributes:
        signal: its number.
        step: steps done.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after {step} steps")
        self.signal, self.step = signal, step


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


class Run:
    """A run in its folder, which no other process may use at the same time.

    Args:
        config: all keys.
        say: called with each sentence that the user should read, such as of a damaged checkpoint.

    Attributes:
        config: with the sizes of the model filled in.
        model, trainer, tokenizer, data: what is trained.
        team: the processes that train together, or None if this one is alone.
        leads: whether this process writes and speaks for all.
        path: the folder.
        validations: (step, loss) so far.

    Raises:
        UserError: a key, the data or the folder that does not fit.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None] = _warn) -> None:
        self.team = team_of(config)
        self.leads = self.team is None or self.team.rank == 0
        self.say = say if self.leads else lambda sentence: None
        self.path = Path(config.out)
        self.device = pick_device(config.device)
        self.data = Data(config.data, config.verify_data)
        self.tokenizer = self.data.tokenizer
        if config.objective == "masked":
            self.tokenizer.add_special(MASK)
        self.config = config
        self.validations: list[tuple[int, float]] = []
        self.stack = ExitStack()

    def __enter__(self) -> "Run":
        """Lock the folder, make the model, and go on where the newest checkpoint is."""
        if self.leads:
            self._lock()
        try:
            self._start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def _lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / ".lock")
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(
                f"out {str(self.path)!r} is in use by another process; stop that one, or choose another out"
            ) from None
        except OSError as error:
            raise UserError(
                f"out {str(self.path)!r} cannot be written to ({error.strerror}); choose another"
            ) from None
        self.stack.callback(lock.release)

    def _start(self) -> None:
        for folder in (self.path, self.path / checkpoint.FOLDER) if self.leads else ():
            durable.sweep(folder)
        torch.manual_seed(self.config.seed)
        with self.team.one_voice() if self.team else nullcontext():
            found = checkpoint.newest(self.path, self.say)
            if found is not None:
                model = self._same(found).build_model(self.config.kernels)
            elif self.config.init:
                model = self._initial().build_model(self.config.kernels)
            else:
                self.config = resolve(self.config, asdict(PRESETS[self.config.preset]))
                model = build_model(self.config, len(self.tokenizer))
        self.model, parallel = model.to(self.device), None
        if self.team is not None:
            parallel = self.team.divide(self.model, self.config, self.device, found.step if found else 0)
            self.stack.callback(self.team.leave)
        self.trainer = Trainer(self.model, self.batches("train"), self.config, parallel=parallel)
        if found is not None:
            self._resume(found)
        self._write("config.toml", self.config.to_toml())
        self._write("tokenizer.json", self.tokenizer.to_json())

    def _initial(self) -> checkpoint.Checkpoint:
        """The checkpoint whose weights to start from; its sizes are those of the run."""
        c = self.config
        start = checkpoint.load(c.init, self.say)
        if start.state["tokenizer_sha256"] != self.tokenizer.sha256():
            raise UserError(
                f"init {c.init!r} was trained with another tokenizer than data {c.data!r} has; prepare the "
                f"data with --tokenizer {start.folder / checkpoint.TOKENIZER}"
            )
        sizes = start.state["model"]["config"]
        for name in SIZES:
            given, own = getattr(c, name), sizes.get(name)
            if given not in (None, own) and name != "dropout":
                raise UserError(
                    f"init {c.init!r} has {name} = {own}, and {name} is given as {given}; leave it out"
                )
        if "dropout" in sizes and c.dropout is not None:  # the weights do not depend on it
            sizes["dropout"] = c.dropout
        self.config = resolve(c, sizes)
        return start

    def _write(self, name: str, text: str) -> None:
        if self.leads:
            durable.write_file(self.path / name, text.encode())

    def batches(self, split: str) -> IndexedBatches:
        """The batches of "train" or "val"; those to validate with do not change."""
        c = self.config
        rank, world = self.team.part if self.team else (0, 1)
        try:
            batches = Batches(
                self.data.tokens(split), c.batch_size // world, c.block_size, c.seed, self.device,
                c.order if split == "train" else "random", rank, world,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"data {c.data!r}, split {split}: {error}") from None
        if c.objective == "causal":
            return batches
        special = self.tokenizer.special
        mask = special[MASK]
        return MaskedBatches(batches, mask, len(self.tokenizer), c.mask_share, tuple(special.values()))

    def _same(self, found: checkpoint.Checkpoint) -> checkpoint.Checkpoint:
        """`found`, if it is of a run that this one may go on with."""
        state = found.state
        if "config" not in state:
            raise UserError(f"{str(found.folder)!r} is no checkpoint of a run; choose another out")
        self.config = resolve(self.config, state["config"])
        for name, value in asdict(self.config).items():
            before = state["config"].get(name, value)
            before = tuple(before) if isinstance(before, list) else before
            if name not in FREE and before != value:
                raise UserError(
                    f"out {str(self.path)!r} holds a run with {name} = {before!r}, now it is {value!r}; "
                    "choose another out, or the old value to go on"
                )
        if state["data_sha256"] != self.data.sha256:
            raise UserError(
                f"out {str(self.path)!r} holds a run on other data than {self.config.data!r} is now; "
                "choose another out, or the old data"
            )
        return found

    def _resume(self, found: checkpoint.Checkpoint) -> None:
        state, optimizer = found.state, self.trainer.optimizer
        if self.team is None:
            parameters = dict(self.model.named_parameters())
            fill_optimizer(optimizer, parameters, found.optimizer_tensors(), state["optimizer"])
        else:
            self.team.fill_optimizer(optimizer, found)
        self.trainer.scaler.load_state_dict(state["scaler"])
        self.trainer.step = found.step
        self._set_rng(state["rng"], found.step)
        if self.leads:
            checkpoint.prune(found.folder, self.config.keep)  # where a save was killed before its end
        self.say(f"goes on after step {found.step} of {str(self.path)!r}")

    def _set_rng(self, states: dict[str, Any] | list[dict[str, Any]], step: int) -> None:
        """Those of this process; where another number of processes had been saved, new ones of the step."""
        states = states if isinstance(states, list) else [states]
        rank, world = (self.team.rank, self.team.world) if self.team else (0, 1)
        if len(states) == world:
            rng.set_rng_state(states[rank])
        else:
            torch.manual_seed(hash((self.config.seed, step, rank)) % 2**63)

    def finished(self) -> bool:
        """Whether all steps are done and validated."""
        last = max((line["step"] for line in read_log(self.path)), default=-1)
        return self.trainer.step == self.config.steps <= last + ("val" not in self.data.splits)

    def train(self, logs: Sequence[Log] = ()) -> None:
        """Train to the last step; as `steps`, which is for who wants to do something in between."""
        for _ in self.steps(logs):
            pass

    def steps(self, logs: Sequence[Log] = ()) -> Iterator[int]:
        """Train to the last step, and yield the number of steps done after each.

        Args:
            logs: who hears of it, besides log.jsonl and TensorBoard as the config says.

        Raises:
            Stopped: a signal came; everything is saved.
            UserError: the loss is not finite, or the disk is full; the last good checkpoint is named.
        """
        c, t = self.config, self.trainer
        own: list[Log] = [JsonLog(self.path, t.step, c.log_every)] if self.leads else []
        if c.tensorboard and self.leads:
            own.append(TensorBoardLog(self.path, t.step, c.log_every))
        self.logs = [*own, *logs]
        with ExitStack() as stack, StopSignal() as stop:
            for log in own:
                stack.callback(log.close)
            if self.team is not None:
                stack.enter_context(self.team.watch(lambda: t.step))
            while t.step < c.steps:
                if c.eval_every and t.step % c.eval_every == 0:
                    self.validate()
                self._step()
                due = c.save_every and t.step % c.save_every == 0
                stopped = self.team.agree(stop.number or 0) if self.team else stop.number
                if due or t.step == c.steps or stopped:
                    self.save()
                if stopped:
                    raise Stopped(stopped, t.step)
                yield t.step
            self.validate()

    def _step(self) -> None:
        try:
            record = self.trainer.advance()
        except NotFinite as error:
            raise UserError(f"{error} ({self._where(error)}); {self._last_good()}") from None
        for log in self.logs:
            log.record(record)

    def _where(self, error: NotFinite) -> str:
        starts = [s for i in error.batches for s in self.trainer.batches.starts(i).tolist()]
        shown = ", ".join(map(str, starts[:16])) + (", ..." if len(starts) > 16 else "")
        numbers = f"batch {error.batches[0]}" if len(error.batches) == 1 else f"batches {list(error.batches)}"
        return f"{numbers}, windows from token {shown} on"

    def _last_good(self) -> str:
        names = [path.name for path in checkpoint.folders(self.path)]
        return f"the last good checkpoint is {names[-1]}" if names else "there is no checkpoint before it"

    def validate(self) -> float | None:
        """The loss on held-out text, or None if the data has none."""
        if "val" not in self.data.splits:
            return None
        batches, steps = self.batches("val"), self.config.eval_batches
        parallel = self.trainer.parallel
        loss = evaluate(parallel or self.model, batches, steps, self.config.torch_dtype)
        self.validations.append((self.trainer.step, loss))
        for log in self.logs:
            log.validation(self.trainer.step, loss)
        return loss

    def save(self) -> Path:
        """Write a checkpoint with all that the next step depends on."""
        for log in self.logs:
            log.flush()
        t = self.trainer
        state = {
            "config": asdict(self.config),
            "data_sha256": self.data.sha256,
            "scaler": t.scaler.state_dict(),
            "rng": self.team.collect(rng.get_rng_state()) if self.team else rng.get_rng_state(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        if self.team is None:
            return checkpoint.save(
                self.path, t.step, self.model, self.tokenizer, t.optimizer, state, self.config.keep
            )
        return self.team.save(self.path, t.step, t.optimizer, self.tokenizer, state, self.config.keep)


def pick_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a GPU if there is one."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device is cuda, but this PyTorch sees no GPU; leave it out or use cpu")
    return ("cuda" if there else "cpu") if name == "auto" else name


def resolve(config: RunConfig, base: dict[str, Any]) -> RunConfig:
    """The config with sizes of the model that it leaves open from `base`, where that has them."""
    given = asdict(config)
    return replace(config, **{name: base[name] for name in SIZES if given[name] is None and name in base})


def build_model(config: RunConfig, vocab_size: int) -> torch.nn.Module:
    """A new model of a resolved config, with random weights."""
    sizes = {name: getattr(config, name) for name in SIZES}
    model, shape = (GPT, GPTConfig) if config.objective == "causal" else (BERT, BERTConfig)
    try:
        return model(shape(vocab_size=vocab_size, **sizes), kernels=config.kernels)
    except ValueError as error:
        raise UserError(str(error)) from None
