"""``python -m megatron_rema.kernels``: which libraries there are and what they were built for, or why there are none."""

from __future__ import annotations

import platform

import torch

from megatron_rema.kernels import build
from megatron_rema.kernels.library import availability


def main() -> None:
    for kind, text in availability().items():
        print(f"{kind:12}{text}")
    print(f"{'GPU':12}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can see'}")
    print(f"{'compilers':12}C++ {build.find_cxx() or 'none'}; nvcc {build.find_nvcc() or 'none'}")
    print(f"{'machine':12}{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'sources':12}{build.sources_hash()}; libraries in {build.LIBRARIES}")


if __name__ == "__main__":
    main()
