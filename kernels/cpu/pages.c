/* Attention over pages on threads. */
#include "native.h"

#include <stdlib.h>

struct attending {
    const struct pages *pages;
    const float *q;
    const int64_t *lengths;
    float *y, *scratch;
    long room, count, pieces;
};

static void attending_piece(void *work, long index, long thread) { /* some heads of keys and values */
    const struct attending *w = work;
    const struct pages *p = w->pages;
    const long wide = p->heads / p->kv_heads * p->dim;
    for (long at = w->count * index / w->pieces; at < w->count * (index + 1) / w->pieces; at++)
        tier->attend(p, at / p->kv_heads, at % p->kv_heads, w->q + at * wide, w->lengths[at / p->kv_heads],
                     w->y + at * wide, w->scratch + thread * w->room);
}

/* q [count][heads][dim], each over the first `lengths` tokens of its conversation -> y, as q, 0 where there are none. Returns 0, or
   1 where memory for it cannot be had. */
EXPORT int palaestra_attend(const struct pages *p, const float *q, const int64_t *lengths, long count, float *y,
                            long threads) {
    const long seats = seats_of(threads);
    long longest = 0;
    for (long i = 0; i < count; i++) longest = lengths[i] > longest ? lengths[i] : longest;
    const long all = count * p->kv_heads, pieces = seats * PIECES < all ? seats * PIECES : all;
    struct attending w = {p, q, lengths, y, NULL, padded(p->heads / p->kv_heads * longest), all, pieces};
    if (!count) return 0;
    w.scratch = malloc((seats * w.room + 1) * sizeof(float));
    if (!w.scratch) return 1;
    spread(attending_piece, &w, pieces, seats);
    free(w.scratch);
    return 0;
}
