"""``preflight``: look at every node before a job starts there."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixpipe.commands.planning import read_plan, read_text
from helixpipe.commands.ranges import RANKS, Real, Whole
from helixpipe.plan import Plan
from helixpipe.plan.cost_model import Recompute, costs_of_plan
from helixpipe.plan.simulation.costs import Costs, parse_costs
from helixpipe.plan.simulation.link_needs import LinkNeed, link_needs
from helixpipe.reliability.exit_codes import exit_code_of, leave_exit_code

if TYPE_CHECKING:
    from torch.distributed import Store

    from helixpipe.preflight.flight import Demand, Outcome
    from megatron.pretrain.settings.job import JobSettings


class _Rest(argparse.Action):
    """All further words, of which there must be one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        if not values:
            parser.error(f"argument {option}: expected the arguments of pretrain_gpt.py")
        setattr(namespace, self.dest, values)


def add_parsers(add: Callable[..., Any]) -> None:
    """Add the command's parser."""
    parser = add(
        "preflight",
        help="check versions, GPUs, disks, clocks and every pipeline link of a job's nodes; under torchrun",
    )
    parser.add_argument("--plan", type=Path, help="plan.json, whose links are measured")
    parser.add_argument("--costs", type=Path, help="with --plan: costs.json with the sizes of messages")
    parser.add_argument(
        "--tensor-model-parallel-size", type=RANKS, help="with --plan: GPUs that share a layer (default 1)"
    )
    parser.add_argument(
        "--hardware",
        help="with --job, for the compute that hides messages: h20, h100, h200, a800, a file of rates or a "
        "profile (default: this GPU)",
    )
    parser.add_argument(
        "--host",
        action="append",
        help="a node of the job, in order, once for each; where torchrun was started on each node alone",
    )
    parser.add_argument(
        "--node-rank", type=Whole(least=0, most=2**16), help="with --host: number of this node"
    )
    parser.add_argument("--port", type=Whole(most=65535), help="with --host: a free port on the first node")
    parser.add_argument(
        "--timeout-s", type=Real(above=0.0, most=3600.0), default=45.0, help="of each stage (default 45)"
    )
    parser.add_argument(
        "--job",
        nargs=argparse.REMAINDER,
        action=_Rest,
        help="the arguments of pretrain_gpt.py, which end the line: they are checked, too",
    )
    parser.set_defaults(run=_preflight)


def _preflight(args: argparse.Namespace) -> None:
    _check(args)
    # megatron.core warns at import about every optional package that is not installed.
    warnings.filterwarnings("ignore", module="megatron.core")
    hosts = _take_place(args)
    try:
        outcome = _fly(args, hosts)
    except ValueError as error:
        code = exit_code_of(error)
        leave_exit_code(code)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a node know the same
            raise
        _wait_for_the_line()
        raise SystemExit(code) from None
    if os.environ["RANK"] == "0":
        from helixpipe.preflight.table import print_outcome

        print_outcome(outcome)
    if outcome.code:
        leave_exit_code(outcome.code)
        # At once: a thread that waits for a peer would hold the interpreter up.
        sys.stdout.flush()
        sys.stderr.flush()
        _wait_for_the_line()
        os._exit(outcome.code)


def _wait_for_the_line() -> None:
    """Let the rank that says what is wrong say it: torchrun ends all as soon as one has exited."""
    from megatron.pretrain.health.exit_barrier import ExitBarrier

    barrier = ExitBarrier()
    barrier.checked()
    barrier.wait()


def _check(args: argparse.Namespace) -> None:
    for flag, value, needed in (
        ("--costs", args.costs, args.plan),
        ("--tensor-model-parallel-size", args.tensor_model_parallel_size, args.plan),
    ):
        if value is not None and needed is None:
            raise ValueError(f"{flag} needs --plan FILE; arguments after --job say it themselves")
    if args.plan is not None and args.job is not None:
        raise ValueError("--plan FILE and --job ARGUMENTS both say what runs; give one of them")
    if args.hardware is not None and args.job is None:
        raise ValueError(
            "--hardware needs --job ARGUMENTS; with --plan FILE, --costs FILE says what it is for"
        )
    if (args.host is None) != (args.node_rank is None) or (args.host is None) != (args.port is None):
        raise ValueError("--host, --node-rank and --port belong together; give all of them or none")
    if args.host is not None and args.node_rank >= len(args.host):
        raise ValueError(f"--node-rank {args.node_rank} must be below the {len(args.host)} nodes of --host")


def _take_place(args: argparse.Namespace) -> list[str]:
    """Set this rank's place among all nodes' ranks; the hosts by rank, as far as they are known."""
    if args.host is None:
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        return []
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rank = args.node_rank * local_size + int(os.environ.get("LOCAL_RANK", "0"))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(args.host) * local_size)}
    return [host for host in args.host for _ in range(local_size)]


def _fly(args: argparse.Namespace, hosts: Sequence[str]) -> Outcome:
    # torch takes seconds to import: only this command pays for it.
    import torch

    from helixpipe.preflight.facts import gather_facts
    from helixpipe.preflight.flight import Demand, Flight
    from helixpipe.runtime.gpu import take_gpu

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend, device = "gloo", torch.device("cpu")
    if torch.cuda.is_available():
        take_gpu()
        backend, device = "nccl", torch.device("cuda", torch.cuda.current_device())
    store = _open_store(args, hosts, rank, world_size)
    demand, job_error, job_code = Demand(), "", 0
    try:
        demand = _demand(args, world_size)
    except (ValueError, OSError) as error:
        job_error, job_code = str(error), exit_code_of(error)
    facts = gather_facts(hosts[rank] if hosts else "", local_size, job_error, job_code)
    flight = Flight(
        store, rank, world_size, hosts=hosts, device=device, backend=backend, limit_s=args.timeout_s
    )  # fmt: skip
    return flight.run(facts, demand)


def _open_store(args: argparse.Namespace, hosts: Sequence[str], rank: int, world_size: int) -> Store:
    from helixpipe.runtime.job_store import Place, open_store
    from megatron.pretrain.health.rendezvous import fresh_store

    timeout = timedelta(seconds=args.timeout_s)
    if args.host is not None:
        return open_store(Place(args.host[0], args.port), rank, world_size, timeout, hosts)
    store = fresh_store(rank, world_size, timeout)
    return store or open_store(Place.from_environment(world_size), rank, world_size, timeout)


def _demand(args: argparse.Namespace, world_size: int) -> Demand:
    """What the job asks of its links."""
    if args.job is not None:
        return _demand_of_job(args.job, args.hardware)
    if args.plan is None:
        return _demand_of(None, world_size, {}, 1)
    plan = read_plan(args.plan)
    if world_size % plan.num_ranks:
        raise ValueError(f"{args.plan} is for {plan.num_ranks} ranks, of which {world_size} is no multiple")
    costs = parse_costs(read_text(args.costs), plan) if args.costs else None
    return _demand_of(
        plan, plan.num_ranks, link_needs(plan, costs) if costs else {}, args.tensor_model_parallel_size or 1
    )


def _demand_of_job(words: Sequence[str], hardware: str | None) -> Demand:
    from megatron.pretrain.settings.arguments import parse_arguments

    job = parse_arguments(words)
    plan: Plan | None = job.schedule.plan
    costs = _predicted_costs(job, plan, hardware) if plan is not None else None
    needs = link_needs(plan, costs) if plan is not None and costs is not None else {}
    stages, shared = job.parallel.pipeline_model_parallel_size, job.parallel.tensor_model_parallel_size
    return _demand_of(plan, stages, needs, shared)


def _predicted_costs(job: JobSettings, plan: Plan, hardware: str | None) -> Costs | None:
    """Of the shortest operations, which recompute nothing; None if the machine or their time is unknown."""
    from megatron.pretrain.settings.schedule_choice import is_predicted, known_machine, pieces_on

    if not is_predicted(job.workload):
        return None
    name = job.schedule.hardware if hardware is None else hardware
    machine = known_machine(name, job.model.attention_backend)
    if machine is None:
        return None
    return costs_of_plan(pieces_on(machine, name, job.workload), plan, Recompute.NONE)


def _demand_of(
    plan: Plan | None, num_stages: int, needs: dict[tuple[int, int], LinkNeed], tensor_parallel: int
) -> Demand:
    """Of a plan, or of neighbours that exchange messages where each batch has its own plan."""
    from helixpipe.preflight.flight import Demand
    from helixpipe.runtime.connections import pairs_of

    pairs = pairs_of(plan) if plan is not None else {(stage, stage + 1) for stage in range(num_stages - 1)}
    of_one_gpu = {
        pair: need._replace(num_bytes=need.num_bytes // tensor_parallel) for pair, need in needs.items()
    }
    return Demand(num_stages, frozenset(pairs), of_one_gpu)
