"""A module's class and parts are found in each of the forms that megatron-core has had for a spec."""

from functools import partial
from types import SimpleNamespace

import pytest
from megatron.core.transformer import ModuleSpec

from helixpipe.layers.module_specs import class_of, submodules_of


class Module:
    @classmethod
    def as_submodule(cls, **arguments):
        return cls()


PARTS = SimpleNamespace(linear="one")


@pytest.mark.parametrize(
    "spec",
    [
        ModuleSpec(module=Module, submodules=PARTS),
        partial(Module, submodules=PARTS),
        partial(Module.as_submodule, submodules=PARTS),
    ],
    ids=["spec", "class", "class method"],
)
def test_each_form_of_a_spec_says_the_same(spec):
    assert class_of(spec) is Module
    # To be changed in place.
    assert submodules_of(spec) is PARTS
