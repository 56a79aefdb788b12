"""For dry runs: an NVML library with one made-up GPU, built from the tests' own plus the calls only the probe makes."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_check_part import ROOT

UUID = "GPU-aaaaaaaa-0000-0000-0000-000000000000"

# Appended to tests/energy/fake_nvml.c, whose state, clock and errors it uses. Field 191 is refused, as old drivers do.
CALLS = r"""
typedef union { double d; unsigned ui; unsigned long ul; u64 ull; long long sll; } Value;
typedef struct { unsigned field, scope; long long timestamp, latency; unsigned type; int ret; Value value; } FieldValue;
typedef struct { u64 timestamp; Value value; } Sample;

int nvmlDeviceGetFieldValues(void *handle, int n, FieldValue *v) {
    for (int i = 0; i < n; i++) {
        u64 energy;
        unsigned power;
        v[i].timestamp = now_ns() / 1000;
        v[i].latency = 1;
        v[i].ret = NOT_SUPPORTED;
        if (v[i].field == 83) {
            v[i].ret = nvmlDeviceGetTotalEnergyConsumption(handle, &energy);
            v[i].type = 3, v[i].value.ull = energy;
        } else if ((v[i].field == 185 || v[i].field == 186) && v[i].scope == 0) {
            v[i].ret = nvmlDeviceGetPowerUsage(handle, &power);
            v[i].type = 1, v[i].value.ui = power;
        }
    }
    return OK;
}

int nvmlDeviceGetSamples(void *handle, int what, u64 since, unsigned *type, unsigned *n, Sample *out) {
    unsigned power;
    (void)since;
    if (what != 0) return NOT_SUPPORTED;
    *type = 1;
    for (unsigned i = 0; out && i < *n; i++) {
        nvmlDeviceGetPowerUsage(handle, &power);
        out[i].timestamp = now_ns() / 1000 - 20000 * (*n - i);
        out[i].value.ui = power;
    }
    if (!out) *n = 4;
    return OK;
}

int nvmlDeviceGetPersistenceMode(void *handle, unsigned *mode) { return (void)handle, *mode = 1, OK; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return snprintf(out, size, "0.0 (made up)"), OK; }
"""


# what both files define: those of the tests' library get another name
OVERRIDDEN = (
    "Value", "FieldValue", "Sample", "nvmlDeviceGetFieldValues", "nvmlDeviceGetPersistenceMode",
    "nvmlSystemGetDriverVersion",
)  # fmt: skip


def _renamed(name: str) -> tuple[str, str]:
    return f"define {name} tests_{name}", f"undef {name}"


def fake_environment(work: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Build the library and describe its GPU; the environment that makes pynvml load it, {} without a C compiler."""
    source, compiler = ROOT / "tests" / "energy" / "fake_nvml.c", shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not source.is_file():
        print("no C compiler, or no tests/energy/fake_nvml.c: the parts that read NVML are skipped", file=sys.stderr)
        return {}
    folder = work / "fake_nvml"
    folder.mkdir()
    aside, back = ("".join(f"#{text}\n" for text in texts) for texts in zip(*map(_renamed, OVERRIDDEN), strict=True))
    (folder / "nvml.c").write_text(f'{aside}#include "{source}"\n{back}{CALLS}')
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(folder / "libnvidia-ml.so.1")]
    built = subprocess.run([compiler, *flags, str(folder / "nvml.c")], capture_output=True, text=True)
    if built.returncode != 0:
        print(f"the made-up NVML does not compile:\n{built.stderr[-2000:]}", file=sys.stderr)
        return {}
    # 400 W on average: 500 and 300 W in turns of 0.2 s, a counter that moves every 100 ms
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    state = "machine 0 1\n"
    state += f"gpu {UUID} Made-up-GPU 1 ok {now_ns} 5000000 100000000 0 500000 300000 400000000 9 1 1000 0\n"
    (folder / "state").write_text(state)
    paths = [str(folder), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
    return {"LD_LIBRARY_PATH": ":".join(paths), "FAKE_NVML_STATE": str(folder / "state")}
