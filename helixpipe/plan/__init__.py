"""Pipeline plans as data: operations, schedules, lowering, validation, simulation.

Nothing below this package imports torch or megatron: a plan can be made, checked, simulated and drawn
on any machine, and the very object that was checked is what the runtime executes.
"""

from helixpipe.plan.build import build_plan
from helixpipe.plan.context import Context
from helixpipe.plan.loan import Loan
from helixpipe.plan.operation import Kind, Operation
from helixpipe.plan.plan import Plan
from helixpipe.plan.plan_error import PlanError
from helixpipe.plan.schedules import SCHEDULES, ScheduleRequest
from helixpipe.plan.validate import validate

__all__ = [
    "SCHEDULES",
    "Context",
    "Kind",
    "Loan",
    "Operation",
    "Plan",
    "PlanError",
    "ScheduleRequest",
    "build_plan",
    "validate",
]
