/* A stand-in for libnvidia-ml.so.1: GPUs whose power over time is known, so that what a meter says can be checked.

   FAKE_NVML_STATE names a text file, read anew when it changed, so that a test changes the machine while it runs:
     machine INIT_CODE PERSISTENCE
     gpu UUID NAME BUS MODE ORIGIN_NS BASE_MJ TICK_NS SLEEP_US POWER1_MW POWER2_MW PERIOD_NS ARCH AVERAGE GAIN SLICED
     script UUID COUNTER_GAIN JITTER_NS POWER_TICK_NS INSTANT_NS T_NS P_MW T_NS P_MW ...
     mig UUID PARENT_UUID
   A gpu draws POWER1 in the first and POWER2 in the second half of each period since ORIGIN_NS (boottime clock); its
   counter starts there at BASE_MJ and moves every TICK_NS. MODE: ok, unsupported (no counter), blind (no power either),
   stuck (a counter that stands still), noperm (a counter that may not be read), lost (fallen off the bus), blocked (a
   cgroup hides it). Each energy or power call takes SLEEP_US. The power sensor tells GAIN thousandths of the truth: the
   mean of the last second where AVERAGE is 1, and that moment. SLICED: whether MIG is on. INIT_CODE is what opening the
   library returns. Compiled with -DOLD_DRIVER the library has neither the counter's symbol nor fields, and older names for the rest.
   A script, on a line after its gpu's, replaces POWER1, POWER2 and PERIOD by knots, over and over from T = 0 to the last
   T: power is linear between them, and two knots of one T are a step. Its counter tells COUNTER_GAIN thousandths of the
   truth and each tick comes up to JITTER_NS early or late; the power sensor changes every POWER_TICK_NS, and the instant
   is the mean of the INSTANT_NS before that (of zero: that moment).
   FAKE_NVML_CALLS names a file of four 64-bit counts: energy reads, power reads, process queries, library openings. */

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long long u64;
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15, VERSION_MISMATCH = 18 };
enum { ENERGY, POWER, PROCESSES, INIT };
enum { POWER_AVERAGE = 185, POWER_INSTANT = 186 };
enum { MOST_GPUS = 128, MOST_KNOTS = 4096 };

typedef struct {
    u64 at_ns, mw;
    u64 mw_ns; /* energy up to here */
} Knot;

typedef struct {
    int mig;
    char uuid[96], name[96], parent[96], mode[16];
    unsigned bus, sleep_us, arch, average, gain, sliced, counter_gain, num_knots;
    u64 origin_ns, base_mj, tick_ns, power1_mw, power2_mw, period_ns, jitter_ns, power_tick_ns, instant_ns;
    Knot *knots;
} Gpu;

typedef struct {
    int num_gpus, machine[2];
    Gpu gpus[MOST_GPUS];
} State;

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

static char handles[MOST_GPUS][96]; /* a handle is a pointer to the UUID it was opened with */

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

/* The energy of the first `of` nanoseconds of a stretch of `length` in which power goes from p to q: exact, rounded down. */
static u64 ramp_mw_ns(u64 p, u64 q, u64 length, u64 of) {
    __int128 twice = (__int128)of * (2 * (__int128)p * length + ((__int128)q - p) * of);
    return length ? (u64)(twice / (2 * (__int128)length)) : 0;
}

static void set_knots(Gpu *g, const Knot *knots, unsigned n) {
    g->knots = memcpy(malloc(n * sizeof *knots), knots, n * sizeof *knots); /* never freed: others may be reading */
    g->num_knots = n;
    for (unsigned i = 1; i < n; i++) {
        Knot *from = &g->knots[i - 1], *to = &g->knots[i];
        u64 length = to->at_ns - from->at_ns;
        to->mw_ns = from->mw_ns + ramp_mw_ns(from->mw, to->mw, length, length);
    }
    g->period_ns = g->knots[n - 1].at_ns;
}

static void add_script(State *state, char *line) {
    static Knot knots[MOST_KNOTS];
    char uuid[96];
    Gpu read = {0};
    unsigned n = 0;
    int used = 0;
    if (sscanf(line, "script %95s %u %llu %llu %llu%n", uuid, &read.counter_gain, &read.jitter_ns, &read.power_tick_ns,
               &read.instant_ns, &used) != 5)
        return;
    for (char *end = line += used; n < MOST_KNOTS; line = end, n++) {
        knots[n].at_ns = strtoull(line, &end, 10);
        if (end == line) break;
        knots[n].mw = strtoull(line = end, &end, 10);
    }
    for (int i = 0; i < state->num_gpus; i++) {
        Gpu *g = &state->gpus[i];
        if (strcmp(g->uuid, uuid)) continue;
        g->counter_gain = read.counter_gain, g->jitter_ns = read.jitter_ns;
        g->power_tick_ns = read.power_tick_ns, g->instant_ns = read.instant_ns;
        set_knots(g, knots, n);
    }
}

static void read_state(State *state, FILE *file) {
    static char line[MOST_KNOTS * 32];
    *state = (State){.machine = {OK, 1}};
    while (fgets(line, sizeof line, file) && state->num_gpus < MOST_GPUS) {
        Gpu *g = &state->gpus[state->num_gpus];
        memset(g, 0, sizeof *g);
        g->counter_gain = 1000, g->power_tick_ns = 1;
        if (sscanf(line, "gpu %95s %95s %u %15s %llu %llu %llu %u %llu %llu %llu %u %u %u %u", g->uuid, g->name,
                   &g->bus, g->mode, &g->origin_ns, &g->base_mj, &g->tick_ns, &g->sleep_us, &g->power1_mw,
                   &g->power2_mw, &g->period_ns, &g->arch, &g->average, &g->gain, &g->sliced) == 15) {
            u64 half = g->period_ns / 2;
            Knot square[] = {{0, g->power1_mw, 0}, {half, g->power1_mw, 0}, {half, g->power2_mw, 0},
                             {g->period_ns, g->power2_mw, 0}};
            set_knots(g, square, 4);
            state->num_gpus++;
        } else if (sscanf(line, "mig %95s %95s", g->uuid, g->parent) == 2)
            g->mig = 1, state->num_gpus++;
        else if (sscanf(line, "machine %d %d", &state->machine[0], &state->machine[1]) != 2)
            add_script(state, line);
    }
}

/* The machine as the file describes it now. The lock is held when this returns. */
static pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
static State *locked_state(void) {
    static State state;
    static struct stat known;
    struct stat now;
    const char *path = getenv("FAKE_NVML_STATE");
    pthread_mutex_lock(&state_lock);
    if (!path || stat(path, &now)) {
        state.num_gpus = 0;
        return &state;
    }
    if (now.st_ino != known.st_ino || now.st_mtim.tv_sec != known.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != known.st_mtim.tv_nsec || now.st_size != known.st_size) {
        FILE *file = fopen(path, "r");
        if (file) read_state(&state, file), fclose(file);
        known = now;
    }
    return &state;
}

static int machine(int field) {
    int value = locked_state()->machine[field];
    pthread_mutex_unlock(&state_lock);
    return value;
}

static int find(const char *uuid, Gpu *out) {
    State *state = locked_state();
    int code = NOT_FOUND;
    for (int i = 0; i < state->num_gpus && code; i++)
        if (!strcmp(state->gpus[i].uuid, uuid)) *out = state->gpus[i], code = OK;
    pthread_mutex_unlock(&state_lock);
    return code;
}

/* The GPU at this place among those that are no slices. Returns how many there are. */
static unsigned find_place(unsigned place, Gpu *out) {
    State *state = locked_state();
    unsigned seen = 0;
    for (int i = 0; i < state->num_gpus; i++)
        if (!state->gpus[i].mig && seen++ == place) *out = state->gpus[i];
    pthread_mutex_unlock(&state_lock);
    return seen;
}

static int handle_of(const char *uuid, void **handle) {
    int code = INVALID;
    pthread_mutex_lock(&state_lock);
    for (int i = 0; i < MOST_GPUS && code; i++) {
        if (!handles[i][0]) strcpy(handles[i], uuid);
        if (!strcmp(handles[i], uuid)) *handle = handles[i], code = OK;
    }
    pthread_mutex_unlock(&state_lock);
    return code;
}

/* The last knot at or before a moment of the period. */
static const Knot *knot_before(const Gpu *g, u64 at_ns) {
    unsigned low = 0, high = g->num_knots - 1;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        *(g->knots[middle].at_ns <= at_ns ? &low : &high) = middle;
    }
    return &g->knots[low];
}

/* What was really used since the origin. */
static unsigned __int128 true_mw_ns(const Gpu *g, u64 since_ns) {
    u64 rest = since_ns % g->period_ns;
    const Knot *k = knot_before(g, rest);
    unsigned __int128 whole = (unsigned __int128)(since_ns / g->period_ns) * g->knots[g->num_knots - 1].mw_ns;
    return whole + k->mw_ns + ramp_mw_ns(k->mw, k[1].mw, k[1].at_ns - k->at_ns, rest - k->at_ns);
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
    Gpu g;
    return *n = find_place(0, &g), OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    Gpu g;
    if (index >= find_place(index, &g)) return INVALID;
    return strcmp(g.mode, "blocked") ? handle_of(g.uuid, handle) : NO_PERMISSION;
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
static u64 tick_at(const Gpu *g, u64 number) {
    u64 hash = (number + 1) * 0x9E3779B97F4A7C15ull;
    hash = (hash ^ (hash >> 29)) * 0xBF58476D1CE4E5B9ull;
    return number * g->tick_ns + (number ? (hash >> 32) % (2 * g->jitter_ns + 1) - g->jitter_ns : 0);
}

static u64 energy_mj(const Gpu *g, u64 at_ns) {
    u64 since_ns = at_ns - g->origin_ns, number = since_ns / g->tick_ns + 1; /* jitter is less than half a tick */
    while (number && tick_at(g, number) > since_ns) number--;
    return g->base_mj + (u64)(true_mw_ns(g, tick_at(g, number)) * g->counter_gain / 1000 / 1000000000u);
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, u64 *out) {
    Gpu g;
    count(ENERGY);
    if (find(handle, &g)) return LOST;
    if (g.sleep_us) usleep(g.sleep_us);
    if (!strcmp(g.mode, "unsupported") || !strcmp(g.mode, "blind")) return NOT_SUPPORTED;
    if (failure(&g)) return failure(&g);
    return *out = energy_mj(&g, strcmp(g.mode, "stuck") && strcmp(g.mode, "mute") ? now_ns() : g.origin_ns), OK;
}
#endif

static int power_mw(void *handle, int average, unsigned *out) {
    Gpu g;
    count(POWER);
    if (find(handle, &g)) return LOST;
    if (g.sleep_us) usleep(g.sleep_us);
    if (!strcmp(g.mode, "blind")) return NOT_SUPPORTED;
    if (!strcmp(g.mode, "mute")) return LOST;
    if (failure(&g)) return failure(&g);
    u64 since_ns = (now_ns() - g.origin_ns) / g.power_tick_ns * g.power_tick_ns, at_ns = since_ns % g.period_ns;
    u64 window_ns = average ? 1000000000u : g.instant_ns;
    const Knot *k = knot_before(&g, at_ns);
    u64 mw = k->mw;
    if (k[1].at_ns > k->at_ns)
        mw += ((__int128)k[1].mw - k->mw) * (at_ns - k->at_ns) / (k[1].at_ns - k->at_ns);
    if (window_ns > since_ns) window_ns = since_ns;
    if (window_ns) mw = (u64)((true_mw_ns(&g, since_ns) - true_mw_ns(&g, since_ns - window_ns)) / window_ns);
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
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *out) { return (void)handle, (void)sensor, *out = 61, OK; }
#ifdef OLD_DRIVER
#define nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetCurrentClocksThrottleReasons
#else
int nvmlDeviceGetTemperatureV(void *handle, int *out) { return (void)handle, out[2] = 61, OK; } /* version, sensor, C */
#endif
TELLS(nvmlDeviceGetCurrentClocksEventReasons, u64, 1 + 4 * (g.power1_mw >= 700000)) /* idle; capped at the limit */
TELLS(nvmlDeviceGetPersistenceMode, unsigned, machine(1))

/* what other programs ask for before they measure anything: 80 GiB, half full and always busy */
int nvmlDeviceGetMemoryInfo(void *handle, u64 *out) { return (void)handle, out[0] = 80ull << 30, out[1] = out[2] = 40ull << 30, OK; }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *out) { return (void)handle, out[0] = 100, out[1] = 50, OK; }
TELLS(nvmlDeviceGetComputeMode, unsigned, 0)

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
