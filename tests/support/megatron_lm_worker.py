"""What each rank does in the tests of helix inside another program: that program's code, with and without."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from models import SEED, VOCABULARY, Case, batches, initialize, make_config

from helixpipe.layers.initialization import deferred_initialization, initialize_weights
from helixpipe.layers.spec import layer_spec
from helixpipe.megatron_lm import disable, enable
from helixpipe.megatron_lm.watch import StepWatch
from helixpipe.reliability.monitor import HubAddress

CASE = Case(pp=2, rounds=1)


class Losses(NamedTuple):
    """Of one rank: losses and tokens by micro batch, in an iteration and in an evaluation."""

    trained: list[list[float]]
    evaluated: list[list[float]]


def build_stage(case: Case, **values: Any) -> torch.nn.Module:
    """As a program builds it: with the constructor that it imported, whatever is enabled."""
    config = make_config(case)
    for name in [name for name in values if hasattr(config, name)]:
        setattr(config, name, values.pop(name))
    with deferred_initialization(config):
        model = GPTModel(
            config=config,
            transformer_layer_spec=values.pop("spec", None) or get_gpt_layer_local_spec(),
            vocab_size=VOCABULARY,
            max_sequence_length=case.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **values,
        )
    initialize_weights(model, config, SEED)
    # The model may have a copy.
    model.config.finalize_model_grads_func = None
    return model


def forward_step(data_iterator: Any, model: Any) -> Any:
    """Reads as Megatron-LM's does: tokens on the first stage, labels on the last, nothing between."""
    tokens = labels = mask = positions = None
    if parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage():
        tokens, labels, mask, positions = next(data_iterator)
    if not parallel_state.is_pipeline_last_stage():
        labels = mask = None
    if not parallel_state.is_pipeline_first_stage():
        tokens = positions = None
    return model(tokens, positions, None, labels=labels), partial(loss_func, mask)


def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, tokens = (losses * mask).sum(), mask.sum().int()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def run(
    case: Case,
    get: Any,
    *,
    num_chunks: int = 1,
    spec: Any = None,
    values: Mapping[str, Any] = MappingProxyType({}),
    **arguments: Any,
) -> Losses:
    """An iteration and an evaluation of the function that ``get`` gives, with values of the configuration."""
    stages = range(num_chunks) if num_chunks > 1 else [None]
    models = [build_stage(case, vp_stage=stage, spec=spec, **values) for stage in stages]
    reports = []
    for forward_only in (False, True):
        report = get()(
            forward_step_func=forward_step,
            data_iterator=batches(case),
            model=models,
            num_microbatches=case.num_microbatches,
            seq_length=case.seq_length,
            micro_batch_size=case.micro_batch_size,
            forward_only=forward_only,
            **arguments,
        )
        reports.append([entry["lm loss"].tolist() for entry in report])
    return Losses(*reports)


def compare(command_lines: list[str], case: Case = CASE, **values: Any) -> dict[str, Losses]:
    """Losses of stock 1F1B, under "", and of each command line, by this module's own imported names.

    ``values`` are of the configuration.
    """
    initialize(case)
    # Of Megatron's own modules none here attends over ranks that share a sequence.
    spec = None if case.cp == 1 else layer_spec(make_config(case), case.implementation)
    found = {"": run(case, _current, spec=spec, values=values)}
    for text in command_lines:
        words = ["--keep", "this", *text.split()]
        step = enable(words)
        assert words == ["--keep", "this"]
        assert step is not None
        found[text] = run(
            case,
            _current,
            num_chunks=step.forward_backward.chunks_per_rank,
            spec=None if step.is_another_model else spec,
            values=values,
        )
        assert step.count == 2
        disable()
    found["after"] = run(case, _current, spec=spec, values=values)
    return found


def refusal_of_shared_sequences(command_line: str, case: Case) -> str:
    """Why a schedule takes no sequences that ranks share, once it is asked for a step."""
    initialize(case)
    enable(command_line.split())
    found = _message(_current)
    disable()
    return found


def _current() -> Any:
    return get_forward_backward_func()


STOCK = get_forward_backward_func


def _message(function: Any) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def _angles(**values: Any) -> list[float]:
    """The frequencies of rotary positions, by which wavelengths beyond the trained context are longer."""
    found: list[float] = build_stage(CASE, rotary_base=100_000_000, **values).rotary_pos_emb.inv_freq.tolist()
    return found


def refusals() -> dict[str, Any]:
    """What is refused, by what is wrong; empty text where nothing was raised. Then what is watched."""
    initialize(CASE)
    # No module's attributes: nothing can be put in their place.
    angles = {"position_embedding_type": "rope", "rope_scaling": True, "rope_scaling_factor": 4.0}
    scaled, plain = (_angles(**angles | {"rope_scaling": is_scaled}) for is_scaled in (True, False))
    held = [STOCK, schedules.forward_backward_pipelining_without_interleaving]
    enable("--pipeline-schedule helix".split())
    world = torch.distributed.new_group([0, 1])
    other = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = make_config(CASE)
    spec = get_gpt_layer_local_spec()
    spec.submodules.mlp = spec.submodules.self_attention
    wrong = ProcessGroupCollection.use_mpu_process_groups()
    wrong.pp = other
    found = {
        "stock": _message(lambda: run(CASE, held[0])),
        "stock schedule": _message(lambda: run(CASE, lambda: held[1])),
        "config": _message(lambda: build_stage(CASE, qk_l2_norm=True)),
        "experts": _message(lambda: build_stage(CASE, num_moe_experts=2)),
        "argument": _message(lambda: build_stage(CASE, fp16_lm_cross_entropy=True)),
        "spec": _message(lambda: build_stage(CASE, spec=spec)),
        "groups": _message(lambda: run(CASE, _current, pg_collection=wrong)),
        "communicator": _message(
            lambda: run(CASE, _current, p2p_communicator=P2PCommunicator(other, config))
        ),
        "scaled angles": "other" if scaled != _angles(**angles) or scaled == plain else "",
        "sizes": _message(lambda: get_forward_backward_func(4, None)),
        "chunks": _message(lambda: get_forward_backward_func(2, 2)),
        # As Megatron-Bridge calls it.
        "equal groups": _message(
            lambda: run(
                CASE,
                lambda: get_forward_backward_func(pp_size=2, vp_size=None),
                pg_collection=groups,
                p2p_communicator=P2PCommunicator(world, config),
            )
        ),
    }
    disable()
    return found | _refusals_of_two_chunks() | watched_steps()


class RecordingMonitor:
    """Keeps what a rank's sentinel would be told, and is its progress, too."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.progress = self

    def address(self, hosts: list[str]) -> HubAddress:
        return HubAddress(["here"], 1, "token")

    def join(self, address: HubAddress) -> None:
        self.told.append(address)

    def place_in_pipeline(self, ranks: list[int]) -> None:
        self.told.append(ranks)

    def enter(self, phase: str, step: int | None = None) -> None:
        self.told.append((phase, step))

    def begin(self, operation: Any) -> None:
        self.told.append(str(operation))

    def wait(self, message: Any) -> None:
        pass

    def resume(self) -> None:
        pass

    def end(self) -> None:
        pass


def watched_steps() -> dict[str, list[Any]]:
    """What the monitor hears of a step and an evaluation, and the operations of the plan on this rank."""
    step = enable("--pipeline-schedule helix".split())
    assert step is not None
    monitor = RecordingMonitor()
    step.watch(StepWatch(monitor), monitor)  # type: ignore[arg-type]
    handler = signal.getsignal(signal.SIGTERM)
    run(CASE, _current)
    signal.signal(signal.SIGTERM, handler)
    plan = step.forward_backward.plan
    assert plan is not None
    disable()
    order = [str(op) for op in plan.orders[torch.distributed.get_rank()]]
    return {"told": monitor.told, "evaluation": order}


def _refusals_of_two_chunks() -> dict[str, str]:
    """The same under a schedule that has two stages on each rank."""
    enable("--pipeline-schedule zb-v".split())
    block = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec()])
    uneven = "num_layers_in_first_pipeline_stage"
    found = {
        "one chunk": _message(lambda: build_stage(CASE)),
        "third chunk": _message(lambda: build_stage(CASE, vp_stage=2)),
        "tied": _message(lambda: build_stage(CASE, vp_stage=0, share_embeddings_and_output_weights=True)),
        "layers that differ": _message(lambda: build_stage(CASE, vp_stage=0, spec=block)),
        "uneven stages": _message(lambda: build_stage(CASE, vp_stage=0, **{uneven: 1})),
        "experts in chunks": _message(lambda: build_stage(CASE, vp_stage=0, num_moe_experts=4)),
        "chunks of one": _message(lambda: get_forward_backward_func(2, 1)),
    }
    parallel_state.set_virtual_pipeline_model_parallel_world_size(2)
    found["virtual stages"] = _message(lambda: build_stage(CASE, vp_stage=0))
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    disable()
    return found
