"""From a model and a machine, or a measured profile, to the costs of any plan.

``model``, ``hardware`` and ``machines`` describe; ``work`` counts what one layer's pieces move and keep;
``analytic`` turns that into times, and a profile measures them instead; ``recomputation`` says what is kept;
``segments`` adds pieces up to a plan's segments.
"""

from helixpipe.plan.cost_model.analytic import predict_pieces
from helixpipe.plan.cost_model.hardware import Hardware
from helixpipe.plan.cost_model.machines import HARDWARE, read_hardware
from helixpipe.plan.cost_model.model import read_model
from helixpipe.plan.cost_model.pieces import PieceCost, Pieces
from helixpipe.plan.cost_model.recomputation import Recompute
from helixpipe.plan.cost_model.segments import costs_of_plan
from helixpipe.plan.cost_model.shape import MODELS, ModelShape
from helixpipe.plan.cost_model.slices import with_predicted_ends
from helixpipe.plan.cost_model.work import Workload

__all__ = [
    "HARDWARE",
    "MODELS",
    "Hardware",
    "ModelShape",
    "PieceCost",
    "Pieces",
    "Recompute",
    "Workload",
    "costs_of_plan",
    "predict_pieces",
    "read_hardware",
    "read_model",
    "with_predicted_ends",
]
