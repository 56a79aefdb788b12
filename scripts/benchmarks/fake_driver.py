"""A made-up NVML driver of so many GPUs for a process that is started with it, its calls as slow as asked.

The tests' library with other calls for energy and power: theirs look at a file each time, so that a test can change the
machine while programs run; no driver does. What is left are calls that look at the clock, and sleep.
"""

import shutil
import subprocess
import time
from pathlib import Path

__all__ = ["fake_driver", "fake_uuids"]

SOURCE = Path(__file__).resolve().parents[2] / "tests" / "energy" / "fake_nvml.c"

SENSORS = f"""
#define nvmlDeviceGetTotalEnergyConsumption tests_energy_call
#define nvmlDeviceGetFieldValues tests_field_values
#include "{SOURCE}"
#undef nvmlDeviceGetTotalEnergyConsumption
#undef nvmlDeviceGetFieldValues

static void work(void) {{
    static int sleep_us = -1;
    if (sleep_us < 0) sleep_us = atoi(getenv("FAKE_CALL_US"));
    if (sleep_us) usleep(sleep_us);
}}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, u64 *out) {{
    if (getenv("FAKE_POWER_ONLY")) return NOT_SUPPORTED;
    work();
    return (void)handle, *out = now_ns() / 100000000 * 50000, OK; /* 500 W in ticks of 100 ms */
}}

int nvmlDeviceGetFieldValues(void *handle, int n, FieldValue *values) {{
    work();
    for (int i = 0; i < n; i++) values[i].code = OK, values[i].value = 500000; /* 500 W, the mean of a second */
    return (void)handle, OK;
}}
"""


def fake_uuids(count: int) -> list[str]:
    """The GPUs' UUIDs."""
    return [f"GPU-{number:08}-0000-0000-0000-000000000000" for number in range(count)]


def fake_driver(folder: Path, count: int, call_s: float, counter: bool = True) -> dict[str, str]:
    """Build the library in `folder`: `count` GPUs at 500 W, `call_s` each call for their energy or power.

    A counter moves every 100 ms; without one there is power alone, a mean over the last second. Returns the environment
    that makes nvidia-ml-py load it. Needs a C compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("bench meter-overhead compiles a small C library: apt-get install gcc")
    (folder / "nvml.c").write_text(SENSORS)
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(folder / "libnvidia-ml.so.1")]
    subprocess.run([compiler, *flags, str(folder / "nvml.c")], check=True)
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    told = f"ok {now_ns} 5000000 100000000 0 500000 500000 1000000000 9 1 1000 0"
    gpus = [f"gpu {uuid} Made-up-GPU {bus} {told}\n" for bus, uuid in enumerate(fake_uuids(count), 1)]
    (folder / "state").write_text("".join(["machine 0 1\n", *gpus]))
    behaves = {"FAKE_CALL_US": str(round(call_s * 1e6))} | ({} if counter else {"FAKE_POWER_ONLY": "1"})
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML_STATE": str(folder / "state"), **behaves}
