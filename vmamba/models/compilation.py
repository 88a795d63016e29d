"""Ways to run a model faster than step by step, all of them torch.compile's."""

COMPILE_MODES: dict[str, dict[str, str]] = {  # name -> arguments of torch.compile
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "cudagraphs": {"backend": "cudagraphs"},  # the kernels as they are, launched as CUDA graphs: the same numbers
}
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune", "cudagraphs")
