"""Private and patched names of other packages: all are listed, and all are where the list says."""

import ast
import inspect
import json
import os
import subprocess
import sys

import pytest
from jobs import search_path
from sources import PACKAGES, ROOT, parsed, relative, sources

from helixpipe.contact_points import (
    CALLED,
    MISSING,
    OPTIONAL,
    OVERRIDDEN,
    PATCHED,
    PATCHED_IN_BUILDERS,
    PATCHED_IN_PROGRAM,
    find,
    has_module,
    replace,
)

LISTED = {point.name for point in (*CALLED, *OPTIONAL, *OVERRIDDEN, *PATCHED)}
FOREIGN = ("torch", "megatron.core", "numpy")
# Private names of Python's own library.
PYTHONS = {"_Hash", "_exit", "_actions", "_SubParsersAction", "_asdict", "_fields", "_replace"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(trees):
    """Every private name that our code defines: functions, classes, variables and attributes of self."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if root_of(node) in ("self", "cls") else set()
    return names


def foreign_private_names(tree, own):
    """Private attributes and imports that are none of our own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FOREIGN):
            yield from (alias.name for alias in node.names if is_private(alias.name))


def foreign_modules(tree):
    """Names under which a file knows modules and classes of other packages."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (a.asname or a.name).partition(".")[0] for a in node.names if a.name.startswith(FOREIGN)
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(FOREIGN):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root_of(node):
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(tree):
    """Lines that put something in the place of a name of another package."""
    foreign = foreign_modules(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "")]
        if any(isinstance(t, (ast.Attribute, ast.Subscript)) and root_of(t) in foreign for t in targets):
            yield node.lineno


@pytest.fixture(scope="module")
def trees():
    return {relative(path): parsed(path) for path in sources(*PACKAGES)}


def test_every_private_name_is_listed(trees):
    own = own_names(trees.values()) | PYTHONS
    used = {name for tree in trees.values() for name in foreign_private_names(tree, own)}
    assert used - LISTED == set()
    called = {point.name for point in (*CALLED, *OPTIONAL) if point.name not in own}
    assert called - used == set(), "listed, but used by nobody"


def test_names_are_replaced_in_one_place_only(trees):
    found = {where: lines for where, tree in trees.items() if (lines := list(patches(tree)))}
    assert found == {}


def test_every_overridden_name_is_listed():
    """A private method of a base class that is not ours may go, and nobody would call its override."""
    import megatron.pretrain.loop  # noqa: F401

    listed = {(point.owner.partition(":")[2], point.name) for point in OVERRIDDEN}
    found = set()
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith(("helixpipe.", "megatron.pretrain."))
    ]
    for module in modules:
        for kind in vars(module).values():
            if not isinstance(kind, type) or not kind.__module__.startswith(
                ("helixpipe", "megatron.pretrain")
            ):
                continue
            for base in kind.__mro__[1:]:
                if base.__module__.startswith(FOREIGN):
                    names = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
                    found |= {(base.__name__, name) for name in names & set(vars(base)) if is_private(name)}
    assert found == listed


def test_every_contact_point_is_where_it_was():
    """In a process of its own: here the names may have been replaced already."""
    # Stand-ins have the signatures of packages that are not installed.
    paths = (ROOT, ROOT / "tests/support", ROOT / "tests/support/stand_ins/flash")
    environment = os.environ | {"PYTHONPATH": search_path(*paths)}
    worker = ROOT / "tests/support/contact_points_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    # Of the release that all other tests have.
    assert json.loads(done.stdout) == {"release": find("megatron.core").__version__, "problems": {}}


def test_each_says_why_and_since_when():
    patched = (*PATCHED, *PATCHED_IN_PROGRAM, *PATCHED_IN_BUILDERS, *MISSING)
    for point in (*CALLED, *OPTIONAL, *OVERRIDDEN, *patched):
        assert point.why
        assert point.since.split()[0] in ("torch", "megatron-core", "flash-attn")


def test_a_name_that_may_be_missing_is_read():
    for point in MISSING:
        methods = [value for value in vars(find(point.owner)).values() if isinstance(value, staticmethod)]
        assert any(point.name in method.__func__.__code__.co_names for method in methods)


def test_a_moved_name_is_noticed():
    with pytest.raises(AttributeError):
        find("torch:Tensors")
    with pytest.raises(AssertionError, match="no contact point"):
        replace("torch", "add", None)
    tree = ast.parse(
        "import torch\ntorch.cuda.synchronize = None\nsetattr(torch, 'load', 1)\nx._forward(1)\n"
    )
    assert list(patches(tree)) == [2, 3]
    assert list(foreign_private_names(tree, set())) == ["_forward"]


def test_a_module_may_lie_in_a_package_that_is_not_there():
    assert has_module("torch.nn.functional")
    assert not has_module("torch.nowhere")
    assert not has_module("torch.nowhere.within")


def test_the_original_comes_back():
    import torch

    original = torch.cuda.synchronize
    undo = replace("torch.cuda", "synchronize", print)
    assert torch.cuda.synchronize is print
    undo()
    assert torch.cuda.synchronize is original
    undo = replace("torch:Tensor", "type", len)
    undo()
    assert torch.Tensor.type is not len
