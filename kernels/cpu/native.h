/* What the files share that Python calls (kernels/native.py). */
#ifndef NATIVE_H
#define NATIVE_H

#include "records.h"
#include "threads.h"

#define EXPORT __attribute__((visibility("default")))
#define PIECES 4 /* a thread, so that one that is held up leaves its share to the others */

/* How many threads may take part, for each of which there is scratch. */
static inline long seats_of(long threads) { return threads < 1 ? 1 : threads < THREADS_MOST ? threads : THREADS_MOST; }

extern const struct operations *tier; /* the one in use */

#endif
