"""A model on Hugging Face to a checkpoint of ours, and back, a few tensors at a time."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megatron.pretrain.checkpoint.common_state import read_common
from megatron.pretrain.checkpoint.comparison import differing_model_settings, model_settings
from megatron.pretrain.checkpoint.files import digest, is_megatron_lms, tracked, usable
from megatron.pretrain.checkpoint.inspection import faults_by_table
from megatron.pretrain.checkpoint.megatron_lm import architecture, arguments_of
from megatron.pretrain.checkpoint.publishing import publish, start_saving
from megatron.pretrain.checkpoint.safe_pickle import find_unsafe_content, no_code_from_disk
from megatron.pretrain.checkpoint.shards import BACKEND, VERSION
from megatron.pretrain.checkpoint.sums import bit_sum
from megatron.pretrain.hf.config import CONFIG, read_config
from megatron.pretrain.hf.families import command_line, describe_model
from megatron.pretrain.hf.families.family import Model
from megatron.pretrain.hf.parts import CheckpointReader, Part, write_parts
from megatron.pretrain.hf.rules import Rule
from megatron.pretrain.hf.tensor_files import TensorFolder, TensorWriter, new_folder
from megatron.pretrain.settings.parser import build_parser
from megatron.pretrain.settings.sizes import derive_model

# Of a checkpoint: where config.json and the tokenizer of the imported model are kept, beside its iterations.
REFERENCE = "hf"
# Weights in any format, which the checkpoint replaces.
_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf",
    "*.h5", "*.msgpack", "*.onnx",
)  # fmt: skip

# What training options must be given for the parser, and say nothing of a model.
_TRAINING = (
    "--seq-length 1 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 0 --data-path none"
).split()


def import_model(
    source: Path, output: Path, *, dtype: torch.dtype | None = None, padded_rows: int | None = None
) -> list[str]:
    """Write a checkpoint of iteration 0 with a model's weights, which ``--pretrained-checkpoint`` takes.

    Args:
        source: folder with config.json and safetensors files.
        output: folder of checkpoints, to be made.
        dtype: of the weights here; None for those of the files.
        padded_rows: of the embedding; None for as many as there.

    Returns:
        the model's options of pretrain_gpt.py.

    Raises:
        ValueError: something that is not understood, or an output that holds checkpoints.
    """
    model = describe_model(read_config(source), padded_rows)
    folder = TensorFolder(source, model.prefix)
    _check_names(source, model, folder)
    if usable(output) or (output.exists() and tracked(output)):
        raise ValueError(f"{output} holds checkpoints; give another --output")
    sums: Counter[str] = Counter()
    parts = list(_parts(model, folder, dtype, sums))
    target = start_saving(output, 0)
    write_parts(target, parts)
    common = {
        "iteration": 0,
        "samples": {},
        "settings": model_settings(_options(model)),
        "sums": {name: value % 2**64 for name, value in sums.items()},
    }
    torch.save(common, target / "common.pt")
    save_config(CheckpointingConfig(BACKEND, VERSION), str(target))
    _copy_rest(source, output / REFERENCE)
    digests = {path.name: digest(path, to_disk=True) for path in target.iterdir()}
    publish(output, 0, digests, job=f"import {source}", previous=None, keep=None)
    return command_line(model)


def export_model(
    source: Path,
    output: Path,
    *,
    reference: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 30,
) -> Path:
    """Write the newest checkpoint's weights as a model on Hugging Face.

    Args:
        source: folder of checkpoints, ours or Megatron-LM's.
        output: folder to be made.
        reference: whose config.json and tokenizer the model gets; None for those of an imported model.
        dtype: of the weights there; None for those of the checkpoint.
        shard_bytes: largest size of a file; twice as much is in memory at a time.

    Returns:
        the checkpoint that was exported.

    Raises:
        ValueError: the checkpoint is damaged or of another model than the reference.
    """
    checkpoint = tracked(source)
    if checkpoint is None:
        raise ValueError(f"{source} holds no checkpoint; give a folder of --save")
    if reference is None and not (source / REFERENCE).is_dir():
        raise ValueError(
            f"{source} was not imported; give the folder of its model on Hugging Face as --reference"
        )
    reference = source / REFERENCE if reference is None else reference
    is_theirs = is_megatron_lms(checkpoint)
    problem = "; ".join(faults_by_table(checkpoint)[:1]) if is_theirs else find_unsafe_content(checkpoint)
    if problem:
        raise ValueError(problem)
    common = read_common(checkpoint)
    settings = architecture(arguments_of(checkpoint, common) if is_theirs else common["settings"])
    model = describe_model(read_config(reference), settings["padded_vocab_size"])
    differing = differing_model_settings(settings, architecture(_options(model)))
    if differing:
        raise ValueError(
            f"{checkpoint} was trained with {'; '.join(differing)} of {reference / CONFIG}; give a "
            "--reference whose config.json describes the trained model"
        )
    with new_folder(output) as target, no_code_from_disk():
        # Theirs has no sums; its files were held to their checksums.
        sums = None if is_theirs else common["sums"]
        _export_tensors(CheckpointReader(checkpoint), model, sums, dtype, target, shard_bytes)
        _copy_rest(reference, target)
    return checkpoint


def _options(model: Model) -> dict[str, Any]:
    """The model's options as pretrain_gpt.py reads them."""
    args = build_parser().parse_args([*command_line(model), *_TRAINING])
    derive_model(args)
    return vars(args)


def _sizes(model: Model, rule: Rule) -> tuple[int, ...]:
    """Of how many layers, and experts in each, a rule makes one tensor each; empty for one by itself."""
    return tuple(rule.sizes(model.arguments["num_layers"]).values())


def _places(model: Model, rule: Rule) -> Iterator[tuple[int, ...]]:
    """Their numbers; one empty tuple for a tensor by itself."""
    return product(*map(range, _sizes(model, rule)))


def _check_names(source: Path, model: Model, folder: TensorFolder) -> None:
    """All tensors of the rules, and no others, are in the files."""
    wanted = {name for rule in model.rules for place in _places(model, rule) for name in rule.names(*place)}
    missing = sorted(wanted - folder.names)
    if missing:
        raise ValueError(
            f"{source} has no tensor {missing[0]}, which its {CONFIG} asks for ({len(missing)} missing)"
        )
    left = sorted(name for name in folder.names - wanted if not name.endswith(model.computed))
    for name in left:
        if name not in model.aliases:
            raise ValueError(
                f"{source} has a tensor {name}, which its {CONFIG} does not ask for ({len(left)} left)"
            )
        if not torch.equal(folder.read(name), folder.read(model.aliases[name])):
            raise ValueError(f"{source}: {name} is tied to {model.aliases[name]}, but holds other numbers")


def _parts(
    model: Model, folder: TensorFolder, dtype: torch.dtype | None, sums: Counter[str]
) -> Iterator[Part]:
    """What the checkpoint will hold; sums of what was made are added up as it is made."""
    for rule in model.rules:
        for place in _places(model, rule):
            names = rule.names(*place)
            form = rule.join(tuple(folder.describe(name) for name in names))

            def produce(rule: Rule = rule, names: tuple[str, ...] = names) -> Tensor:
                tensor = rule.join(tuple(map(folder.read, names)))
                tensor = tensor if dtype is None else tensor.to(dtype)
                sums[rule.ours] += int(bit_sum(tensor))
                return tensor

            yield Part(rule.ours, place, _sizes(model, rule), form.shape, dtype or form.dtype, produce)


def _export_tensors(
    reader: CheckpointReader,
    model: Model,
    sums: dict[str, int] | None,
    dtype: torch.dtype | None,
    target: Path,
    shard_bytes: int,
) -> None:
    """Write all tensors, each found to have the sum that it had when it was saved, if that is known."""
    writer = TensorWriter(target, shard_bytes)
    for rule in model.rules:
        _check_form(reader, rule, rule.sizes(model.arguments["num_layers"]))
        found = 0
        for place in _places(model, rule):
            tensor = reader.read(rule.ours, place)
            found += int(bit_sum(tensor))
            tensor = tensor if dtype is None else tensor.to(dtype)
            for name, part in zip(rule.names(*place), rule.split(tensor), strict=True):
                writer.add(name, part)
        if sums is not None and found % 2**64 != sums.get(rule.ours):
            raise ValueError(f"{rule.ours} has another sum than when it was saved: use another checkpoint")
    writer.finish()


def _check_form(reader: CheckpointReader, rule: Rule, sizes: dict[str, int]) -> None:
    saved = reader.describe(rule.ours)
    if saved is None or tuple(saved.size[: len(sizes)]) != tuple(sizes.values()):
        shown = "".join(f" of {size} {of}" for of, size in sizes.items())
        raise ValueError(f"the checkpoint holds no {rule.ours}{shown}; use another --reference")


def _copy_rest(source: Path, target: Path) -> None:
    """config.json, the tokenizer and all else but weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, target / path.name)


def printed(words: list[str]) -> str:
    """Options for a shell, one a line."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
