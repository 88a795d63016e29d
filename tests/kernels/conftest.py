"""What a test for one architecture of GPUs needs: a compiler that knows it."""

import pytest


@pytest.fixture(autouse=True)
def known_to_nvrtc(request):
    """Skips tests with an `arch` that is younger than this machine's NVRTC: PyTorch 2.6 brings 12.4."""
    arch = request.node.callspec.params.get("arch") if hasattr(request.node, "callspec") else None
    if arch is None:
        return
    from vmamba_kernels.cuda import compiler

    if arch not in [f"sm_{number}" for number in compiler._architectures()]:
        pytest.skip(f"NVRTC {compiler.nvrtc_version()} does not know {arch}")
