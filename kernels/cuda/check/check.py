#!/usr/bin/env python3
"""Compiles every kernel for every architecture, without a GPU, and holds what it uses against `resources.txt`.

    python3 kernels/cuda/check/check.py                      every source
    python3 kernels/cuda/check/check.py gemm_mma.cu          some sources
    python3 kernels/cuda/check/check.py --update             rewrite the table

NVRTC is all it needs, the headers of this folder being given in memory, as on a user's machine. It is taken from a virtual
environment: the one that RIDGE_CUDA_VENV names, or target/cuda-check, which is made from the package index if it is missing.
Where that cannot be had, the check is skipped by name. A source that is not for all architectures says so in its first
lines: `// Architectures: sm_90a`.

The table has, per kernel and architecture, registers per thread / static shared memory in bytes / bytes spilled to memory. It
belongs to one version of NVRTC; another version's registers are not compared, only that nothing spills that did not before.
"""

import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import re
import subprocess
import sys

NVRTC = "nvidia-cuda-nvrtc==13.5.37"
ARCHITECTURES = ["sm_80", "sm_89", "sm_90a", "sm_100a"]
# As `kernels/src/cuda/compile.rs` has them, and a report of what is used.
OPTIONS = ["--std=c++17", "--extra-device-vectorization", "--ptxas-options=-v"]
FOLDER = pathlib.Path(__file__).resolve().parent.parent
TABLE = FOLDER / "check" / "resources.txt"


class Missing(Exception):
    """What the check needs and cannot have."""


def library():
    """Path of libnvrtc, installing it if need be."""
    venv = pathlib.Path(os.environ.get("RIDGE_CUDA_VENV") or FOLDER.parent.parent / "target" / "cuda-check")

    def found():
        return sorted(path for path in venv.glob("lib/python3*/site-packages/nvidia/**/libnvrtc.so.*") if "alt" not in path.name)

    if not found():
        if os.environ.get("RIDGE_CUDA_VENV"):
            raise Missing(f"no libnvrtc in {venv}")
        try:
            subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True)
            pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, NVRTC], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise Missing(f"{NVRTC} cannot be installed: {lines[-1] if lines else error}") from error
    if not found():
        raise Missing(f"{NVRTC} has no libnvrtc for this machine")
    return found()[0]


def open_nvrtc(path):
    # NVRTC opens its table of built-in functions by name; the loader finds it once it is open.
    for builtins in path.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def version(path):
    nvrtc, major, minor = open_nvrtc(path), ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_source(path, name, architecture):
    """The compiler's log; fails with it if the source does not compile."""
    nvrtc = open_nvrtc(path)
    headers = sorted(FOLDER.glob("*.cuh"))
    strings = lambda items: (ctypes.c_char_p * len(items))(*items)
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program),
        (FOLDER / name).read_bytes(),
        name.encode(),
        len(headers),
        strings([header.read_bytes() for header in headers]),
        strings([header.name.encode() for header in headers]),
    )
    options = [option.encode() for option in [*OPTIONS, f"--gpu-architecture={architecture}"]]
    code = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


def resources(log):
    """Kernel -> "registers/shared/spilled" from the assembler's report."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'")[0]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        number = lambda match: match.group(1) if match else "0"
        found[name] = f"{number(registers)}/{number(shared)}/{number(spilled)}"
    return found


def architectures(name):
    head = "\n".join((FOLDER / name).read_text().splitlines()[:5])
    declared = re.search(r"// Architectures: (.+)", head)
    return declared.group(1).split() if declared else ARCHITECTURES


def read_table():
    """The version, and (kernel, architecture) -> resources."""
    made_by, table = "", {}
    if TABLE.exists():
        for line in TABLE.read_text().splitlines():
            fields = line.split()
            if line.startswith("# NVRTC"):
                made_by = fields[2]
            elif fields and not line.startswith("#"):
                table.update({(fields[0], arch): cell for arch, cell in zip(ARCHITECTURES, fields[1:]) if cell != "-"})
    return made_by, table


def write_table(made_by, table):
    kernels = sorted({kernel for kernel, _ in table})
    width = max(map(len, kernels))
    lines = [f"# NVRTC {made_by}: registers / bytes of static shared memory / bytes spilled", ""]
    lines[1] = "# " + "kernel".ljust(width - 2) + "".join(arch.rjust(14) for arch in ARCHITECTURES)
    for kernel in kernels:
        lines.append(kernel.ljust(width) + "".join(table.get((kernel, arch), "-").rjust(14) for arch in ARCHITECTURES))
    TABLE.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="names of .cu files; all if none is given")
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    arguments = parser.parse_args()
    try:
        nvrtc = library()
        made_by = version(nvrtc)
    except (Missing, OSError) as error:
        print(f"skipped: the kernels are not compiled: {error}")
        return 0
    names = arguments.sources or sorted(path.name for path in FOLDER.glob("*.cu"))
    jobs = [(name, arch) for name in names for arch in architectures(name)]
    # Processes, because NVRTC compiles one program at a time in each.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        results = list(pool.map(compile_source, [nvrtc] * len(jobs), *zip(*jobs)))
    used, problems = {}, []
    for (name, arch), (code, log) in zip(jobs, results):
        if code != 0:
            problems.append(f"{name} does not compile for {arch}:\n{log}")
        problems.extend(f"{name} for {arch}: {line}" for line in log.splitlines() if "warning" in line)
        used.update({(kernel, arch): cell for kernel, cell in resources(log).items()})
    table_made_by, table = read_table()
    if arguments.update and not problems:
        write_table(made_by, used if not arguments.sources else table | used)
        print(f"wrote {len(used)} entries")
        return 0
    for key, cell in used.items():
        kernel, arch = key
        expected = table.get(key)
        if expected is None:
            problems.append(f"{kernel} for {arch} uses {cell} and is not in the table")
        elif table_made_by == made_by and cell != expected:
            problems.append(f"{kernel} for {arch} uses {cell}, the table says {expected}")
        elif int(cell.split("/")[2]) > int(expected.split("/")[2]):
            problems.append(f"{kernel} for {arch} spills: {cell}, the table says {expected}")
    if not arguments.sources:
        problems.extend(f"{kernel} for {arch} is in the table and nowhere else" for kernel, arch in table.keys() - used.keys())
    if problems:
        print("\n".join(problems))
        print("If this is as it should be: python3 kernels/cuda/check/check.py --update")
        return 1
    kernels = len({kernel for kernel, _ in used})
    print(f"{kernels} kernels in {len(names)} sources compile for {', '.join(ARCHITECTURES)} (NVRTC {made_by}), as the table has them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
