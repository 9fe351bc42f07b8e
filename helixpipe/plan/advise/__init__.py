"""Which schedule to use: every candidate planned, simulated and held against memory."""

from helixpipe.plan.advise.advice import Advice, Option, Rejection, advise
from helixpipe.plan.advise.candidates import Candidate, is_for_one_rank
from helixpipe.plan.advise.job import Job, make_job, read_machine
from helixpipe.plan.advise.joint import JointAdvice, search
from helixpipe.plan.advise.slices import SliceVerdict, slice_verdict

__all__ = [
    "Advice",
    "Candidate",
    "Job",
    "JointAdvice",
    "Option",
    "Rejection",
    "SliceVerdict",
    "advise",
    "is_for_one_rank",
    "make_job",
    "read_machine",
    "search",
    "slice_verdict",
]
