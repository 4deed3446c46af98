/* Attention over pages on threads. */
#include "native.h"

#include <stdlib.h>

struct attending {
    const struct pages *pages;
    const float *q;
    const int64_t *lengths;
    float *y, *scratch;
    long room;
};

static void attending_piece(void *work, long index, long thread) { /* one head of keys and values of one conversation */
    const struct attending *w = work;
    const struct pages *p = w->pages;
    const long conversation = index / p->kv_heads, head = index % p->kv_heads;
    const long at = (conversation * p->kv_heads + head) * (p->heads / p->kv_heads) * p->dim;
    tier->attend(p, conversation, head, w->q + at, w->lengths[conversation], w->y + at, w->scratch + thread * w->room);
}

/* q [count][heads][dim], each over the first `lengths` tokens of its conversation -> y, as q, 0 where there are none. Returns 0, or
   1 where memory for it cannot be had. */
EXPORT int palaestra_attend(const struct pages *p, const float *q, const int64_t *lengths, long count, float *y,
                            long threads) {
    const long seats = threads < 1 ? 1 : threads < THREADS_MOST ? threads : THREADS_MOST;
    long longest = 0;
    for (long i = 0; i < count; i++) longest = lengths[i] > longest ? lengths[i] : longest;
    struct attending w = {p, q, lengths, y, NULL, padded(p->heads / p->kv_heads * longest)};
    if (!count) return 0;
    w.scratch = malloc((seats * w.room + 1) * sizeof(float));
    if (!w.scratch) return 1;
    spread(attending_piece, &w, count * p->kv_heads, seats);
    free(w.scratch);
    return 0;
}
