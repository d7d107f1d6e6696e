"""Compiles what Triton's autotuner is about to measure on all cores at once. It would compile a peer's hundred kernels
one by one, for minutes, for every number of heads."""
import os
from concurrent.futures import ThreadPoolExecutor


def compile_ahead():
    """From here on in this process; nothing changes with a Triton that cannot compile beside other work."""
    try:
        from triton import AsyncCompileMode
    except ImportError:
        return
    from triton.runtime import Autotuner
    prune = Autotuner.prune_configs  # called when a kernel meets a new key

    def prune_and_compile(self, kwargs):
        configs = prune(self, kwargs)
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.run(*self.nargs.values(), **{**kwargs, 'warmup': True}, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_and_compile
