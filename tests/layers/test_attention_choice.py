"""Which attention backend is chosen: the first that imports and runs, and what is said of the others."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from models import Case, make_config
from stand_ins import installed
from stand_ins.aten_kernels import aten_on_cpu

from helixpipe.layers.attention import choice
from helixpipe.layers.attention.choice import AUTO, BACKENDS, choose, markdown_table, order_of, problem_of
from helixpipe.layers.attention.core import FlashCoreAttention
from helixpipe.layers.attention.interface import AttentionProblem
from helixpipe.layers.attention.trial import run_trial
from helixpipe.layers.elastic.core_attention import SliceCoreAttention
from helixpipe.plan.cost_model.hardware import ATTENTION_BACKENDS
from megatron.pretrain.health.attention import summary

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# On a CPU, where stand-ins run, but chosen as on an H100.
HOPPER = AttentionProblem(CPU, (9, 0), torch.bfloat16, 128, heads=8, groups=2)
ORDER = ["flash-attn-3", "cudnn", "te-cudnn", "flash-attn-2", "aten-flash", "aten-efficient"]


def test_the_planner_knows_every_backend_with_published_rates():
    """Its names are those of training; the CPU's, aten's other kernel and our own have none."""
    assert set(ATTENTION_BACKENDS) == set(BACKENDS) - {"aten-cpu", "aten-efficient", "blocks"}


@pytest.fixture(autouse=True)
def fresh():
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def libraries():
    with installed("flash", "engine"), aten_on_cpu():
        yield


def names_of(problem):
    return [backend.name for backend in order_of(problem)]


def test_the_order_follows_the_hardware():
    assert names_of(HOPPER) == ORDER
    assert names_of(replace(HOPPER, capability=(10, 0))) == ORDER[1:]
    assert names_of(replace(HOPPER, capability=(8, 0)))[:3] == ["flash-attn-2", "aten-flash", "cudnn"]
    assert names_of(replace(HOPPER, capability=None)) == ["aten-cpu"]


def test_lengths_that_differ_prefer_what_packs():
    assert names_of(replace(HOPPER, varies=True)) == [
        "flash-attn-3", "flash-attn-2", "aten-flash", "cudnn", "te-cudnn", "aten-efficient",
    ]  # fmt: skip


def test_the_first_that_works_is_chosen_and_tried_once(libraries, monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "run_trial", lambda made, p: tried.append(made.name) or run_trial(made, p))
    assert choose(AUTO, HOPPER) is choose(AUTO, HOPPER)
    found = choose(AUTO, HOPPER)
    assert (found.backend.name, found.passed_over, str(found)) == ("flash-attn-3", {}, "flash-attn-3")
    assert tried == ["flash-attn-3"]


@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 8, 64), (8, 1, 256)])
def test_every_backend_passes_its_trial(libraries, name, heads, groups, size, varies):
    problem = replace(HOPPER, heads=heads, groups=groups, head_size=size, varies=varies)
    assert choose(name, problem).backend.name == name


def library(**functions):
    """A module in the place of FlashAttention-3."""
    module = types.ModuleType("flash_attn_interface")
    vars(module).update(functions)
    return module


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


def spoiled(name, change):
    """FlashAttention-3's stand-in, of which one function's results are wrong."""
    import flash_attn_interface

    original = getattr(flash_attn_interface, name)
    functions = {**vars(flash_attn_interface), name: lambda *a, **o: change(original(*a, **o), a)}
    return library(**functions)


def double_gradient_of_keys(result, arguments):
    arguments[13].mul_(2)
    return result


BROKEN = {
    "driver": (
        lambda: library(_flash_attn_forward=failing(RuntimeError("CUDA error: no kernel image\nmore"))),
        r"fails in a trial run \(RuntimeError: CUDA error: no kernel image\)",
    ),
    "older release": (lambda: library(), "fails in a trial run .AttributeError: .*_flash_attn_forward.*"),
    "outputs": (
        lambda: spoiled("_flash_attn_forward", lambda result, _: (result[0] * 1.1, *result[1:])),
        "computes wrong outputs in a trial run",
    ),
    "log-sum-exps": (
        lambda: spoiled("_flash_attn_forward", lambda result, _: (result[0], result[1] / 0.693, *result[2:])),
        "computes wrong log-sum-exps in a trial run",
    ),
    "not a number": (
        lambda: spoiled("_flash_attn_forward", lambda result, _: (result[0] * float("nan"), *result[1:])),
        "computes wrong outputs in a trial run",
    ),
    "gradients": (
        lambda: spoiled("_flash_attn_backward", double_gradient_of_keys),
        "computes wrong gradients of keys in a trial run",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_passed_over_with_the_reason(libraries, monkeypatch, case):
    make, reason = BROKEN[case]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", make())
    found = choose(AUTO, HOPPER)
    assert found.backend.name == "cudnn"
    assert list(found.passed_over) == ["flash-attn-3"]
    with pytest.raises(
        ValueError, match=f"--attention-backend flash-attn-3 cannot be used: {reason}; choose"
    ):
        choose("flash-attn-3", HOPPER)


@pytest.mark.parametrize("error", [OSError("libcudart.so.12: cannot open"), ImportError("undefined symbol")])
def test_a_package_that_raises_at_import_is_passed_over(libraries, monkeypatch, tmp_path, error):
    text = f"raise {type(error).__name__}({str(error)!r})"
    (tmp_path / "flash_attn_interface.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("flash_attn_interface", None)
    found = choose(AUTO, HOPPER)
    assert found.backend.name == "cudnn"
    assert found.passed_over == {"flash-attn-3": f"cannot be imported ({type(error).__name__}: {error})"}


def test_what_is_missing_is_said():
    """Nothing is installed and no kernel runs: every candidate has its reason."""
    with pytest.raises(ValueError, match=r"works \(flash-attn-3: is not installed") as seen:
        choose(AUTO, HOPPER)
    assert all(f"{name}: " in str(seen.value) for name in ORDER)
    with pytest.raises(ValueError, match="flash-attn-2 cannot be used: is not installed"):
        choose("flash-attn-2", HOPPER)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("flash-attn-3", {"dtype": torch.float32}, "takes float16, bfloat16, not float32"),
        ("flash-attn-2", {"head_size": 36}, "takes head sizes that are multiples of 8, not 36"),
        ("cudnn", {"head_size": 512}, "takes head sizes up to 256, not 512"),
        ("cudnn", {"deterministic": True}, "is not deterministic"),
        ("aten-flash", {"capability": None}, "runs on GPUs only"),
        ("aten-cpu", {}, "runs on CPUs only"),
    ],
)
def test_a_named_backend_that_does_not_fit_is_refused(libraries, name, change, reason):
    with pytest.raises(ValueError, match=f"--attention-backend {name} cannot be used: {reason}"):
        choose(name, replace(HOPPER, **change))


def test_float32_and_odd_head_sizes_have_a_backend(libraries):
    assert choose(AUTO, replace(HOPPER, dtype=torch.float32)).backend.name == "aten-efficient"
    assert choose(AUTO, replace(HOPPER, head_size=36)).backend.name == "aten-efficient"


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match="'flush' is not known; choose one of auto, flash, fused, flash-attn-3, cudnn,"
    ):
        choose("flush", HOPPER)


def test_layers_are_built_with_the_backend_that_was_named():
    config = make_config(Case(pp=1))
    make = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    assert FlashCoreAttention(config, **make).backend.name == "aten-cpu"
    for core, extra in ((FlashCoreAttention, {}), (SliceCoreAttention, {"contexts": None})):
        with pytest.raises(ValueError, match="--attention-backend cudnn cannot be used: runs on GPUs only"):
            core(config, **make, backend="cudnn", **extra)


def test_the_problem_is_one_ranks():
    config = make_config(Case(pp=1, tp=2, style="llama"))
    assert problem_of(config) == AttentionProblem(CPU, None, torch.float32, 8, heads=2, groups=1)
    config.num_query_groups = 1
    assert problem_of(config, varies=True).groups == 1
    assert problem_of(config, varies=True).varies


def test_ranks_that_differ_are_named():
    assert summary(["cudnn"] * 3) == "attention: cudnn"
    assert summary(["cudnn", "aten-flash (cudnn: fails)", "cudnn", "cudnn"]) == (
        "attention differs between ranks, the slowest holds up all: cudnn on rank 0 and 2 more; "
        "aten-flash (cudnn: fails) on rank 1"
    )


def test_the_page_shows_the_registry():
    """If this fails, put the table of ``python tools/attention.py`` into docs/attention.md."""
    assert markdown_table() in (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert len(markdown_table().splitlines()) == len(BACKENDS) + 2


@pytest.mark.parametrize(("name", "reason"), [("fused", "cudnn: runs on GPUs only")])
def test_a_family_without_a_member_says_why(name, reason):
    with pytest.raises(ValueError, match=f"--attention-backend {name} cannot be used: .*{reason}"):
        choose(name, replace(HOPPER, capability=None))
