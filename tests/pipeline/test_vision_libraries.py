"""timm and torchvision without torch's compiler: not loaded by them, and whole when it is used; in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["timm", "torchvision"])
def test_the_compiler_is_not_loaded(first: str) -> None:
    code = f"""
        import sys, torch
        from pipeline.vision_libraries import {first}, timm, torchvision
        net = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        torchvision.transforms.v2.functional.resize(torch.zeros(3, 9, 9, dtype=torch.uint8), [8, 8])
        net(torch.zeros(1, 3, 32, 32))
        print([name for name in sys.modules if name.startswith(("torch._dynamo", "wandb"))])
        import wandb
    """
    assert run(code) == "[]"


def test_the_compiler_is_whole_afterwards_and_leaves_out_what_is_marked() -> None:
    code = """
        import torch
        from pipeline.vision_libraries import timm, torchvision
        calls = []
        def inner(x):
            calls.append(torch.compiler.is_compiling())
            return x + 1
        from pipeline.vision_libraries import _disable
        inner = _disable(inner)
        assert torch.equal(inner(torch.ones(2)), torch.full((2,), 2.0))
        outer = torch.compile(lambda x: inner(x * 2) * 3, backend="eager")
        for _ in range(2):
            assert torch.equal(outer(torch.ones(2)), torch.full((2,), 9.0))
        assert calls == [False, False, False], calls
        boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
        print(tuple(torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape))
    """
    assert run(code) == "(1, 1, 2, 2)"


def test_whatever_else_is_asked_of_the_stand_in_loads_the_real_one() -> None:
    code = """
        import sys, torch
        from pipeline import vision_libraries
        with vision_libraries._without_compiler():
            from torch._dynamo import OptimizedModule
            from torch._dynamo.utils import is_compile_supported
            assert isinstance(OptimizedModule, type)
        print(type(sys.modules["torch._dynamo"]).__name__, hasattr(torch._dynamo, "reset"))
    """
    assert run(code) == "module True"


def test_a_loaded_compiler_stays() -> None:
    code = """
        import torch._dynamo, sys
        before = sys.modules["torch._dynamo"]
        from pipeline.vision_libraries import timm
        print(sys.modules["torch._dynamo"] is before is torch._dynamo)
    """
    assert run(code) == "True"
