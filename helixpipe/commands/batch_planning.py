"""``elastic``, ``elastic-costs`` and ``elastic-profile``: plan batches of sequences of different lengths."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixpipe.commands.job import add_workload_arguments, read_workload
from helixpipe.commands.parser import argument
from helixpipe.commands.planning import read_text
from helixpipe.commands.ranges import GIBIBYTES, LAYERS, RANKS, REPEATS, Real, Whole
from helixpipe.json_input import parse_json
from helixpipe.plan.cost_model import Hardware, Workload, read_model
from helixpipe.plan.schedules.request import ATTENTION_RANGES
from helixpipe.plan.stage_layers import parse_stage_layers

if TYPE_CHECKING:
    from helixpipe.elastic.costs.fit import Fit

_GIB = 2**30
# As helixpipe.elastic.search.choice has them, which takes long to import.
ELASTIC_SCHEDULES = ("elastic", "elastic-helix", "auto")
_AUTO = ELASTIC_SCHEDULES[-1]
# At which elastic-profile measures the head: long enough for steady rates, with logits that fit anywhere.
_PIECES_LENGTH = 2048


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the commands' parsers."""
    _add_elastic(add("elastic", help="plan a batch of sequences of different lengths"))
    costs = add("elastic-costs", help="predict what chunks cost, or fit it to measurements, for elastic")
    add_workload_arguments(costs)
    costs.add_argument("--pipeline-model-parallel-size", type=RANKS, required=True, help="stages p")
    costs.add_argument(
        "--measurements",
        type=Path,
        help="records of chunks that ran: a list of {context, lengths, forward_ms, backward_ms, bytes}",
    )
    costs.add_argument("--measured-layers", type=LAYERS, help="that each record ran through")
    costs.add_argument("--output", type=Path, required=True, help="costs.json")
    costs.set_defaults(run=_costs)
    _add_profile(
        add("elastic-profile", help="measure what chunks cost here, for elastic; also under torchrun")
    )


def _add_profile(profile: argparse.ArgumentParser) -> None:
    add = profile.add_argument
    add("--model", required=True, help="name or file, as for advise")
    add("--vocab-size", type=Whole(), metavar="N", help="words, for a file that does not say")
    add("--max-seq-length", type=Whole(), required=True, metavar="N", help="tokens of the longest sequence")
    add("--pipeline-model-parallel-size", type=RANKS, required=True, help="stages p")
    add("--tensor-model-parallel-size", type=RANKS, default=1)
    add("--no-sequence-parallel", action="store_true")
    add("--fp32", action="store_true", help="instead of bf16")
    add("--repeats", type=REPEATS, default=5, help="rounds over all chunks (default 5)")
    add("--output", type=Path, required=True, help="costs.json")
    add("--records", type=Path, help="also write what was measured, as elastic-costs takes it")
    profile.set_defaults(run=_profile)


def _add_elastic(elastic: argparse.ArgumentParser) -> None:
    add = elastic.add_argument
    add("--lengths", type=Path, required=True, help="lengths.json: a list of tokens per sequence")
    add("--costs", type=Path, required=True, help="costs.json, as elastic-costs writes it")
    add("--pipeline-model-parallel-size", type=RANKS, required=True, help="stages p")
    add("--num-layers", type=LAYERS, required=True, help="transformer layers L")
    add("--memory-limit-gib", type=GIBIBYTES, required=True, help="of one GPU, states included")
    add("--token-capacity", type=Whole(), help="tokens that a chunk may hold (default: what memory allows)")
    add(
        "--schedule",
        choices=ELASTIC_SCHEDULES,
        default=ELASTIC_SCHEDULES[0],
        help="1F1B over chunks (default), helix over them, or the faster of both",
    )
    add("--num-slices", type=Whole(), help="of the longest sequence (default: the fastest found)")
    add(
        "--stage-layers",
        type=argument(_stage_layers),
        metavar="{N,…,auto}",
        help="elastic: layers of each stage, where they differ (5,5,4,2); auto: those by which the slowest "
        "stage, the last with the head, takes the shortest",
    )
    add(
        "--attention-range",
        choices=ATTENTION_RANGES,
        help="elastic-helix: pieces on the attention rank (default: the fastest found)",
    )
    add(
        "--mip-gap",
        type=Real(least=0.0, below=1.0),
        default=0.02,
        help="by which checkpointing may miss the least (default 0.02)",
    )
    add(
        "--time-limit",
        type=Real(above=0.0, most=86400.0),
        default=6.0,
        help="seconds for checkpointing (default 6)",
    )
    add("--output", type=Path, required=True, help="plan.json: plan and recipe")
    add("--plan-costs", type=Path, help="also write the plan's costs, for simulate and draw")
    elastic.set_defaults(run=_elastic)


def _elastic(args: argparse.Namespace) -> None:
    # SciPy takes a second to import: only these commands pay for it.
    from helixpipe.elastic.baselines import predict_baselines
    from helixpipe.elastic.costs.costs_file import costs_from_json
    from helixpipe.elastic.elastic_plan import costs_of
    from helixpipe.elastic.job import ElasticJob
    from helixpipe.elastic.search.choice import choose_plan
    from helixpipe.elastic.search.stage_balance import balanced_stage_layers
    from helixpipe.report.batch_plan import print_elastic_plan

    if args.attention_range is not None and args.schedule == ELASTIC_SCHEDULES[0]:
        raise ValueError("--attention-range is for --schedule elastic-helix and auto; leave it out")
    if args.stage_layers is not None and args.schedule == ELASTIC_SCHEDULES[1]:
        raise ValueError("--stage-layers is for --schedule elastic and auto; leave it out")
    lengths = _read_lengths(args.lengths)
    costs = costs_from_json(read_text(args.costs))
    layers, stages = args.num_layers, args.pipeline_model_parallel_size
    if args.stage_layers == _AUTO:
        args.stage_layers = balanced_stage_layers(lengths, costs, layers, stages)
    job = ElasticJob(
        costs=costs,
        num_stages=stages,
        num_layers=layers,
        memory_limit_bytes=int(args.memory_limit_gib * _GIB),
        stage_layers=args.stage_layers or (),
        token_capacity=args.token_capacity,
        gap=args.mip_gap,
        time_limit_s=args.time_limit,
        schedule=args.schedule,
        attention_range=args.attention_range,
    )
    counts = None if args.num_slices is None else (args.num_slices,)
    choice = choose_plan(lengths, job, slice_counts=counts)
    plan = choice.plan
    args.output.write_text(plan.to_json(), encoding="utf-8")
    if args.plan_costs:
        args.plan_costs.write_text(costs_of(plan.recipe, job).to_json() + "\n", encoding="utf-8")
    print_elastic_plan(choice, job, predict_baselines(lengths, job))
    print(f"Wrote {args.output}")


def _stage_layers(text: str) -> tuple[int, ...] | str:
    """Layers of each stage, or the word that leaves them open."""
    return _AUTO if text == _AUTO else parse_stage_layers(text)


def _read_lengths(path: Path) -> tuple[int, ...]:
    from helixpipe.elastic.job import check_lengths

    found = parse_json(read_text(path), str(path))
    try:
        return check_lengths(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _costs(args: argparse.Namespace) -> None:
    from helixpipe.elastic.costs.costs_file import costs_to_json
    from helixpipe.elastic.costs.fit import fit_costs, measurements_from_json
    from helixpipe.elastic.costs.preset import predict_chunk_costs

    if args.seq_length is not None:
        raise ValueError(
            "--seq-length means nothing to elastic-costs, which holds for all lengths; leave it out"
        )
    if args.chunked_mlp:
        raise ValueError("--chunked-mlp: chunks of sequences are planned with whole MLPs; leave it out")
    args.seq_length = 1
    machine, workload = read_workload(args)
    if not isinstance(machine, Hardware):
        raise ValueError(
            "a profile of one sequence length does not tell what chunks cost; name a machine, and give "
            "--measurements to fit its costs"
        )
    costs = predict_chunk_costs(workload, machine, args.pipeline_model_parallel_size)
    if args.measurements is not None:
        if args.measured_layers is None:
            raise ValueError("--measurements needs --measured-layers")
        fit = fit_costs(measurements_from_json(read_text(args.measurements)), costs, args.measured_layers)
        costs = fit.costs
        _print_errors(fit)
    args.output.write_text(costs_to_json(costs), encoding="utf-8")
    print(f"{costs.source}. Wrote {args.output}")


def _print_errors(fit: Fit) -> None:
    print(f"Error on {fit.num_held_out} measurements held out:")
    for name, error in (("forward", fit.forward), ("backward", fit.backward), ("bytes", fit.bytes)):
        print(f"  {name}: {error}")


def _profile(args: argparse.Namespace) -> None:
    from helixpipe.elastic.costs.costs_file import costs_to_json
    from helixpipe.elastic.costs.fit import fit_costs, measurements_to_json
    from helixpipe.elastic.costs.preset import profiled_chunk_costs

    workload = Workload(
        model=read_model(args.model, args.vocab_size),
        seq_length=min(args.max_seq_length, _PIECES_LENGTH),
        tensor_parallel=args.tensor_model_parallel_size,
        sequence_parallel=not args.no_sequence_parallel,
        element_bytes=4 if args.fp32 else 2,
    )
    # megatron.core warns at import about every optional package that is not installed.
    warnings.filterwarnings("ignore", module="megatron.core")
    # torch and Megatron take seconds to import: only this command pays for them.
    from helixpipe.profiling import profile_chunks

    pieces, measured = profile_chunks(workload, args.max_seq_length, repeats=args.repeats)
    if os.environ.get("RANK", "0") != "0":
        return
    if args.records:
        args.records.write_text(measurements_to_json(measured), encoding="utf-8")
        print(f"{len(measured)} chunks through one layer. Wrote {args.records}")
    fit = fit_costs(measured, profiled_chunk_costs(pieces, args.pipeline_model_parallel_size), 1)
    args.output.write_text(costs_to_json(fit.costs), encoding="utf-8")
    _print_errors(fit)
    print(f"{fit.costs.source}. Wrote {args.output}")
