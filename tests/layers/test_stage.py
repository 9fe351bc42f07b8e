"""Stages that stand anywhere: together they are Megatron's whole model, under its names."""

import pytest
import torch
from models import VOCABULARY, Case, _model_arguments
from pretend import pretend_rank
from stages import configured, gpt_stage

from helixpipe.layers.initialization import canonical_parameters
from helixpipe.layers.spec import LOCAL
from helixpipe.layers.stage import build_stage

CASE = Case(pp=1, tied=False)


def stages(num_stages):
    config = configured(CASE)
    return [
        build_stage(config, LOCAL, stage, num_stages, **_model_arguments(CASE)) for stage in range(num_stages)
    ]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_stages_together_are_the_whole_model(num_stages):
    with pretend_rank(CASE):
        whole, parts = gpt_stage(CASE), stages(num_stages)
        for parameter in whole.parameters():
            parameter.data.normal_(0.0, 0.2)
        weights = dict(canonical_parameters(whole))
        names = []
        for part in parts:
            for name, parameter in canonical_parameters(part):
                names.append(name)
                parameter.data.copy_(weights[name])
        assert sorted(names) == sorted(weights)
        text = torch.randint(VOCABULARY, (2, CASE.seq_length + 1))
        arguments = (text[:, :-1], torch.arange(CASE.seq_length).expand(2, -1), None)
        hidden = None
        for part in parts:
            part.set_input_tensor(hidden)
            hidden = part(*arguments, labels=text[:, 1:])
        torch.testing.assert_close(hidden, whole(*arguments, labels=text[:, 1:]), rtol=0, atol=0)


def test_checkpoints_have_the_whole_models_keys_and_layers():
    with pretend_rank(CASE):

        def described(model):
            return [
                (entry.key, entry.global_shape, entry.global_offset)
                for entry in model.sharded_state_dict().values()
                if hasattr(entry, "global_offset")
            ]

        found = [entry for part in stages(4) for entry in described(part)]
        assert sorted(found) == sorted(described(gpt_stage(CASE)))


def test_the_models_own_configuration_is_left_alone():
    with pretend_rank(CASE):
        config = configured(CASE)
        part = build_stage(config, LOCAL, 1, 2, **_model_arguments(CASE))
        assert config.pipeline_model_parallel_size == 1
        assert (part.pre_process, part.post_process) == (False, True)


def test_a_tied_head_is_refused():
    with pretend_rank(CASE), pytest.raises(ValueError, match="add --untie-embeddings-and-output-weights"):
        build_stage(configured(CASE), LOCAL, 0, 2, **(_model_arguments(Case(pp=1))))
