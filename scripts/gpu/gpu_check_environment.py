"""What this machine is: GPU, driver, versions, commit, and how its GPUs are connected."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys

from gpu_check_nvml import Nvml
from gpu_check_part import ROOT, Part, main

PACKAGES = (
    "torch", "triton", "accelerate", "transformers", "tokenizers", "safetensors", "numpy", "nvidia-ml-py", "pytest",
    "wandb", "typer", "rich", "plotly", "deepspeed", "datasets", "frugal-moe",
)  # fmt: skip
MEASURED = ("moe", "kernels", "recipes", "scripts", "tests/kernels")  # folders whose text decides the numbers


def run(part: Part) -> None:
    """Each section stands alone: what one cannot tell, the others still do."""
    with part.section("machine"):
        part.put("commit", commit())
        part.put("tree_sha256", tree_sha256())
        part.put("python", platform.python_version())
        part.put("platform", platform.platform())
        part.put("processors", os.cpu_count())
        part.put("memory_gib", round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1))
        part.put("versions", {name: version(name) for name in PACKAGES})
        variables = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
        part.put("variables", {name: os.environ.get(name) for name in variables})
    with part.section("torch"):
        torch_facts(part)
    with part.section("nvml"):
        try:
            nvml = Nvml()
        except RuntimeError as error:
            part.note(f"no NVML facts: {error}")
        else:
            part.put("nvml", nvml.description())
            part.put("topology", nvml.topology())
            part.say(f"driver {part.data['nvml']['driver']}")
    part.say(f"python {platform.python_version()}")
    part.say(f"commit {str(part.data.get('commit'))[:12]}")


def torch_facts(part: Part) -> None:
    """Devices as torch sees them."""
    import torch

    part.put("torch_cuda", torch.version.cuda)
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": facts.name,
                "uuid": str(facts.uuid),
                "capability": f"{facts.major}.{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "multiprocessors": facts.multi_processor_count,
                "l2_mib": round(getattr(facts, "L2_cache_size", 0) / 2**20, 1),
            }
        )
    part.put("torch_devices", devices)
    part.say(f"{len(devices)} x {devices[0]['name']}" if devices else "no CUDA device")
    part.say(f"torch {torch.__version__}, triton {version('triton')}, CUDA {torch.version.cuda}")


def version(package: str) -> str | None:
    """Installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """HEAD, with `+` when tracked files differ from it; None where git cannot tell."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]  # the folder may belong to another user
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"git cannot tell the commit: {error}", file=sys.stderr)
        return None
    return head.stdout.strip() + ("+" if dirty.returncode else "") if head.returncode == 0 else None


def tree_sha256() -> str:
    """Names the code that was measured where git is absent: a hash over every file of the folders that matter."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                content = file.read_bytes()
                digest.update(f"{file.relative_to(ROOT)} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    main(run)
