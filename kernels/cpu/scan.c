/* Mamba-2 over sequences, and for a token each of several conversations, on threads. */
#include "native.h"

#include <stdlib.h>

/* `count` parts of some work, divided among pieces; each thread has its own scratch. */
struct parts {
    const void *work;
    part function;
    float *scratch;
    long room, count, pieces;
};

static void parts_piece(void *work, long index, long thread) {
    const struct parts *p = work;
    for (long at = p->count * index / p->pieces; at < p->count * (index + 1) / p->pieces; at++)
        p->function(p->work, at, p->scratch + thread * p->room);
}

/* Returns 0, or 1 where memory for it cannot be had: `room` floats a thread. */
static int share_out(part function, const void *work, long count, long room, long threads) {
    const long seats = seats_of(threads);
    struct parts p = {work, function, NULL, padded(room), count, seats * PIECES < count ? seats * PIECES : count};
    if (posix_memalign((void **)&p.scratch, 64, seats * p.room * sizeof(float))) return 1;
    spread(parts_piece, &p, p.pieces, seats);
    free(p.scratch);
    return 0;
}

/* Floats that a share of heads needs: a span of every operand, the states, what the way on leaves for the way back. */
static long scan_room(const struct scan *s) {
    const long heads = s->heads / (s->groups * s->shares), states = padded(heads * s->dim * s->state);
    const long forward = 2 * padded(ROOM * s->state) + 2 * padded(ROOM * s->dim) + states;
    if (!s->dy) return forward;
    return forward + 2 * padded(ROOM * s->state) + padded(ROOM * s->dim) + states + padded(heads * s->length)
        + (s->length + SPAN - 1) / SPAN * states + padded(heads * 4);
}

static int scan(part function, const struct scan *s, long threads) {
    return share_out(function, s, s->batch * s->groups * s->shares, scan_room(s), threads);
}

EXPORT int palaestra_scan_forward(const struct scan *s, long threads) { return scan(tier->scan_forward, s, threads); }

EXPORT int palaestra_scan_backward(const struct scan *s, long threads) { return scan(tier->scan_backward, s, threads); }

static int convolution(part function, const struct convolution *c, long threads) {
    const long parts = (c->width + CHANNELS - 1) / CHANNELS, room = 2 * padded((c->kernel + 1) * CHANNELS);
    return share_out(function, c, c->batch * parts, room, threads);
}

EXPORT int palaestra_convolution_forward(const struct convolution *c, long threads) {
    return convolution(tier->convolution_forward, c, threads);
}

EXPORT int palaestra_convolution_backward(const struct convolution *c, long threads) {
    return convolution(tier->convolution_backward, c, threads);
}

static int gate(part function, const struct gate *g, long threads) {
    return share_out(function, g, (g->rows + GATE_ROWS - 1) / GATE_ROWS, g->width / g->groups, threads);
}

EXPORT int palaestra_gate_forward(const struct gate *g, long threads) { return gate(tier->gate_forward, g, threads); }

EXPORT int palaestra_gate_backward(const struct gate *g, long threads) { return gate(tier->gate_backward, g, threads); }

/* Returns NO_SLOT, too, where a slot is none of those that there are. */
EXPORT int palaestra_mamba_step(const struct mamba_step *s, long threads) {
    const struct mamba *m = s->mamba;
    const long width = (long)m->heads * m->dim + 2 * m->groups * m->state;
    for (long i = 0; i < s->count; i++)
        if (s->slots[i] < 0 || s->slots[i] >= s->kept.count) return NO_SLOT;
    return share_out(tier->mamba_part, s, s->count * m->groups, width, threads);
}
