"""Models on Hugging Face before and after their context is extended, for examples/context_extension.sh.

    long_context.py make --tokenizer-file FILE --seq-length N --output DIR
    long_context.py yarn --input DIR --factor F --output DIR
    long_context.py losses --models DIR DIR … --text FOLDER --seq-length N --output PICTURE.png
    long_context.py generate --input DIR --text FOLDER --seq-length N

``pip install "helixpipe[hf]"`` brings transformers, with which models are made, measured and run here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

# Works from a checkout that is not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helixpipe.commands.parser import ScriptParser
from helixpipe.commands.ranges import Real, Whole

END_TOKEN = "<|endoftext|>"
# Positions whose losses are one point of the picture.
BIN = 32
# Sequences in one call of the model.
BATCH = 8


def build_parser() -> ScriptParser:
    """The parser alone."""
    parser = ScriptParser(prog="long_context", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="a tiny random Llama with a tokenizer")
    make.add_argument("--tokenizer-file", type=Path, required=True)
    yarn = commands.add_parser("yarn", help="the same weights with YaRN in config.json")
    yarn.add_argument("--input", type=Path, required=True)
    yarn.add_argument(
        "--factor", type=Real(least=1.0), required=True, help="how much longer sequences may be"
    )
    losses = commands.add_parser("losses", help="loss by position on text: a picture and its numbers")
    losses.add_argument("--models", type=Path, nargs="+", required=True)
    losses.add_argument("--sequences", type=Whole(), default=96, help="on which the mean is (default 96)")
    generate = commands.add_parser("generate", help="go on where a text was cut off")
    generate.add_argument("--input", type=Path, required=True)
    generate.add_argument("--tokens", type=Whole(), default=24, help="to generate (default 24)")
    for command in (losses, generate):
        command.add_argument("--text", type=Path, required=True, help="folder of Python files")
    for command in (make, losses, generate):
        command.add_argument("--seq-length", type=Whole(), required=True)
    for command in (make, yarn, losses):
        command.add_argument("--output", type=Path, required=True)
    return parser


def main() -> None:
    """Run one of the four commands."""
    parser = build_parser()
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Call what the command line names."""
    if args.command == "make":
        make(args.tokenizer_file, args.seq_length, args.output)
    elif args.command == "yarn":
        stretch(args.input, args.factor, args.output)
    elif args.command == "losses":
        losses(args.models, args.text, args.seq_length, args.sequences, args.output)
    else:
        generate(args.input, args.text, args.seq_length, args.tokens)


def make(tokenizer_file: Path, seq_length: int, output: Path) -> None:
    """Write a random model as it would come from Hugging Face: weights, config.json and tokenizer.

    Args:
        tokenizer_file: as ``helixpipe prepare`` writes it beside a dataset.
        seq_length: the longest that the model is said to be made for, in tokens.
        output: folder to be made.
    """
    torch.manual_seed(1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=END_TOKEN)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=seq_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(output)
    tokenizer.save_pretrained(output)


def stretch(source: Path, factor: float, output: Path) -> None:
    """Copy a model for sequences ``factor`` times as long: the same weights, positions stretched by YaRN.

    Raises:
        ValueError: its rotary positions are scaled already.
    """
    config = json.loads((source / "config.json").read_text())
    # The second name is that of transformers 4, where it is null for plain positions.
    field = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    rope, longest = config[field] or {"rope_type": "default"}, config["max_position_embeddings"]
    if rope["rope_type"] != "default":
        raise ValueError(f"{source} has {rope['rope_type']} positions; give a model of plain RoPE")
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": longest}
    config[field] = rope | yarn
    config["max_position_embeddings"] = int(factor * longest)
    shutil.copytree(source, output)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def windows(model: Path, folder: Path, length: int, count: int) -> Tensor:
    """int64 ``[count, length]``: tokens from places spread evenly over the text.

    A window lies within one file, so that all of it is context; files too short for one are left out.

    Raises:
        ValueError: the text has fewer.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    found: list[NDArray[np.int64]] = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tokens = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
        found.extend(np.split(tokens[: len(tokens) // length * length], max(len(tokens) // length, 1)))
    found = [window for window in found if len(window)]
    if len(found) < count:
        raise ValueError(f"{folder} has {len(found)} windows of {length} tokens; ask for no more than those")
    return torch.from_numpy(np.stack([found[i * len(found) // count] for i in range(count)]))


@torch.inference_mode()
def loss_by_position(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats, fp64 ``[length - 1]``: of guessing the token behind each position.

    Args:
        model: one of transformers'.
        tokens: int64 ``[sequences, length]``.
    """
    total = torch.zeros(tokens.shape[1] - 1, dtype=torch.float64)
    for batch in tokens.split(BATCH):
        logits = model(batch[:, :-1]).logits.float()
        total += nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").double().sum(0)
    return total / len(tokens)


def losses(models: list[Path], folder: Path, length: int, count: int, output: Path) -> None:
    """Draw loss by position of each model on the same windows, and write and print its numbers.

    Args:
        models: folders; the first is the one whose context was extended.
        folder: of text that none was trained on.
        length: positions, more than the first model was made for.
        count: windows.
        output: the picture; its numbers go to the same name with ``.json``.

    Raises:
        ValueError: the sequences are no longer than the first model's, or the text has too few.
    """
    trained = AutoConfig.from_pretrained(models[0]).max_position_embeddings
    if length <= trained:
        raise ValueError(f"--seq-length {length} is within the {trained} of {models[0]}; give more")
    tokens = windows(models[0], folder, length + 1, count)
    curves = {}
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        curves[path.name] = loss_by_position(model, tokens)
    draw(curves, trained, count, output)
    rows = {name: curve.tolist() for name, curve in curves.items()}
    output.with_suffix(".json").write_text(json.dumps(rows) + "\n")
    print(f"mean loss at positions   0 to {trained - 1:<6} {trained} to {length - 1}")
    for name, curve in curves.items():
        print(f"  {name:<20} {curve[:trained].mean():8.3f} {curve[trained:].mean():14.3f}")


def draw(curves: Mapping[str, Tensor], trained: int, count: int, output: Path) -> None:
    """One line per model over positions, each point the mean of some positions."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        positions, means = zip(*binned(curve), strict=True)
        axes.plot(positions, means, label=name)
    ends = f"{trained} tokens: the model's length before"
    axes.axvline(trained, color="gray", linestyle="--", linewidth=1, label=ends)
    axes.set_xlabel(f"position in the sequence (tokens; a point is the mean of {BIN})")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss by position on {count} held-out sequences")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(curves) + 1)
    figure.savefig(output, dpi=120)


def binned(curve: Tensor) -> Iterator[tuple[float, float]]:
    """Middle and mean of every bin of positions; the last may be smaller."""
    start = 0
    for part in curve.split(BIN):
        yield start + (len(part) - 1) / 2, float(part.mean())
        start += len(part)


def generate(path: Path, folder: Path, length: int, tokens: int) -> None:
    """Print the end of a held-out sequence and what the model puts behind it."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    prompt = windows(path, folder, length - tokens, 1)
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    print(f"{prompt.shape[1]} tokens, which end with:\n{tokenizer.decode(prompt[0, -tokens:])}")
    print(f"{made.shape[1] - prompt.shape[1]} generated:\n{tokenizer.decode(made[0, prompt.shape[1] :])}")


if __name__ == "__main__":
    main()
