/* Sampling on threads. */
#include "native.h"

#include <stdlib.h>

struct draws {
    const float *logits, *temperatures;
    const double *uniforms;
    int64_t *ids;
    float *logprobs, *scratch;
    long stride, width, count, pieces;
};

static void draws_piece(void *work, long index, long thread) {
    const struct draws *d = work;
    for (long row = d->count * index / d->pieces; row < d->count * (index + 1) / d->pieces; row++)
        tier->draw(d->logits + row * d->stride, d->width, d->temperatures[row], d->uniforms[row], d->ids + row,
                   d->logprobs + row, d->scratch + thread * d->width);
}

/* One token a row of logits [count][stride], of which `width` are the vocabulary: the one at `uniforms` in [0, 1) of the
   distribution at that temperature, or the largest at temperature 0; and its log-probability. Returns as decode. */
EXPORT int palaestra_draw(const float *logits, long stride, long width, long count, const float *temperatures,
                          const double *uniforms, int64_t *ids, float *logprobs, long threads) {
    const long seats = seats_of(threads);
    const long pieces = seats == 1 ? 1 : seats * PIECES < count ? seats * PIECES : count;
    float *scratch = malloc(seats * width * sizeof(float));
    struct draws d = {logits, temperatures, uniforms, ids, logprobs, scratch, stride, width, count, pieces};
    if (!scratch) return 1;
    spread(draws_piece, &d, pieces, seats);
    free(scratch);
    return 0;
}
