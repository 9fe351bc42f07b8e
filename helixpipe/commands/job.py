"""The arguments that describe a model, a machine and how the one is cut over the other."""

from __future__ import annotations

import argparse

from helixpipe.commands.ranges import RANKS, Whole
from helixpipe.plan.advise import read_machine
from helixpipe.plan.cost_model import HARDWARE, MODELS, Hardware, Pieces, Workload, read_model
from helixpipe.plan.cost_model.hardware import ATTENTION_BACKENDS
from helixpipe.plan.cost_model.work import AUTOMATIC
from helixpipe.refusals import refuse


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, machine and sizes, with Megatron's names."""
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}; a Hugging Face config.json; or a file with Megatron arguments",
    )
    add("--vocab-size", type=Whole(), metavar="N", help="words, for a file of --model that does not say")
    add(
        "--hardware",
        required=True,
        metavar="HARDWARE",
        help=f"{', '.join(HARDWARE)}; a JSON file of rates; or a profile, which knows the model, too",
    )
    add("--seq-length", type=Whole(), help="tokens of a sequence")
    add("--micro-batch-size", type=Whole(), help="sequences in a micro batch (default 1)")
    add("--tensor-model-parallel-size", type=RANKS, help="GPUs that share a layer (default 1)")
    add("--data-parallel-size", type=RANKS, help="replicas (default 1)")
    add("--expert-model-parallel-size", type=RANKS, help="GPUs that share a layer's experts (default 1)")
    add("--use-distributed-optimizer", action="store_true")
    add("--no-sequence-parallel", action="store_true", help="norms and residuals whole on each GPU")
    add(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        metavar="NAME",
        help=f"{', '.join(ATTENTION_BACKENDS)} (default: the fastest on the hardware)",
    )
    add("--fp8", action="store_true", help="products of layers in fp8, everything else in bf16")
    add(
        "--chunked-loss",
        action="store_true",
        help="plan as if the loss were computed in chunks, never with all logits at once",
    )
    add(
        "--chunked-mlp",
        action="store_true",
        help="plan as if the MLP ran in chunks of the sequence (--mlp-chunk-size auto)",
    )


def read_workload(args: argparse.Namespace) -> tuple[Hardware | Pieces, Workload]:
    """What the arguments of :func:`add_workload_arguments` stand for.

    Raises:
        ValueError: a model, machine or size that is missing, unknown, or not what a profile was measured for.
    """
    machine = read_machine(args.hardware)
    if isinstance(machine, Pieces):
        return machine, _profiled_workload(args, machine)
    if args.attention_backend is not None:
        machine = machine.with_attention(args.attention_backend)
    return machine, _workload(args)


def _workload(args: argparse.Namespace) -> Workload:
    for flag, value in (("--model", args.model), ("--seq-length", args.seq_length)):
        if value is None:
            raise ValueError(f"{flag} is missing; only a profile in --hardware makes it unnecessary")
    return Workload(
        model=read_model(args.model, args.vocab_size),
        seq_length=args.seq_length,
        micro_batch_size=1 if args.micro_batch_size is None else args.micro_batch_size,
        tensor_parallel=1 if args.tensor_model_parallel_size is None else args.tensor_model_parallel_size,
        sequence_parallel=not args.no_sequence_parallel,
        data_parallel=1 if args.data_parallel_size is None else args.data_parallel_size,
        expert_parallel=(1 if args.expert_model_parallel_size is None else args.expert_model_parallel_size),
        distributed_optimizer=args.use_distributed_optimizer,
        whole_logits=not args.chunked_loss,
        mlp_chunk_size=AUTOMATIC if args.chunked_mlp else None,
        fp8_products=args.fp8,
    )


def _profiled_workload(args: argparse.Namespace, profile: Pieces) -> Workload:
    """The profile's workload, if the arguments do not ask for another."""
    workload = profile.workload
    asked = {
        "--seq-length": (args.seq_length, workload.seq_length),
        "--micro-batch-size": (args.micro_batch_size, workload.micro_batch_size),
        "--tensor-model-parallel-size": (args.tensor_model_parallel_size, workload.tensor_parallel),
        "--data-parallel-size": (args.data_parallel_size, workload.data_parallel),
        "--expert-model-parallel-size": (args.expert_model_parallel_size, workload.expert_parallel),
    }
    for flag, (wanted, measured) in asked.items():
        if wanted is not None and wanted != measured:
            raise ValueError(
                f"{args.hardware} was measured with {flag} {measured}, not {wanted}; profile again, or leave "
                "it out"
            )
    of_profile = {
        "--model": args.model,
        "--vocab-size": args.vocab_size,
        "--no-sequence-parallel": args.no_sequence_parallel,
        "--use-distributed-optimizer": args.use_distributed_optimizer,
        "--chunked-loss": args.chunked_loss,
        "--chunked-mlp": args.chunked_mlp,
        "--attention-backend": args.attention_backend,
        "--fp8": args.fp8,
    }
    refuse(of_profile, f"{{}} is part of the profile {args.hardware}; leave it out")
    return workload
