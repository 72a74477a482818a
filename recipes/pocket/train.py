"""Trains the embedded model and exports it as a checkpoint folder.

  python -m recipes.pocket.train fit --data DATA --run RUN [--minutes N] [--decay-now]
                                   [--from CHECKPOINT] [--towers FILE] [--frozen]
                                   [--lr RATE] [--batch-tokens N] [--bits 4]
  torchrun --nproc-per-node 2 -m -- recipes.pocket.train fit --data DATA DATA --run RUN ...
  python -m recipes.pocket.train export --run RUN --tokenizer FOLDER --out FOLDER
  python -m recipes.pocket.train average CHECKPOINT CHECKPOINT ... --out FOLDER [--bits 4]

`fit` stops cleanly at any time and goes on where it stopped. The learning rate stays level until a
stretch with --decay-now, which lets it fall to zero and so ends the run; a later stretch without it
goes on from where the decay began. Processes of `torchrun`, one a core, each with data of its own,
average their weights as they go.

`average` takes the mean of the weights of checkpoints of which one was trained from the other: what
each of them does better, the mean keeps (Wortsman et al., arXiv:2203.05482).

Data: see build_data.py. Data with pictures and sounds train the towers too; a run is with towers or
without from its first step to its export. `--from` a checkpoint without towers adds fresh ones,
or those that `--towers` names; with `--frozen` they stay as they were taught. With `--bits` the
decoder learns to be rounded, and what is exported is rounded already.

Shape: E-series in small. Layers 5-8 own no K/V, so in training they and the head run on learned
tokens alone (28 % of all): most of the parameters sit where they are cheap. Both towers see the
world through a stream of 4 layers, 192 wide for pictures (nine patches' letters are to fit into one
row) and 128 for sound: 3.8 of the 11.4 million parameters.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gemsmith.config import AudioConfig, Gemma4Config, LayerType, TextConfig, VisionConfig
from gemsmith.errors import TrainError
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.train.data import TokenSet
from gemsmith.train.peers import join
from gemsmith.train.rounding import decoder_formats, rounded
from gemsmith.train.trainer import TrainConfig, Trainer, checkpoints
from gemsmith.weights.generation import GenerationConfig
from gemsmith.weights.load import load_model, load_towers
from gemsmith.weights.save import save_model

SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

END_IDS = (1, 106, 50)
"""<eos>, <turn|> and the <|tool_response> that ends a call."""

TEXT = TextConfig(
    vocab_size=4096,
    vocab_size_per_layer_input=4096,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=9,
    layer_types=(SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL),
    num_kv_shared_layers=4,
    use_double_wide_mlp=True,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=64,
    global_head_dim=128,
    sliding_window=128,
    hidden_size_per_layer_input=16,
    max_position_embeddings=8192,
    final_logit_softcapping=30.0,
)

VISION = VisionConfig(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=64,
    position_embedding_size=512,
    use_clipped_linears=True,
    default_output_length=70,
)

AUDIO = AudioConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    subsampling_conv_channels=(128, 8),
    output_proj_dims=128,
)

POCKET = Gemma4Config(
    text_config=TEXT,
    vision_config=VISION,
    audio_config=AUDIO,
    boi_token_id=4089,
    boa_token_id=4090,
    image_token_id=4091,
    audio_token_id=4092,
    eoi_token_id=4093,
    eoa_token_index=4094,
    video_token_id=4095,
    eos_token_id=END_IDS,
)

TRAIN = TrainConfig(
    batch_tokens=4096, lr=4e-3, weight_decay=0.1, warmup_steps=100, row_multiple=512
)


@torch.no_grad()
def init_weights(model: TextModel, seed: int) -> None:
    """Random weights that train fast at this size.

    Unit variance everywhere: matrices by fan-in, scaled embeddings of unit RMS. Attention has no
    1/sqrt(head_dim), so the query and key norms start where a product of the two has it. Branches
    start small beside the residual stream, so that tokens are still legible in late layers.
    """
    model.init_weights(torch.Generator().manual_seed(seed))
    config = model.config
    for name, p in model.named_parameters():
        if name == "embed_tokens_per_layer.weight":
            p.mul_(0.5 * config.hidden_size_per_layer_input**-0.5 / 0.02)
        elif p.ndim == 2:
            p.mul_(p.shape[1] ** -0.5 / 0.02)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            p.fill_(len(p) ** -0.25)
        elif ".post_" in name:
            p.fill_((2 * config.num_hidden_layers) ** -0.5)


@torch.no_grad()
def init_towers(towers: Towers, seed: int) -> None:
    """As `init_weights`; what they give has unit variance, like the embeddings it stands among."""
    towers.init_weights(torch.Generator().manual_seed(seed))
    layers = {
        "vision_tower": VISION.num_hidden_layers,
        "audio_tower": 2 * AUDIO.num_hidden_layers,  # it has twice as many branches a layer
    }
    for name, p in towers.named_parameters():
        if "position_embedding_table" in name:
            p.mul_(0.5 / 0.02)
        elif p.ndim > 1:
            p.mul_(p[0].numel() ** -0.5 / 0.02)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            p.fill_(len(p) ** -0.25)
        elif ".post_" in name or "norm_post" in name:
            p.fill_((2 * layers[name.split(".")[0]]) ** -0.5)


def fit(
    data: Sequence[Path],
    run: Path,
    *,
    minutes: float | None,
    decay: bool,
    start: Path | None = None,
    taught: Path | None = None,
    lr: float = TRAIN.lr,
    batch_tokens: int = TRAIN.batch_tokens,
    frozen: bool = False,
    bits: str | None = None,
) -> None:
    """One stretch of training in the run folder `run`; a new run begins with `start`'s weights.

    data: a folder, or one for each process that `torchrun` started; only the first process has the
      held-out set, and what it leaves in `run` is what all have learned.
    With towers if the training set has pictures or sounds; `taught`: a file that has them;
    `frozen`: they stay as they are, which makes a step cheaper.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(TRAIN.seed)
    peers = join()
    rank = 0 if peers is None else peers.rank
    if len(data) != (1 if peers is None else peers.count):
        raise TrainError(
            f"--data names {len(data)} folders, one for each process is needed; start as many with "
            "torchrun --nproc-per-node"
        )
    mine, first = data[rank], rank == 0
    train = TokenSet(mine, "train")
    has_heldout = first and (mine / "heldout.ids.npy").exists()
    heldout = TokenSet(mine, "heldout") if has_heldout else None
    model, towers = TextModel(TEXT), None
    init_weights(model, TRAIN.seed)
    has_media = train.media is not None
    if has_media if peers is None else peers.any(has_media)[0]:
        towers = Towers(POCKET)
        init_towers(towers, TRAIN.seed)
    if start is not None:
        config, loaded = load_model(start, dtype=torch.float32, ple="memory")
        model.load_state_dict(loaded.state_dict())
        # Towers taught anew may have another shape than those of the checkpoint.
        if towers is not None and taught is None and config.vision_config is not None:
            there = load_towers(start, config, device="cpu", dtype=torch.float32)
            towers.load_state_dict(there.state_dict())
    if towers is not None and taught is not None:
        towers.load_state_dict(torch.load(taught, weights_only=True)["towers"])
    if towers is not None:
        towers.requires_grad_(not frozen)
    for name, part in (("decoder", model), ("towers", towers)):
        if part is not None:
            part.to(device)
            print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters", flush=True)
    trainer = Trainer(
        model,
        replace(TRAIN, lr=lr, batch_tokens=batch_tokens, bits=bits),
        train,
        run if first else run / f"peer-{rank}",
        towers=towers,
        heldout=heldout,
        compiled=True,
        decay=decay,
        peers=peers,
    )
    if decay and trainer.decay is None:
        if minutes is None or not trainer.seconds_per_step:
            raise TrainError(
                "--decay-now needs --minutes and a run that has measured its speed; train a "
                "stretch without it first"
            )
        trainer.begin_decay(round(60 * minutes / trainer.seconds_per_step))
        minutes = None  # the decay's steps end the run
    trainer.train(minutes=minutes)


def export(run: Path, tokenizer: Path, out: Path) -> None:
    """Write the newest checkpoint of `run` as a checkpoint folder in bfloat16, towers with it.

    Raises:
      TrainError: `run` has no checkpoint.
      WeightsError: the folder cannot be written.
    """
    paths = checkpoints(run)
    if not paths:
        raise TrainError(f"{run} has no checkpoint; train a stretch first")
    state = torch.load(paths[-1], map_location="cpu", weights_only=True)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    print(f"{paths[-1].name} -> {out}")
    write(state["model"], state.get("towers"), record["train"].get("bits"), tokenizer, out)


def average(folders: list[Path], out: Path, bits: str | None) -> None:
    """Write the mean of checkpoints, decoder and towers, with the tokenizer of the first.

    Raises:
      WeightsError: one of them is damaged, or `out` cannot be written.
    """
    decoders, towers = [], []
    for folder in folders:
        config, model = load_model(folder, dtype=torch.float32, ple="memory")
        decoders.append(model.state_dict())
        if config.vision_config is not None:
            there = load_towers(folder, config, device="cpu", dtype=torch.float32)
            towers.append(there.state_dict())
    write(mean(decoders), mean(towers) if towers else None, bits, folders[0], out)


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def write(
    decoder: dict[str, torch.Tensor],
    towers: dict[str, torch.Tensor] | None,
    bits: str | None,
    tokenizer: Path,
    out: Path,
) -> None:
    """A checkpoint folder in bfloat16 of these weights, the decoder's rounded to `bits`."""
    model, seen = TextModel(TEXT), None
    model.load_state_dict(decoder)
    if towers is not None:
        seen = Towers(POCKET)
        seen.load_state_dict(towers)
    with rounded(model, decoder_formats(model, bits)):
        save_model(model, POCKET, out, towers=seen, dtype=torch.bfloat16)
    GenerationConfig(do_sample=False, eos_token_id=END_IDS).save(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    print(f"{sum(path.stat().st_size for path in out.iterdir()) / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="train the embedded model, or export it")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fit", help="train a stretch")
    command.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        help="folder that build_data wrote; under torchrun one for each process",
    )
    command.add_argument("--run", type=Path, required=True, help="run folder, created or resumed")
    command.add_argument("--from", dest="start", type=Path, help="checkpoint folder to begin with")
    command.add_argument(
        "--towers", type=Path, help="towers to begin with, of recipes.pocket.towers"
    )
    command.add_argument(
        "--lr", type=float, default=TRAIN.lr, help="level rate; a finished model wants a lower one"
    )
    command.add_argument("--batch-tokens", type=int, default=TRAIN.batch_tokens, help="of a step")
    command.add_argument("--frozen", action="store_true", help="leave the towers as they are")
    command.add_argument("--bits", help="of the recipe that the decoder is to be rounded by")
    command.add_argument("--minutes", type=float, help="length of the stretch; default: no end")
    command.add_argument("--decay-now", action="store_true", help="end the run with this stretch")
    command = commands.add_parser("export", help="write a checkpoint folder")
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--tokenizer", type=Path, required=True, help="folder to copy from")
    command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("average", help="write the mean of checkpoint folders")
    command.add_argument("folders", type=Path, nargs="+")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--bits", help="of the recipe that the decoder is rounded by")
    args = parser.parse_args()
    if args.command == "average":
        average(args.folders, args.out, args.bits)
    elif args.command == "fit":
        torch.set_flush_denormal(True)  # sharp attention makes many, and they are slow
        fit(
            args.data,
            args.run,
            minutes=args.minutes,
            decay=args.decay_now,
            start=args.start,
            taught=args.towers,
            lr=args.lr,
            batch_tokens=args.batch_tokens,
            frozen=args.frozen,
            bits=args.bits,
        )
    else:
        export(args.run, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
