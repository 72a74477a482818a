"""The training loop: one model, one data set, one run folder that can be stopped and resumed.

A run folder holds:
  run.json              what the run is; a resumed run must say the same
  checkpoint-{step}.pt  weights (of towers too, if there are any), optimizer state, place in the
                        data; the newest two are kept, and the one at which a decay began, so that a
                        longer run can go on from there
  decayed-{step}.pt     what a decay ended with, set aside when the run went on from before it
  log.jsonl             one line every few steps and one for each evaluation
  loss.png              drawn from log.jsonl where matplotlib is installed

A resumed run takes the same steps as one that was never stopped. Its data set may have grown; then
it goes on at the same batch of the new set's epoch. Stop it with Ctrl-C or SIGTERM:
it finishes the step, writes a checkpoint and returns.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gemsmith.cache.none import NoCache
from gemsmith.errors import TrainError
from gemsmith.model.text import DecoderLayer, TextModel
from gemsmith.model.towers import Towers
from gemsmith.train.data import Batch, Packer, TokenSet, make_batch, plan_epoch
from gemsmith.train.loss import backward_in_chunks, chunk_rows, sum_cross_entropy
from gemsmith.train.media import IMAGE, SOUND, SoftInputs
from gemsmith.train.optim import Decay, lr_scale, make_optimizers, set_lr, training_dtype
from gemsmith.train.peers import MEETING_STEPS, Peers
from gemsmith.train.rounding import decoder_formats, rounded

LOG_STEPS = 10
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What a run is. Part of its identity: a resumed run must have the same."""

    batch_tokens: int = 8192
    """Packed tokens of a step."""
    lr: float = 3e-3
    """Learning rate of the stable phase."""
    weight_decay: float = 0.1
    warmup_steps: int = 100
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    muon: bool = True
    """Muon for the layers' matrices; False = AdamW for everything."""
    seed: int = 0
    row_multiple: int = 1024
    """Learned rows are rounded up to a multiple of this, for few distinct compiled shapes."""
    bits: str | None = None
    """The recipe of `gemsmith quantize` that the decoder is trained for: every product sees its
    weights rounded by it. None: as they are."""


def compile_layers(model: TextModel) -> None:
    """Compile what a layer does before and after attention, in place.

    Attention itself is a few fused kernels a sequence and its shapes change with every batch.
    """
    # One code object serves every layer; each layer's plan may count as a new case of it.
    torch._dynamo.config.recompile_limit = 8 * len(model.layers)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer), "compile_layers compiles a layer once"
        layer.before_attention = torch.compile(layer.before_attention, dynamic=False)
        layer.after_attention = torch.compile(layer.after_attention, dynamic=False)


class Trainer:
    """Trains `model` in the run folder `run`, from its newest checkpoint if it has one.

    With `towers`, they are trained with it, by what the pictures and sounds of the data are good
    for. They run as they are: their shapes change with every batch.
    """

    def __init__(
        self,
        model: TextModel,
        config: TrainConfig,
        train: TokenSet,
        run: str | Path,
        *,
        towers: Towers | None = None,
        heldout: TokenSet | None = None,
        compiled: bool = False,
        decay: bool = False,
        peers: Peers | None = None,
    ) -> None:
        """Open or create the run folder and resume from it.

        peers: trainers of the same model, with whom weights are averaged; each has a run folder of
          its own.
        decay: the stretch to come ends the run, or goes on with a decay that has begun. Without
          it the run resumes from the newest checkpoint that no decay has touched.

        Raises:
          TrainError: the run folder belongs to a run of another kind, or the data has pictures or
            sounds for which there is no tower, or peers are at another step.
          ConfigError: the model cannot be rounded to `config.bits`.
        """
        self.model, self.towers, self.config, self.heldout = model, towers, config, heldout
        self.peers = peers
        for data in (train, heldout):
            _check_towers(data, towers)
        self.run_folder = Path(run)
        self.device = model.embed_tokens.weight.device
        self.dtype = training_dtype(self.device)
        self.packer = Packer(
            train,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            row_multiple=config.row_multiple,
        )
        self.formats = decoder_formats(model, config.bits)
        self.trained = model if towers is None else torch.nn.ModuleList((model, towers))
        self.optimizers = make_optimizers(
            self.trained, lr=config.lr, weight_decay=config.weight_decay, muon=config.muon
        )
        self.step, self.seconds_per_step = 0, 0.0
        self.decay: Decay | None = None
        self._stop = False
        self._open_run()
        self._resume(decay)
        if peers is not None and peers.first(self.step) != self.step:
            raise TrainError(
                f"{self.run_folder} is at step {self.step} and the first of its peers at another; "
                "delete the newest checkpoints of those that are ahead"
            )
        self._head: Callable[..., torch.Tensor] = model.logits
        if compiled:
            compile_layers(model)
            self._head = torch.compile(model.logits, dynamic=False)

    # The loop

    def train(
        self,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        checkpoint_minutes: float = 5.0,
        eval_minutes: float = 30.0,
    ) -> None:
        """Train for `steps` steps or `minutes`, whichever ends first; without either, on and on.

        Ends with a checkpoint, also when interrupted or when a decay reaches zero. Peers end and
        save together.
        """
        begun = saved = evaluated = time.monotonic()
        last = self.step + steps if steps is not None else None
        if self.decay is not None:
            end = self.decay.start + self.decay.steps
            last = end if last is None else min(last, end)
        first, losses = self.step, []
        with self._stop_on_signals(), self._progress(last) as show:
            while last is None or self.step < last:
                started = time.monotonic()
                over = minutes is not None and started - begun > 60 * minutes
                due = self.step > first and started - saved > 60 * checkpoint_minutes
                stop, save = self._agreed(self._stop or over, due)
                if stop:
                    break
                if save:
                    self.save()
                    plot_loss(self.run_folder)
                    saved = time.monotonic()
                loss, norm = self.train_step(next(self.packer))
                losses.append(loss)
                now = time.monotonic()
                if self.step - first > 3:  # the first steps compile
                    rate = self.seconds_per_step or now - started
                    self.seconds_per_step = 0.95 * rate + 0.05 * (now - started)
                show(losses[-1])
                if self.step % LOG_STEPS == 0:
                    self._log(loss=sum(losses) / len(losses), grad_norm=norm, lr=self.lr)
                    losses = []
                if self.heldout is not None and now - evaluated > 60 * eval_minutes:
                    self._log(heldout=self.evaluate())
                    evaluated = time.monotonic()
        if self.peers is not None:
            self.peers.average(self.trained.parameters())
        if self.heldout is not None and self.step > first:
            self._log(heldout=self.evaluate())
        self.save()
        plot_loss(self.run_folder)

    def _agreed(self, *wishes: bool) -> Sequence[bool]:
        """What is to be done now: one's own wishes, or at a meeting of peers those of any."""
        if self.peers is None:
            return wishes
        if self.step % MEETING_STEPS:
            return [False] * len(wishes)
        self.peers.average(self.trained.parameters())
        return self.peers.any(*wishes)

    def begin_decay(self, steps: int) -> None:
        """Let the learning rate fall to zero over the next `steps` steps, the last of the run.

        With peers, over as many as the first of them says.
        """
        if self.peers is not None:
            steps = self.peers.first(steps)
        self.decay = Decay(self.step, max(1, steps))

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        scale = lr_scale(self.step, warmup_steps=self.config.warmup_steps, decay=self.decay)
        return self.config.lr * scale

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step. Returns the loss and the gradient norm before clipping.

        Raises:
          TrainError: the loss is not finite; no weight has been changed by this step.
        """
        batch = batch.to(self.device)
        chunk = min(chunk_rows(self.model.config.vocab_size), self.config.row_multiple)
        with rounded(self.model, self.formats), self._autocast():
            hidden_RD = self._hidden(batch)
            loss = backward_in_chunks(
                self._head, hidden_RD, batch.targets_R, batch.weights_R, chunk=chunk
            )
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.grad_clip)
        if not bool(torch.isfinite(norm)):
            raise TrainError(
                f"step {self.step}: loss {loss.item()}, gradient norm {norm.item()}; resume from "
                f"an earlier checkpoint of {self.run_folder} or train with a lower lr "
                f"(now {self.config.lr})"
            )
        set_lr(self.optimizers, self.lr)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), norm.item()

    def evaluate(self, *, batches: int = 16) -> dict[str, float]:
        """Mean held-out loss of each kind of conversation, over the same `batches` batches."""
        if self.heldout is None:
            return {}
        with rounded(self.model, self.formats), torch.no_grad():
            return self._losses(self.heldout, batches)

    def _losses(self, data: TokenSet, batches: int) -> dict[str, float]:
        plan = plan_epoch(
            data.lengths,
            batch_tokens=self.config.batch_tokens,
            seed=0,
            epoch=0,
            patches=data.patches,
        )
        total = torch.zeros(len(data.kind_names))
        count = torch.zeros(len(data.kind_names))
        for members in plan[:batches]:
            batch = make_batch(
                data,
                members,
                batch_tokens=self.config.batch_tokens,
                row_multiple=self.config.row_multiple,
            ).to(self.device)
            # Compiled code for a pass without gradients would take longer to build than to save.
            with self._autocast(), torch.compiler.set_stance("force_eager"):
                hidden_RD = self._hidden(batch)
            ends = torch.tensor(batch.lengths).cumsum(0)
            owner_R = torch.searchsorted(ends, batch.rows_R.cpu(), right=True)
            for i, conversation in enumerate(members):
                mine = (owner_R == i).to(self.device)
                targets = batch.targets_R[mine]
                kind = int(data.kinds[conversation])
                logits = self.model.logits(hidden_RD[mine])
                total[kind] += sum_cross_entropy(logits, targets).cpu()
                count[kind] += (targets >= 0).sum().cpu()
        return {
            name: (total[k] / count[k]).item()
            for k, name in enumerate(data.kind_names)
            if count[k] > 0
        }

    def _hidden(self, batch: Batch) -> torch.Tensor:
        soft, blocks_T = None, None
        if batch.soft is not None:
            soft = batch.soft.at_S, self._soft_rows(batch.soft)
            if self.model.config.use_bidirectional_attention == "vision":
                blocks_T = torch.full_like(batch.ids_T, -1)
                blocks_T[batch.soft.at_S] = batch.soft.image_S
        kv = NoCache(self.model.config, batch.lengths, blocks_T)
        return self.model(batch.ids_T, batch.positions_T, kv, rows_R=batch.rows_R, soft=soft)

    def _soft_rows(self, inputs: SoftInputs) -> torch.Tensor:
        """Rows [S, D] of the towers, in the order of `inputs.at_S`."""
        assert self.towers is not None, "_check_towers lets no media pass without towers"
        rows = [self.towers.hear(*clip) for clip in inputs.clips]
        if inputs.lengths:
            seen = self.towers.see(inputs.values_PC, inputs.positions_P2, inputs.lengths)
            rows = [seen, *rows]
        return torch.cat(rows)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    # The run folder

    def save(self) -> Path:
        """Write a checkpoint, whole or not at all, and drop those no longer needed."""
        path = self.run_folder / f"checkpoint-{self.step}.pt"
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "data": self.packer.state,
            "decay": (self.decay.start, self.decay.steps) if self.decay else None,
            "seconds_per_step": self.seconds_per_step,
        }
        if self.towers is not None:
            state["towers"] = self.towers.state_dict()
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        stable = self.decay.start if self.decay else self.step
        for old in checkpoints(self.run_folder)[:-KEPT_CHECKPOINTS]:
            if _step_of(old) != stable:
                old.unlink()
        return path

    def _open_run(self) -> None:
        identity: dict[str, dict[str, Any]] = {
            "train": asdict(self.config),
            "model": self.model.config.to_dict(),
        }
        if self.towers is not None:
            config = self.towers.config.to_dict()
            identity["towers"] = {key: config[key] for key in ("vision_config", "audio_config")}
        identity = json.loads(json.dumps(identity))
        path = self.run_folder / "run.json"
        self.run_folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            if ("towers" in there) != ("towers" in identity):
                raise TrainError(
                    f"{self.run_folder} holds a run {'with' if 'towers' in there else 'without'} "
                    "towers, and this one is not; train with data like its own, or in a new folder"
                )
            changes = [
                f"{part}.{key} is {there[part].get(key)!r} there and {value!r} here"
                for part, values in identity.items()
                for key, value in values.items()
                if there[part].get(key) != value
            ]
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise TrainError(f"{path}: not the record of a run ({error!r})") from None
        if changes:
            raise TrainError(
                f"{self.run_folder} holds another run: {'; '.join(changes)}. "
                "Train with what it says, or in a new folder."
            )

    def _resume(self, decay: bool) -> None:
        for path in reversed(checkpoints(self.run_folder)):
            try:
                state = torch.load(path, map_location=self.device, weights_only=True)
                if state["decay"] is not None and not decay:
                    continue
                self.model.load_state_dict(state["model"])
                if self.towers is not None:
                    self.towers.load_state_dict(state["towers"])
                for optimizer, its_state in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(its_state)
            except (RuntimeError, ValueError, LookupError, EOFError, TypeError) as error:
                raise TrainError(
                    f"{path} cannot be resumed ({str(error).splitlines()[0]}); "
                    "delete it to go on from the checkpoint before"
                ) from None
            self.step, self.seconds_per_step = state["step"], state["seconds_per_step"]
            self.packer.seek(*state["data"])
            self.decay = Decay(*state["decay"]) if state["decay"] else None
            for passed in checkpoints(self.run_folder):
                # Of a decay that is not gone on with: else it would count as newer than this.
                if _step_of(passed) > self.step:
                    passed.replace(passed.with_name(f"decayed-{_step_of(passed)}.pt"))
            return

    def _log(self, **values: Any) -> None:
        line = {"step": self.step, "tokens": self.step * self.config.batch_tokens, **values}
        if self.seconds_per_step:
            line["tokens_per_s"] = round(self.config.batch_tokens / self.seconds_per_step)
        with (self.run_folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def _progress(self, last: int | None) -> Iterator[Callable[[float], None]]:
        with Progress(
            TextColumn("step {task.completed:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            disable=self.peers is not None and self.peers.rank > 0,
        ) as bar:
            task = bar.add_task("", total=last, completed=self.step, text="")

            def show(loss: float) -> None:
                seconds = self.seconds_per_step
                speed = self.config.batch_tokens / seconds if seconds else 0.0
                text = f"loss {loss:.4f}  lr {self.lr:.2e}  {speed:,.0f} tokens/s"
                bar.update(task, completed=self.step, text=text)

            yield show

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self._stop = True

        self._stop = False
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_towers(data: TokenSet | None, towers: Towers | None) -> None:
    if data is None or data.media is None:
        return
    for kind, name, has in (
        (IMAGE, "pictures", towers is not None and towers.sees),
        (SOUND, "sounds", towers is not None and towers.hears),
    ):
        if kind in data.media.kinds and not has:
            raise TrainError(
                f"{data.name} has {name} but there is no tower to take them; give the trainer "
                "towers whose config has one, or leave them out of the data"
            )


def checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    return sorted(Path(run).glob("checkpoint-*.pt"), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def plot_loss(run: str | Path) -> None:
    """Draw loss.png from log.jsonl; does nothing before its first line or without matplotlib."""
    run = Path(run)
    log = run / "log.jsonl"
    try:
        from matplotlib import color_sequences
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not log.exists():
        return
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=color_sequences["tab20"])  # more kinds than the default has colors
    trained = [line for line in lines if "loss" in line]
    axes.plot(
        [line["tokens"] / 1e6 for line in trained],
        [line["loss"] for line in trained],
        label="training",
        linewidth=0.8,
    )
    held = [line for line in lines if "heldout" in line]
    for kind in sorted({kind for line in held for kind in line["heldout"]}):
        points = [
            (line["tokens"] / 1e6, line["heldout"][kind])
            for line in held
            if kind in line["heldout"]
        ]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"held out: {kind}")
    axes.set(xlabel="million tokens", ylabel="cross entropy (nats a token)", yscale="log")
    figure.legend(fontsize="small", loc="outside right center")
    figure.savefig(run / "loss.png", dpi=100)
