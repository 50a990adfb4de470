/* Samples whether the calling thread holds Python's lock (the GIL), on the thread's own processor
   time: used by `dist-looksam data bench`, see bench.py. Linux only. */
#ifdef __linux__
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static int (*held)(void); /* PyGILState_Check, which reads one value of this thread */
static volatile long samples, with_lock;
static timer_t timer;

static void sample(int number) {
    (void)number;
    samples++;
    with_lock += held() != 0;
}

/* Starts to sample every `microseconds` of this thread's processor time. Returns 0, or -1. */
int looksam_gil_start(int (*check)(void), long microseconds) {
    struct sigaction action;
    struct sigevent event;
    struct itimerspec every = {{0, microseconds * 1000}, {0, microseconds * 1000}};
    memset(&action, 0, sizeof action);
    memset(&event, 0, sizeof event);
    held = check;
    samples = with_lock = 0;
    action.sa_handler = sample;
    action.sa_flags = SA_RESTART;
    if (sigaction(SIGPROF, &action, NULL)) return -1;
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGPROF;
    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
    if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer)) return -1;
    return timer_settime(timer, 0, &every, NULL);
}

/* Ends it; numbers of samples, and of those that met the lock held. */
void looksam_gil_stop(long *all, long *those) {
    timer_delete(timer);
    *all = samples;
    *those = with_lock;
}
#endif
