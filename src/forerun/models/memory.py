"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, None where the system does not say.

    Of RAM: what Linux says is available, or less where a container is limited.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int((group / "memory.current").read_text()))
    return free
