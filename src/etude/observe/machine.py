"""What there is to train with: memory, disk, processor, devices and versions. Asks this machine only."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

REPORTED_PACKAGES = ("etude", "torch", "transformers", "peft", "safetensors", "numpy", "datasets", "bitsandbytes")
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and those of `REPORTED_PACKAGES` that are installed, with their versions."""
    from etude import __version__

    found = {name: version_of(name) for name in REPORTED_PACKAGES}
    return {"python": platform.python_version(), **{n: v for n, v in found.items() if v}, "etude": __version__}


def free_disk_bytes(folder: str | Path) -> int | None:
    """Free bytes where `folder` is or will be made; None where that cannot be asked."""
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def free_memory_bytes(device: Any = "cpu") -> int | None:
    """Bytes that can still be allocated on `device`; on a CPU what the machine and the container leave."""
    if str(device).startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    limits = [limit for limit in (_machine_bytes(), _container_bytes()) if limit is not None]
    return min(limits) if limits else None


def _machine_bytes() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _container_bytes() -> int | None:
    """What the control group of this process leaves, without the file cache that it would give up."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))


def peak_memory_bytes(device: Any = "cpu") -> int | None:
    """The most memory that this process has held: allocated tensors on a GPU, resident pages on a CPU."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor_name() -> str:
    """`AMD EPYC 7B13, 2 cores`: the model of the processor and the cores this process may use."""
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        name = platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name or platform.machine()}, {cores} core{'s' if cores != 1 else ''}"


def device_name(device: Any) -> str:
    """The name of a GPU with its memory, or of the processor."""
    if str(device).startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return processor_name()
