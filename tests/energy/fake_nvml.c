/* A stand-in for libnvidia-ml.so.1: GPUs whose power over time is known, so that what a meter says can be checked.

   FAKE_NVML_STATE names a text file, read anew at each call, so that a test changes the machine while it runs:
     machine INIT_CODE PERSISTENCE
     gpu UUID NAME BUS MODE ORIGIN_NS BASE_MJ TICK_NS SLEEP_US POWER1_MW POWER2_MW PERIOD_NS ARCH AVERAGE GAIN SLICED
     mig UUID PARENT_UUID
   A gpu draws POWER1 in the first and POWER2 in the second half of each period since ORIGIN_NS (boottime clock); its
   counter starts there at BASE_MJ and moves every TICK_NS. MODE: ok, unsupported (no counter), blind (no power either),
   stuck (a counter that stands still), noperm (a counter that may not be read), lost (fallen off the bus), blocked (a
   cgroup hides it). Each energy or power call takes SLEEP_US. The power sensor tells GAIN thousandths of the truth: the
   mean of the last second where AVERAGE is 1, and that moment. SLICED: whether MIG is on. INIT_CODE is what opening the
   library returns. Compiled with -DOLD_DRIVER the library has neither the counter's symbol nor fields, and older names for the rest.
   FAKE_NVML_CALLS names a file of four 64-bit counts: energy reads, power reads, process queries, library openings. */

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long u64;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15, VERSION_MISMATCH = 18 };
enum { ENERGY, POWER, PROCESSES, INIT };
enum { POWER_AVERAGE = 185, POWER_INSTANT = 186 };

typedef struct {
    int mig;
    char uuid[96], name[96], parent[96], mode[16];
    unsigned bus, sleep_us, arch, average, gain, sliced;
    u64 origin_ns, base_mj, tick_ns, power1_mw, power2_mw, period_ns;
} Gpu;

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;

typedef struct {
    unsigned id, scope;
    long long timestamp_us, latency_us;
    unsigned type, code;
    u64 value;
} FieldValue;

static char handles[16][96]; /* a handle is a pointer to the UUID it was opened with */

static void count(int what) {
    static volatile u64 *calls;
    const char *path = getenv("FAKE_NVML_CALLS");
    if (!path) return;
    if (!calls) {
        int fd = open(path, O_RDWR);
        calls = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    __sync_fetch_and_add(&calls[what], 1);
}

static u64 now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int load(Gpu *gpus) {
    FILE *file = fopen(getenv("FAKE_NVML_STATE"), "r");
    char line[512];
    int n = 0;
    while (file && n < 16 && fgets(line, sizeof line, file)) {
        Gpu *g = &gpus[n];
        memset(g, 0, sizeof *g);
        if (sscanf(line, "gpu %95s %95s %u %15s %llu %llu %llu %u %llu %llu %llu %u %u %u %u", g->uuid, g->name,
                   &g->bus, g->mode, &g->origin_ns, &g->base_mj, &g->tick_ns, &g->sleep_us, &g->power1_mw,
                   &g->power2_mw, &g->period_ns, &g->arch, &g->average, &g->gain, &g->sliced) == 15)
            n++;
        else if (sscanf(line, "mig %95s %95s", g->uuid, g->parent) == 2)
            g->mig = 1, n++;
    }
    if (file) fclose(file);
    return n;
}

static int machine(int field) {
    FILE *file = fopen(getenv("FAKE_NVML_STATE"), "r");
    int values[2] = {OK, 1};
    if (file && fscanf(file, "machine %d %d", &values[0], &values[1]) != 2) abort();
    if (file) fclose(file);
    return values[field];
}

static int find(const char *uuid, Gpu *out) {
    Gpu gpus[16];
    int n = load(gpus);
    for (int i = 0; i < n; i++)
        if (!strcmp(gpus[i].uuid, uuid)) return *out = gpus[i], OK;
    return NOT_FOUND;
}

static int handle_of(const char *uuid, void **handle) {
    for (int i = 0; i < 16; i++) {
        if (!handles[i][0]) strcpy(handles[i], uuid);
        if (!strcmp(handles[i], uuid)) return *handle = handles[i], OK;
    }
    return INVALID;
}

static u64 energy_mj(const Gpu *g, u64 at_ns, u64 tick_ns) {
    u64 t = (at_ns - g->origin_ns) / tick_ns * tick_ns, half = g->period_ns / 2;
    unsigned __int128 whole = t / g->period_ns, rest = t % g->period_ns;
    unsigned __int128 mw_ns = whole * half * (g->power1_mw + g->power2_mw);
    mw_ns += rest < half ? rest * g->power1_mw : (unsigned __int128)half * g->power1_mw + (rest - half) * g->power2_mw;
    return g->base_mj + (u64)(mw_ns / 1000000000u);
}

static int failure(const Gpu *g) {
    if (!strcmp(g->mode, "lost")) return LOST;
    if (!strcmp(g->mode, "noperm")) return NO_PERMISSION;
    return OK;
}

int nvmlInitWithFlags(unsigned flags) { return (void)flags, count(INIT), machine(0); }
int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case NO_PERMISSION: return "Insufficient Permissions";
        case LOST: return "GPU is lost";
        case VERSION_MISMATCH: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned *n) {
    Gpu gpus[16];
    int all = load(gpus);
    *n = 0;
    for (int i = 0; i < all; i++) *n += !gpus[i].mig;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    Gpu gpus[16];
    int n = load(gpus);
    for (int i = 0; i < n; i++)
        if (!gpus[i].mig && index-- == 0)
            return strcmp(gpus[i].mode, "blocked") ? handle_of(gpus[i].uuid, handle) : NO_PERMISSION;
    return INVALID;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    Gpu g;
    if (find(uuid, &g)) return NOT_FOUND;
    return strcmp(g.mode, "blocked") ? handle_of(uuid, handle) : NO_PERMISSION;
}

int nvmlDeviceGetUUID(void *handle, char *out, unsigned size) { return snprintf(out, size, "%s", (char *)handle), OK; }

int nvmlDeviceGetName(void *handle, char *out, unsigned size) {
    Gpu g;
    if (find(handle, &g)) return LOST;
    return snprintf(out, size, "%s", g.name), OK;
}

int nvmlDeviceGetPciInfo_v3(void *handle, PciInfo *info) {
    Gpu g;
    if (find(handle, &g)) return LOST;
    memset(info, 0, sizeof *info);
    info->bus = g.bus;
    return OK;
}

int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned *low, unsigned *high) {
    return (void)handle, *low = 200000, *high = 700000, OK;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *mig, void **handle) {
    Gpu g;
    if (find(mig, &g) || !g.mig) return INVALID;
    return handle_of(g.parent, handle);
}

#ifndef OLD_DRIVER
int nvmlDeviceGetTotalEnergyConsumption(void *handle, u64 *out) {
    Gpu g;
    count(ENERGY);
    if (find(handle, &g)) return LOST;
    usleep(g.sleep_us);
    if (!strcmp(g.mode, "unsupported") || !strcmp(g.mode, "blind")) return NOT_SUPPORTED;
    if (failure(&g)) return failure(&g);
    return *out = energy_mj(&g, strcmp(g.mode, "stuck") && strcmp(g.mode, "mute") ? now_ns() : g.origin_ns, g.tick_ns), OK;
}
#endif

static int power_mw(void *handle, int average, unsigned *out) {
    Gpu g;
    count(POWER);
    if (find(handle, &g)) return LOST;
    usleep(g.sleep_us);
    if (!strcmp(g.mode, "blind")) return NOT_SUPPORTED;
    if (!strcmp(g.mode, "mute")) return LOST;
    if (failure(&g)) return failure(&g);
    u64 now = now_ns(), t = (now - g.origin_ns) % g.period_ns;
    u64 mw = t < g.period_ns / 2 ? g.power1_mw : g.power2_mw;
    if (average) {
        u64 second = now - g.origin_ns < 1000000000u ? now - g.origin_ns : 1000000000u;
        mw = (energy_mj(&g, now, 1) - energy_mj(&g, now - second, 1)) * 1000000000u / (second ? second : 1);
    }
    return *out = (unsigned)(mw * g.gain / 1000), OK;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *out) {
    Gpu g;
    return power_mw(handle, !find(handle, &g) && g.average, out);
}

#ifndef OLD_DRIVER
int nvmlDeviceGetFieldValues(void *handle, int n, FieldValue *values) {
    Gpu g;
    if (find(handle, &g)) return LOST;
    for (int i = 0; i < n; i++) {
        FieldValue *v = &values[i];
        unsigned mw = 0;
        int whole_module = strstr(g.name, "GH200") != 0;
        if ((v->id != POWER_INSTANT && (v->id != POWER_AVERAGE || !g.average)) || v->scope != (unsigned)whole_module)
            v->code = NOT_SUPPORTED;
        else
            v->code = power_mw(handle, v->id == POWER_AVERAGE, &mw);
        v->value = mw;
    }
    return OK;
}
#endif

#define TELLS(name, type, expression) \
    int name(void *handle, type *out) { \
        Gpu g; \
        if (find(handle, &g)) return LOST; \
        return *out = expression, OK; \
    }
TELLS(nvmlDeviceGetArchitecture, unsigned, g.arch)
TELLS(nvmlDeviceGetEnforcedPowerLimit, unsigned, 700000)
#ifdef OLD_DRIVER
#define nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) { return (void)handle, (void)sensor, *out = 61, OK; }
#else
int nvmlDeviceGetTemperatureV(void *handle, int *out) { return (void)handle, out[2] = 61, OK; } /* version, sensor, C */
#endif
TELLS(nvmlDeviceGetCurrentClocksEventReasons, u64, 1 + 4 * (g.power1_mw >= 700000)) /* idle; capped at the limit */
TELLS(nvmlDeviceGetPersistenceMode, unsigned, machine(1))

int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *out) { return (void)handle, *out = type == 1 ? 1980 : 0, OK; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return snprintf(out, size, "580.65.06"), OK; }

int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *pending) {
    Gpu g;
    if (find(handle, &g)) return LOST;
    return *now = *pending = g.sliced, OK;
}

/* present only so that a meter that asks for processes is caught doing it */
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *n, void *p) { return (void)h, (void)p, count(PROCESSES), *n = 0, OK; }
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *n, void *p) { return (void)h, (void)p, count(PROCESSES), *n = 0, OK; }
