"""Elastic pipelines: batches of sequences of very different lengths at full speed.

A sequence processor cuts long sequences and packs short ones into chunks that take equally long, a scheduler
runs them as 1F1B pipelines, and an integer program decides which layers of which chunk on which stage are
computed twice so that everything fits. The result is a common plan and a recipe. After InfiniPipe
(arXiv 2509.21275).
"""

from helixpipe.elastic.baselines import Baseline, predict_baselines
from helixpipe.elastic.chunk_schedule import costs_of_recipe
from helixpipe.elastic.chunks import Chunk, ChunkKind, Piece
from helixpipe.elastic.costs.chunk_costs import ChunkCosts, PassTime, ideal_costs
from helixpipe.elastic.costs.costs_file import costs_from_json, costs_to_json
from helixpipe.elastic.costs.fit import Fit, Measurement, fit_costs, measurements_from_json
from helixpipe.elastic.costs.preset import predict_chunk_costs
from helixpipe.elastic.elastic_plan import ElasticPlan, Prediction
from helixpipe.elastic.evaluation import plan_evaluation
from helixpipe.elastic.job import ElasticJob
from helixpipe.elastic.recipe import Recipe
from helixpipe.elastic.replicas import share_out
from helixpipe.elastic.search.planner import plan_batch

__all__ = [
    "Baseline",
    "Chunk",
    "ChunkCosts",
    "ChunkKind",
    "ElasticJob",
    "ElasticPlan",
    "Fit",
    "Measurement",
    "PassTime",
    "Piece",
    "Prediction",
    "Recipe",
    "costs_from_json",
    "costs_of_recipe",
    "costs_to_json",
    "fit_costs",
    "ideal_costs",
    "measurements_from_json",
    "plan_batch",
    "plan_evaluation",
    "predict_baselines",
    "predict_chunk_costs",
    "share_out",
]
