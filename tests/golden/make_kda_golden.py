#!/usr/bin/env python3
"""Makes kda.safetensors: Kimi Delta Attention as flash-linear-attention's plain recurrence computes it.

    $(tests/interop/venv.sh | tail -n 1) tests/golden/make_kda_golden.py

Every case N has these float32 tensors (H heads, K = V channels, T tokens):
  caseN.q, .k, .v        [T, H, K]   after convolution and SiLU, before the L2 norm of q and k
  caseN.f                [T, H*K]    raw gate;  caseN.a_log [H];  caseN.dt_bias [H*K]
  caseN.b                [T, H]      logits of beta
  caseN.state_in         [H, K, V]   zeros where metadata says initial_state = "none"
  caseN.o                [T, H, V];  caseN.state_out [H, K, V]
and this metadata (strings): cases; caseN.lower_bound ("none": standard gate), caseN.scale, caseN.initial_state;
l2norm_eps; seed and the versions of what made the file.

The inputs are float32 numbers; gate, norms and recurrence run in float64 and only the results are rounded to float32.
"""
import ast
import importlib.metadata
import importlib.util
import platform
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SEED = 20250
EPS = 1e-6
# T, H, K, lower bound of the gate, with an initial state. No T is a multiple of 64, so every last chunk is a part of one.
CASES = [
    (70, 3, 16, None, False),
    (130, 2, 8, None, True),
    (70, 2, 16, -5.0, False),
    (37, 3, 8, -2.5, True),
    (41, 1, 64, None, True),
]


class Float64Torch(types.SimpleNamespace):
    """Stands in for the module torch inside the recurrence, so that its casts to float32 go to float64."""

    float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def fla_folder() -> Path:
    """flash-linear-attention's folder, found without importing it: its package needs Triton, the references do not."""
    return Path(importlib.util.find_spec("fla").submodule_search_locations[0])


def load_recurrence():
    spec = importlib.util.spec_from_file_location("kda_naive", fla_folder() / "ops" / "kda" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = Float64Torch()
    return module.naive_recurrent_kda


def load_gates():
    """The two reference gates (float32) out of a module whose other functions are Triton kernels."""
    tree = ast.parse((fla_folder() / "ops" / "kda" / "gate.py").read_text())
    wanted = ("naive_kda_gate", "naive_kda_lowerbound_gate")
    tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in wanted]
    space = {"torch": torch, "F": F}
    exec(compile(tree, "gate.py", "exec"), space)
    return tuple(space[name] for name in wanted)


def main():
    recurrence = load_recurrence()
    standard_gate, bounded_gate = load_gates()
    rng = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    tensors = {}
    metadata = {"cases": str(len(CASES)), "l2norm_eps": str(EPS), "seed": str(SEED), "python": platform.python_version()}
    for package in ("torch", "fla-core", "safetensors"):
        metadata[package] = importlib.metadata.version(package)
    for n, (T, H, K, bound, with_state) in enumerate(CASES):
        q, k, v = (F.silu(normal(T, H, K)) for _ in range(3))
        f, b = 2 * normal(T, H * K), normal(T, H)
        a_log = torch.log(1 + 15 * torch.rand(H, generator=rng))
        dt = torch.exp(torch.rand(H * K, generator=rng) * 4.6 - 6.9)
        dt_bias = dt + torch.log(-torch.expm1(-dt))
        state_in = normal(H, K, K) if with_state else torch.zeros(H, K, K)
        case = dict(q=q, k=k, v=v, f=f, b=b, a_log=a_log, dt_bias=dt_bias, state_in=state_in)

        q, k, v, f, b, a_log, dt_bias, state_in = (x.double() for x in case.values())
        q, k = (x / (x.square().sum(-1, keepdim=True) + EPS).sqrt() for x in (q, k))
        x = (f + dt_bias).view(T, H, K)
        rate = a_log.exp()[:, None]
        g = -rate * F.softplus(x, threshold=1e9) if bound is None else bound * torch.sigmoid(rate * x)
        raw = case["f"].view(1, T, H, K)
        theirs = (standard_gate(raw, case["a_log"], case["dt_bias"]) if bound is None
                  else bounded_gate(raw, case["a_log"], case["dt_bias"], bound))
        torch.testing.assert_close(theirs[0].double(), g, rtol=1e-5, atol=1e-6)  # theirs is float32 throughout
        o, state_out = recurrence(*(x[None] for x in (q, k, v, g, torch.sigmoid(b))), scale=K**-0.5,
                                  initial_state=state_in[None] if with_state else None, output_final_state=True)
        assert o.dtype == state_out.dtype == torch.float64
        case.update(o=o[0].float(), state_out=state_out[0].float())
        tensors.update({f"case{n}.{name}": x.contiguous() for name, x in case.items()})
        metadata[f"case{n}.lower_bound"] = "none" if bound is None else str(bound)
        metadata[f"case{n}.scale"] = repr(K**-0.5)
        metadata[f"case{n}.initial_state"] = "random" if with_state else "none"

    path = Path(__file__).with_name("kda.safetensors")
    save_file(tensors, path, metadata)
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
