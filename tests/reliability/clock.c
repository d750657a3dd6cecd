/* A clock that jumps, as a process sees it that preloads this: clock_jumps(SECONDS) sets it from then on, and so do
 * SFT_TEST_CLOCK seconds in the environment at its start. The clock of files is the system's, and stays. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long ahead;

__attribute__((constructor)) static void begin(void) {
    const char *said = getenv("SFT_TEST_CLOCK");
    if (said) ahead = atol(said);
}

void clock_jumps(long seconds) { ahead += seconds; }

int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*own)(clockid_t, struct timespec *);
    if (!own) own = dlsym(RTLD_NEXT, "clock_gettime");
    int code = own(which, now);
    if (!code && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead;
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    int code = clock_gettime(CLOCK_REALTIME, &found);
    (void)zone;
    if (!code && now) {
        now->tv_sec = found.tv_sec;
        now->tv_usec = found.tv_nsec / 1000;
    }
    return code;
}

time_t time(time_t *into) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (into) *into = found.tv_sec;
    return found.tv_sec;
}
