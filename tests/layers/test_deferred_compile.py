from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helixpipe.layers.deferred_compile import _compile_when_called

ROOT = Path(__file__).resolve().parents[2]


def test_a_function_is_compiled_once_and_when_it_is_called():
    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda number: 10 * function(number)

    def double(number):
        """Twice as much."""
        return 2 * number

    later = _compile_when_called(compile_now, double, dynamic=True)
    assert compiled == []
    assert [later(1), later(2)] == [20, 40]
    assert compiled == [{"dynamic": True}]
    assert later.__doc__ == "Twice as much."


def test_the_program_starts_without_the_compiler_and_without_scipy():
    """Each of them adds to every rank's start."""
    code = (
        "import pretrain_gpt, sys, torch, megatron.core.jit as jit; print("
        "'torch._inductor' in sys.modules, 'scipy' in sys.modules, jit.jit_fuser is torch.compile)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False False False\n"
