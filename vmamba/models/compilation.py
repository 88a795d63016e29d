"""Ways to run a model faster than step by step, all of them torch.compile's."""

COMPILE_MODES: dict[str, dict[str, str | bool]] = {  # name -> arguments of torch.compile
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    # The kernels as they are, launched as CUDA graphs: the same numbers.  A graph has one size of batch.
    "cudagraphs": {"backend": "cudagraphs", "dynamic": False},
}
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")
