"""Looks contact points up in the installed packages, in a process where nothing has been replaced yet."""

from __future__ import annotations

import inspect
import json
import warnings

warnings.filterwarnings("ignore")

from helixpipe.contact_points import (  # noqa: E402
    CALLED,
    OPTIONAL,
    OVERRIDDEN,
    PATCHED,
    PATCHED_IN_BUILDERS,
    PATCHED_IN_PROGRAM,
    ContactPoint,
    find,
    has_module,
)


def problem(point: ContactPoint) -> str:
    """What is wrong with a contact point, in a few words; empty if it is as its entry says."""
    try:
        owner = find(point.owner)
        if point.name in getattr(owner, "__annotations__", {}):
            return ""  # an attribute of its objects
        found = getattr(owner, point.name)
    except (ImportError, AttributeError) as error:
        return f"is not there: {error}"
    if point.arguments is None:
        return ""
    if point.owner == "torch.ops.aten":
        names = tuple(argument.name for argument in found.default._schema.arguments)
    else:
        names = tuple(inspect.signature(found).parameters)
    if names[: len(point.arguments)] != point.arguments:
        return f"takes {names}, not {point.arguments}"
    return ""


if __name__ == "__main__":
    points = (*CALLED, *OPTIONAL, *OVERRIDDEN, *PATCHED)
    if has_module("megatron.training"):
        points += PATCHED_IN_PROGRAM
    if has_module("megatron.training.models.dist_utils"):
        points += PATCHED_IN_BUILDERS
    found = {f"{point.owner} {point.name}": problem(point) for point in points}
    problems = {name: text for name, text in found.items() if text}
    print(json.dumps({"release": find("megatron.core").__version__, "problems": problems}))
