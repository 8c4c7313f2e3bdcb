"""Packages ``conf/`` as ``megatron_rema.conf`` so that an installed package finds its configuration groups."""

from setuptools import find_packages, setup

CONF = "megatron_rema.conf"

setup(
    packages=[*find_packages(include=["megatron_rema", "megatron_rema.*"]), CONF],
    package_dir={CONF: "conf"},
    package_data={CONF: ["*.yaml", "*/*.yaml", "*/*/*.yaml"], "megatron_rema.report": ["*.html", "*.css", "*.js"]},
)
