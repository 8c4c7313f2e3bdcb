"""Packages ``conf/`` as ``megatron_rema.conf``, so that an installed package finds its configuration groups, and builds the kernel
libraries with the compilers that are there (``megatron_rema/kernels/build.py``; torch is not needed).

An editable install has its libraries in the source tree, beside the Python files that load them; a wheel carries them.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CONF = "megatron_rema.conf"
KERNELS = Path("megatron_rema", "kernels")
PURE = os.environ.get("MEGATRON_REMA_KERNELS") == "none"


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        spec = importlib.util.spec_from_file_location(
            "kernels_build", KERNELS / "build.py"
        )  # not as a package: that would need its imports
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        folder = (Path() if self.editable_mode else Path(self.build_lib)) / KERNELS / "lib"
        for kind, result in kernels.build(folder.resolve()).items():
            print(f"kernels: {kind}: {result}", flush=True)


class WheelOfOnePlatform(bdist_wheel):
    """The libraries have a plain C interface: any Python 3, one platform."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = PURE

    def get_tag(self):
        return super().get_tag() if PURE else ("py3", "none", super().get_tag()[2])


class WithLibraries(Distribution):
    def has_ext_modules(self):
        return not PURE


setup(
    packages=[*find_packages(include=["megatron_rema", "megatron_rema.*"]), CONF, "hydra_plugins"],  # a namespace that others share
    package_dir={CONF: "conf"},
    package_data={
        CONF: ["*.yaml", "*/*.yaml", "*/*/*.yaml"],
        "megatron_rema.report": ["*.html", "*.css", "*.js"],
        "megatron_rema.kernels": ["csrc/*"],
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfOnePlatform},
    distclass=WithLibraries,
)
