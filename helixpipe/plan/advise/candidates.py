"""The search space: schedules with their options, recomputation and micro batch sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product

from helixpipe.plan.advise.job import Job
from helixpipe.plan.build import OPTION_FLAGS
from helixpipe.plan.cost_model import Recompute
from helixpipe.plan.cost_model.levels import LEVELS, spell_levels
from helixpipe.plan.execution import Execution
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest, planned_ahead
from helixpipe.plan.schedules.request import ATTENTION_RANGES, KnownCosts
from helixpipe.plan.windows import join_kinds

MICRO_BATCH_FACTORS = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """One way to run a job.

    Attributes:
        schedule: a key of ``SCHEDULES``, or a name of context parallelism.
        recompute: what backward passes compute again, in all layers but those that ``lighter`` says.
        micro_batch_size: sequences in a micro batch.
        num_microbatches: per replica and iteration.
        options: the schedule's own, by name of :class:`ScheduleRequest`.
        tied: the model's head shares the embedding's weights.
        chunked_loss: the loss is computed in chunks.
        only_planned: what the model has that training does not know.
        in_fp8: products are computed in fp8.
        exchanges_otherwise: see :class:`Job`.
        lighter: in how many layers, spread evenly, a lighter recomputation is used, and which; None for none.
    """

    schedule: str
    recompute: Recompute
    micro_batch_size: int
    num_microbatches: int
    options: Mapping[str, int | str] = field(default_factory=dict)
    tied: bool = False
    chunked_loss: bool = False
    only_planned: tuple[str, ...] = ()
    in_fp8: bool = False
    exchanges_otherwise: bool = False
    lighter: tuple[int, Recompute] | None = None

    def request(self, job: Job, costs: KnownCosts | None = None) -> ScheduleRequest:
        """What the schedule is asked for, with costs to fit its order to if they are to be used.

        Of sequences that follow one another, one.
        """
        model = job.workload.model
        levels = [level.value if self.lighter else "" for level in self.levels(model.num_layers)]
        kinds = join_kinds(model.layer_kinds, levels)
        takes_kinds = any(kinds) and "layer_kinds" in SCHEDULES[self.schedule].options
        return ScheduleRequest(
            num_layers=model.num_layers,
            num_ranks=job.num_ranks,
            num_microbatches=1 if SCHEDULES[self.schedule].repeats_sequences else self.num_microbatches,
            layer_kinds=kinds if takes_kinds else None,
            costs=costs,
            **self.options,  # type: ignore[arg-type]
        )

    def levels(self, num_layers: int) -> list[Recompute]:
        """The recomputation of every layer."""
        if self.lighter is None:
            return [self.recompute] * num_layers
        count, lighter = self.lighter
        cuts = [layer * count // num_layers for layer in range(num_layers + 1)]
        return [lighter if before < after else self.recompute for before, after in pairwise(cuts)]

    @property
    def has_our_levels(self) -> bool:
        """True if layers of ours recompute, where Megatron's arguments have no say."""
        levels = {self.recompute} if self.lighter is None else {self.recompute, self.lighter[1]}
        return levels <= set(LEVELS)

    @property
    def fits_order_to_costs(self) -> bool:
        """True if its order can be made better where costs are known."""
        return self.options.get("round_order") == "interlocked"

    @property
    def splits_backward(self) -> bool:
        """True if its plan has weight gradients apart."""
        return SCHEDULES[self.schedule].splits_backward or bool(self.options.get("split_weight_gradients"))

    @property
    def recompute_label(self) -> str:
        """What is computed again, for a table."""
        if self.lighter is None:
            return self.recompute.value
        count, lighter = self.lighter
        return f"{self.recompute.value}, in {count} {lighter.value}"

    @property
    def label(self) -> str:
        """Schedule and options, for a table."""
        return " ".join([self.schedule, *(_short(name, value) for name, value in self.options.items())])

    @property
    def why_not_runnable(self) -> str:
        """What pretrain_gpt.py cannot execute of it, in a word; empty if it can."""
        entry = SCHEDULES.get(self.schedule)
        if entry is None or entry.execution is None:
            return "schedule"
        is_plain = self.recompute is Recompute.NONE and self.lighter is None
        takes_ours = is_plain or entry.execution.recomputes_parts_of_layers
        takes_megatrons = entry.execution.recomputes_whole_layers and self.lighter is None
        if not (takes_ours if self.has_our_levels else takes_megatrons):
            return "recompute"
        if self.only_planned:
            return self.only_planned[0]
        if self.exchanges_otherwise:
            return "exchange"
        if self.in_fp8:
            return "fp8"
        if self.tied and entry.needs_untied_weights:
            return "tied weights"
        return ""

    def arguments(self, job: Job) -> list[str]:
        """The arguments of pretrain_gpt.py that select it."""
        workload = job.workload
        batch = self.micro_batch_size * self.num_microbatches * workload.data_parallel
        words = [
            f"--pipeline-schedule {self.schedule}",
            f"--pipeline-model-parallel-size {job.num_ranks}",
            f"--tensor-model-parallel-size {workload.tensor_parallel}",
        ]
        if workload.context_parallel > 1:
            words.append(f"--context-parallel-size {workload.context_parallel}")
        if workload.expert_parallel > 1:
            words.append(f"--expert-model-parallel-size {workload.expert_parallel}")
        if workload.sequence_parallel and workload.tensor_parallel > 1:
            words.append("--sequence-parallel")
        words += [f"--micro-batch-size {self.micro_batch_size}", f"--global-batch-size {batch}"]
        if workload.distributed_optimizer:
            words.append("--use-distributed-optimizer")
        for name, value in self.options.items():
            if name == "virtual_stages":
                layers = workload.model.num_layers // (job.num_ranks * int(value))
                words.append(f"--num-layers-per-virtual-pipeline-stage {layers}")
            elif value is True:
                words.append(OPTION_FLAGS[name])
            else:
                words.append(f"{OPTION_FLAGS[name]} {value}")
        words += self._recompute_arguments(workload.model.num_layers)
        if not workload.whole_logits:
            words.append("--loss-chunk-size auto")
        if workload.mlp_chunk_size is not None:
            words.append(f"--mlp-chunk-size {workload.mlp_chunk_size}")
        return words

    def _recompute_arguments(self, num_layers: int) -> list[str]:
        if self.lighter is not None:
            return [f"--recompute-levels {spell_levels(self.levels(num_layers))}"]
        if not self.has_our_levels:
            return _MEGATRONS_ARGUMENTS[self.recompute]
        if self.recompute is Recompute.NONE and not SCHEDULES[self.schedule].recomputes_by_default:
            return []
        return [f"--recompute-levels {self.recompute.value}"]


_MEGATRONS_ARGUMENTS: Mapping[Recompute, list[str]] = {
    Recompute.SELECTIVE: ["--recompute-granularity selective"],
    Recompute.FULL: [
        "--recompute-granularity full",
        "--recompute-method uniform",
        "--recompute-num-layers 1",
    ],
}


def _short(name: str, value: int | str) -> str:
    return {
        "num_fold": f"fold={value}",
        "virtual_stages": f"v={value}",
        "num_slices": f"K={value}",
        "head_placement": f"{value} head",
        "split_weight_gradients": "W",
        "resend_context": "resend",
    }.get(name, str(value))


def micro_batch_factors(job: Job) -> list[int]:
    """By which micro batches may be larger than the job's."""
    return [
        factor
        for factor in MICRO_BATCH_FACTORS
        if job.num_microbatches % factor == 0 and job.pieces_for(job.micro_batch_size * factor) is not None
    ]


def candidates(job: Job) -> Iterator[list[Candidate]]:
    """Every pipeline to be tried, in a fixed order.

    Those of one list differ in what they recompute, nothing first.
    """
    for factor in micro_batch_factors(job):
        for schedule in planned_ahead():
            entry = SCHEDULES[schedule]
            if factor > 1 and entry.repeats_sequences:
                continue  # Slices are as long as wanted already.
            if job.workload.context_parallel > 1 and entry.slices_sequences:
                continue  # Slices that are shared once more are not planned.
            if job.num_ranks == 1 and not is_for_one_rank(schedule):
                continue
            for options in _options(schedule, job):
                yield [
                    Candidate(
                        schedule,
                        recompute,
                        job.micro_batch_size * factor,
                        job.num_microbatches // factor,
                        options,
                        job.workload.model.tied,
                        not job.workload.whole_logits,
                        job.workload.model.only_planned,
                        job.workload.fp8_products,
                        job.exchanges_otherwise,
                    )
                    for recompute in Recompute
                ]


def is_for_one_rank(schedule: str) -> bool:
    """Whether a job without a pipeline runs under it: one rank has one order, and one stage."""
    entry = SCHEDULES[schedule]
    return entry.execution is Execution.MEGATRON and set(entry.options) <= {"stage_layers"}


def _options(schedule: str, job: Job) -> Iterator[Mapping[str, int | str]]:
    names = SCHEDULES[schedule].options
    if "virtual_stages" in names:
        per_rank = max(1, job.workload.model.num_layers // job.num_ranks)
        yield from ({"virtual_stages": v} for v in range(2, per_rank + 1) if per_rank % v == 0)
    elif "num_slices" in names:
        yield from ({"num_slices": count} for count in (2, 4, 8))
    elif "resend_context" in names:
        again: tuple[dict[str, int | str], ...] = ({}, {"resend_context": True})
        for cut, resent in product(ATTENTION_RANGES, again):
            yield {"num_fold": 2, "attention_range": cut, "head_placement": "spread", **resent}
    elif "num_fold" in names:
        heads: tuple[dict[str, int | str], ...] = ({}, {"head_placement": "spread"})
        for fold, cut, head in product((1, 2), ATTENTION_RANGES, heads):
            yield {"num_fold": fold, "attention_range": cut, **head}
        # A head on the first rank alone would leave gaps that interlocking is there to fill.
        interlocked: dict[str, int | str] = {"head_placement": "spread", "round_order": "interlocked"}
        for cut, splits in product(ATTENTION_RANGES, ({}, {"split_weight_gradients": True})):
            yield {"num_fold": 1, "attention_range": cut, **interlocked, **splits}
    else:
        yield {}
