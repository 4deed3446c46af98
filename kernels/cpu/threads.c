/* A few threads that share work by the piece: whoever is free takes the next one, and the caller takes part, so that a
   helper without a core delays nobody. Helpers without work spin for some microseconds, then sleep. */
#define _GNU_SOURCE /* for what Linux alone has */
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define SPINS 2000 /* looks before a thread goes to sleep: some 50 us */

/* `ticket`: the number of the work, how many threads may take part, how many pieces it has, and the next one to take. A
   piece that is taken must be `done` before the work can end, so that whoever took it may look at the other fields. */
static struct {
    pthread_mutex_t used, asleep; /* `used`: one work at a time; `asleep` guards the sleepers' condition */
    pthread_cond_t wake;
    _Atomic uint64_t ticket;
    _Atomic long done;
    piece function;
    void *work;
    long helpers;
    pthread_t threads[THREADS_MOST]; /* the helpers' */
    int core; /* the caller's, from which helpers are kept away; -1: from none */
} team = {.used = PTHREAD_MUTEX_INITIALIZER, .asleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static uint64_t ticket_of(uint64_t number, long threads, long pieces) {
    return number << 40 | (uint64_t)threads << 32 | (uint64_t)pieces << 16;
}

static int nothing_for(long thread, uint64_t ticket) {
    return (ticket & 0xffff) >= (ticket >> 16 & 0xffff) || thread >= (long)(ticket >> 32 & 0xff);
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes pieces until none is left. */
static void take_pieces(long thread) {
    uint64_t ticket = atomic_load(&team.ticket);
    while (!nothing_for(thread, ticket))
        if (atomic_compare_exchange_weak(&team.ticket, &ticket, ticket + 1)) {
            team.function(team.work, ticket & 0xffff, thread);
            atomic_fetch_add(&team.done, 1);
            ticket = atomic_load(&team.ticket);
        }
}

static void wait_for_work(long thread) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (!nothing_for(thread, atomic_load(&team.ticket))) return;
        pause_briefly();
    }
    pthread_mutex_lock(&team.asleep);
    while (nothing_for(thread, atomic_load(&team.ticket))) pthread_cond_wait(&team.wake, &team.asleep);
    pthread_mutex_unlock(&team.asleep);
}

static void *help(void *thread) {
    for (;;) {
        wait_for_work((long)thread);
        take_pieces((long)thread);
    }
    return NULL;
}

static void forget_helpers(void) { /* in a forked child, which has none */
    team.helpers = 0;
    team.core = -1;
    pthread_mutex_init(&team.used, NULL);
    pthread_mutex_init(&team.asleep, NULL);
    pthread_cond_init(&team.wake, NULL);
    atomic_store(&team.ticket, 0);
}

/* Keep helpers off the core that the caller is on, where they may need all cores: Linux likes to wake a thread where the
   one runs that wakes it, and would leave both there for some ten milliseconds. */
static void keep_apart(void) {
#if defined(__linux__)
    const int core = sched_getcpu();
    cpu_set_t allowed;
    if (core < 0 || core == team.core || pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed)) return;
    const int cores = CPU_COUNT(&allowed), apart = cores > 1 && team.helpers + 1 >= cores;
    if (!apart && team.core < 0) return;
    if (apart) CPU_CLR(core, &allowed);
    team.core = apart ? core : -1;
    for (long i = 0; i < team.helpers; i++) pthread_setaffinity_np(team.threads[i], sizeof allowed, &allowed);
#endif
}

/* As many helpers as are wanted, or as many as can be had. */
static void gather(long wanted) {
    static int once;
    if (!once++) pthread_atfork(NULL, NULL, forget_helpers);
    while (team.helpers < wanted && team.helpers < THREADS_MOST - 1) {
        pthread_t *thread = team.threads + team.helpers;
        if (pthread_create(thread, NULL, help, (void *)(team.helpers + 1))) return;
        pthread_detach(*thread);
        team.helpers++;
        team.core = -1;
    }
}

void spread(piece function, void *work, long pieces, long threads) {
    if (pieces < 2 || threads < 2 || pieces > PIECES_MOST || pthread_mutex_trylock(&team.used)) {
        for (long index = 0; index < pieces; index++) function(work, index, 0);
        return;
    }
    threads = threads < THREADS_MOST ? threads : THREADS_MOST;
    gather(threads - 1);
    keep_apart();
    team.function = function;
    team.work = work;
    atomic_store(&team.done, 0);
    pthread_mutex_lock(&team.asleep);
    atomic_store(&team.ticket, ticket_of((atomic_load(&team.ticket) >> 40) + 1, threads, pieces));
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.asleep);
    take_pieces(0);
    for (int spin = 0; atomic_load(&team.done) < pieces; spin++)
        spin < SPINS ? pause_briefly() : (void)sched_yield();
    pthread_mutex_unlock(&team.used);
}

