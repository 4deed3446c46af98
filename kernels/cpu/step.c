/* The decode step on threads. */
#include "native.h"

#include <stdlib.h>

static long mlp_room(const struct mlp *m, long rows) { return padded(rows * m->up.tiles * TILE); }

/* Floats that one layer needs beside its input and output, for `rows` conversations of up to `length` tokens. */
static long layer_room(const struct layer *layer, long rows, long hidden, long length) {
    if (layer->letter == 'M') {
        const struct mamba *m = layer->mixer;
        return padded(rows * m->in.tiles * TILE) + padded(rows * (long)m->heads * m->dim);
    }
    if (layer->letter == '*') {
        const struct attention *a = layer->mixer;
        return padded(rows * a->qkv.tiles * TILE) + padded(rows * (long)a->heads * a->dim)
            + padded(a->heads / a->kv_heads * (length + 1));
    }
    if (layer->letter != 'E') return mlp_room(layer->mixer, rows);
    const struct moe *m = layer->mixer;
    const long width = m->into.tiles ? m->into.tiles * TILE : hidden;
    long inner = mlp_room(&m->shared, rows), routed = 2 * padded(rows * width) + mlp_room(m->experts, rows);
    return padded(rows * m->gate.tiles * TILE) + padded(rows * m->count) + 2 * padded(rows * width) + padded(rows * hidden)
        + (inner > routed ? inner : routed);
}

static long room(const struct model *model, long rows, long length) {
    long most = 0;
    for (long i = 0; i < model->count; i++) {
        long found = layer_room(model->layers + i, rows, model->hidden, length);
        most = found > most ? found : most;
    }
    return most + 3 * padded(rows * model->hidden);
}

#define TOGETHER 8 /* tokens at least that share the weights' way through a core, where there are many */

struct step {
    const struct model *model;
    const struct cache *cache;
    const struct batch *batch;
    float *scratch;
    long room, pieces;
};

/* Where a piece begins: no conversation is divided. */
static long boundary(const struct batch *batch, long index, long pieces) {
    long at = batch->count * index / pieces;
    while (at > 0 && at < batch->count && batch->rows[at] == batch->rows[at - 1]) at++;
    return at;
}

static void step_piece(void *work, long index, long thread) { /* some of the conversations, through all layers */
    const struct step *s = work;
    const struct batch *all = s->batch;
    const long first = boundary(all, index, s->pieces), last = boundary(all, index + 1, s->pieces);
    long wanted = 0;
    for (long i = 0; i < first; i++) wanted += all->wanted[i];
    struct batch part = {all->ids + first, all->rows + first, all->lengths + first, all->wanted + first,
                         all->logits + wanted * all->stride, last - first, all->stride};
    if (last > first) tier->decode(s->model, s->cache, &part, s->scratch + thread * s->room);
}

static long longest_piece(const struct batch *batch, long pieces) {
    long found = 0;
    for (long index = 0; index < pieces; index++) {
        const long size = boundary(batch, index + 1, pieces) - boundary(batch, index, pieces);
        found = size > found ? size : found;
    }
    return found;
}

/* The batch's tokens through all layers. Returns 0, or 1 where memory for it cannot be had. */
EXPORT int palaestra_decode(const struct model *model, const struct cache *cache, const struct batch *batch, long threads) {
    const long count = batch->count, seats = seats_of(threads);
    long pieces = seats < count ? seats : count, length = 0;
    if (!count) return 0;
    if (seats > 1 && count >= 2 * pieces * TOGETHER)
        pieces = count / TOGETHER < seats * PIECES ? count / TOGETHER : seats * PIECES;
    for (long i = 0; i < count; i++) length = batch->lengths[i] > length ? batch->lengths[i] : length;
    struct step s = {model, cache, batch, NULL, room(model, longest_piece(batch, pieces), length), pieces};
    if (posix_memalign((void **)&s.scratch, 64, s.room * seats * sizeof(float))) return 1;
    spread(step_piece, &s, pieces, seats);
    free(s.scratch);
    return 0;
}
