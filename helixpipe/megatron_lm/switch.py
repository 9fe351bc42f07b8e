"""Switch a schedule of ours on in a process that runs Megatron-LM, and off again.

What is put in the place of Megatron's functions is listed in :mod:`helixpipe.contact_points`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helixpipe.megatron_lm.options import Options, take_options
from helixpipe.plan.execution import Execution

if TYPE_CHECKING:
    from helixpipe.megatron_lm.step import Step

logger = logging.getLogger(__name__)

OLDEST, TOO_NEW = (0, 16, 1), (0, 20, 0)

_undo: list[Callable[[], None]] = []
_enabled: tuple[Options, Step] | None = None


def enable(command_line: list[str] | None = None) -> Step | None:
    """Make Megatron-LM train under the schedule that the command line asks for.

    To be called before the script reads its arguments, from which ours are taken away. It does not matter
    what the script has imported by then. Without ``--pipeline-schedule``, and for a schedule of Megatron's
    own, nothing is changed. A second call changes nothing.

    Args:
        command_line: arguments without the program's name; those of ``sys.argv`` if None.

    Returns:
        What makes the steps; None if nothing was changed.

    Raises:
        ValueError: one line that says what to change.
    """
    return switch_on(command_line, is_watched=False)


def switch_on(command_line: list[str] | None = None, *, is_watched: bool) -> Step | None:
    """:func:`enable`, in a program that watches its ranks or not."""
    global _enabled
    words = sys.argv[1:] if command_line is None else command_line
    options = take_options(words)
    if command_line is None:
        sys.argv[1:] = words
    if options is not None and options.of_watching and not is_watched:
        raise ValueError(
            f"{options.of_watching} needs somebody who watches the ranks; start the script with "
            "python -m helixpipe.megatron_lm, or remove it"
        )
    if options is None:
        return None if _enabled is None else _enabled[1]
    if options.entry.execution is Execution.MEGATRON:
        logger.info("%s is a schedule of Megatron's own: nothing is changed", options.schedule)
        return None
    if _enabled is not None:
        if options != _enabled[0]:
            raise ValueError(
                f"--pipeline-schedule {_enabled[0].schedule} is on already with its options; "
                "call disable() first"
            )
        return _enabled[1]
    # Not before a schedule is asked for: these import, and thereby prepare, megatron.core.
    from helixpipe.contact_points import has_module
    from helixpipe.megatron_lm.model import build_segments_for
    from helixpipe.megatron_lm.step import Step

    version = check_version()
    step = Step(options)
    _put_in_place(step)
    if step.is_another_model or step.is_in_chunks:
        _undo.append(build_segments_for(options))
    if has_module("megatron.training"):
        _put_into_program(step)
    _enabled = options, step
    logger.info("schedule enabled in megatron-core %s: %s", version, step)
    return step


def disable() -> None:
    """Give Megatron its own functions back; harmless if nothing was changed."""
    global _enabled
    while _undo:
        _undo.pop()()
    _enabled = None


def check_version() -> str:
    """The version of megatron-core; ``ValueError`` if it is not one that is known here."""
    import megatron.core

    version = str(megatron.core.__version__)
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(map(int, found.groups())) if found else ()
    if not OLDEST <= numbers < TOO_NEW:
        raise ValueError(
            f"megatron-core {version} is not known to --pipeline-schedule; use 0.16.1 or later, below 0.20"
        )
    return version


def _put_in_place(step: Step) -> None:
    from helixpipe.contact_points import replace

    module = "megatron.core.pipeline_parallel.schedules"
    _replace(module, "get_forward_backward_func", lambda original: step.get)
    # What all schedules of Megatron's call before their first message; in that module only.
    _undo.append(replace(module, "get_model_config", _refuse_stock))


def _put_into_program(step: Step) -> None:
    from helixpipe.contact_points import has_module
    from helixpipe.megatron_lm.chunks import with_two_chunks, with_two_stages
    from helixpipe.megatron_lm.view import as_one_stage

    program = "megatron.training.training"
    if step.reads_on_all_ranks:
        _replace(program, "build_train_valid_test_data_iterators", as_one_stage)
    if step.is_in_chunks:
        _replace(program, "get_model", with_two_chunks)
        builders = "megatron.training.models.dist_utils"
        if has_module(builders):
            _replace(builders, "build_virtual_pipeline_stages", with_two_stages)


def _refuse_stock(*args: object, **options: object) -> None:
    assert _enabled is not None
    raise ValueError(
        f"--pipeline-schedule {_enabled[0].schedule} is on, but this step asked for one of Megatron's: "
        "the program got hold of it before; call helixpipe.megatron_lm.enable() in the script's first line"
    )


def _replace(module: str, name: str, wrapped: Callable[[Any], Any]) -> None:
    from helixpipe.contact_points import find, replace_everywhere

    _undo.append(replace_everywhere(module, name, wrapped(getattr(find(module), name))))
