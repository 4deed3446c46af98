/* What Python calls (kernels/native.py): the choice of a tier, packing, products and the decode step on threads. */
#include "records.h"

#include <stdlib.h>
#include <string.h>

#include "threads.h"

#define EXPORT __attribute__((visibility("default")))

static const struct operations *tier;

/* The tiers of this machine, the best first. */
static const struct operations *const *known(void) {
    static const struct operations *found[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq"))
        found[count++] = &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &avx2;
#endif
    found[count] = &portable;
    return found;
}

/* Use the tier of that name (NULL: the best). Returns its name, or NULL if this machine has no such tier. */
EXPORT const char *palaestra_use(const char *name) {
    for (const struct operations *const *at = known(); *at; at++)
        if (!name || !strcmp((*at)->name, name)) return (tier = *at)->name;
    return NULL;
}

/* ---- packing into tiles (records.h) */

static uint32_t word(const uint8_t *four) { /* eight codes, two a byte, the even column low -> the even ones, the odd ones */
    uint32_t found = 0;
    for (int i = 0; i < 4; i++) found |= (uint32_t)(four[i] & 15) << 4 * i | (uint32_t)(four[i] >> 4) << (16 + 4 * i);
    return found;
}

/* codes uint8[rows][columns / 2], scales uint8[rows][columns / 16] -> the same in tiles, which are zero before. */
EXPORT void palaestra_pack_nvfp4(const uint8_t *codes, const uint8_t *scales, long rows, long columns, uint32_t *words,
                                 uint8_t *steps) {
    const long blocks = columns / BLOCK;
    for (long row = 0; row < rows; row++)
        for (long block = 0; block < blocks; block++) {
            const long at = (row / TILE * blocks + block) * TILE + row % TILE;
            const uint8_t *from = codes + row * columns / 2 + block * 8;
            steps[at] = scales[row * blocks + block];
            words[(row / TILE * blocks + block) * 2 * TILE + row % TILE] = word(from);
            words[((row / TILE * blocks + block) * 2 + 1) * TILE + row % TILE] = word(from + 4);
        }
}

/* entries [rows][columns] of `size` bytes (1, 2 or 4) -> [tiles][columns][16]. */
EXPORT void palaestra_pack(const char *entries, long rows, long columns, long size, char *to) {
    for (long row = 0; row < rows; row++)
        for (long column = 0; column < columns; column++)
            memcpy(to + ((row / TILE * columns + column) * TILE + row % TILE) * size,
                   entries + (row * columns + column) * size, size);
}

/* ---- products */

#define PIECES 4 /* a thread, so that one that is held up leaves its share to the others */

static long pieces_of(const struct matrix *w, long threads) {
    return threads < 2 ? 1 : threads * PIECES < w->tiles ? threads * PIECES : w->tiles;
}

struct product {
    const struct matrix *w;
    const float *x;
    float *y;
    long stride, rows, y_stride, pieces;
};

static void product_piece(void *work, long index, long thread) {
    const struct product *p = work;
    (void)thread;
    tier->multiply(p->w, p->w->tiles * index / p->pieces, p->w->tiles * (index + 1) / p->pieces, p->x, p->stride, p->rows,
                   p->y, p->y_stride);
}

/* float32 x [rows][columns] -> y [rows][16 tiles]. */
EXPORT void palaestra_multiply(const struct matrix *w, const float *x, long rows, float *y, long threads) {
    const long pieces = pieces_of(w, threads);
    struct product p = {w, x, y, w->columns, rows, w->tiles * TILE, pieces};
    spread(product_piece, &p, pieces, threads);
}

struct int8_product {
    const struct matrix *w;
    const struct bytes *x;
    float *y;
    long rows, pieces;
};

static void int8_piece(void *work, long index, long thread) {
    const struct int8_product *p = work;
    (void)thread;
    tier->multiply_int8(p->w, p->w->tiles * index / p->pieces, p->w->tiles * (index + 1) / p->pieces, p->x, p->rows, p->y,
                        p->w->tiles * TILE);
}

/* The same for NVFP4 weights, x being rounded to int8 first. Returns 0, or 1 where memory for that cannot be had. */
EXPORT int palaestra_multiply_int8(const struct matrix *w, const float *x, long rows, float *y, long threads) {
    const long blocks = rows * (w->columns / BLOCK), pieces = pieces_of(w, threads);
    struct bytes *room = malloc((blocks ? blocks : 1) * sizeof *room);
    struct int8_product p = {w, room, y, rows, pieces};
    if (!room) return 1;
    tier->to_bytes(x, blocks, room);
    spread(int8_piece, &p, pieces, threads);
    free(room);
    return 0;
}

/* ---- the decode step */

static long padded(long count) { return (count + 15) / 16 * 16; }

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
    const long count = batch->count, seats = threads < 1 ? 1 : threads < THREADS_MOST ? threads : THREADS_MOST;
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

/* ---- sampling */

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
    const long seats = threads < 1 ? 1 : threads < THREADS_MOST ? threads : THREADS_MOST;
    const long pieces = seats == 1 ? 1 : seats * PIECES < count ? seats * PIECES : count;
    float *scratch = malloc(seats * width * sizeof(float));
    struct draws d = {logits, temperatures, uniforms, ids, logprobs, scratch, stride, width, count, pieces};
    if (!scratch) return 1;
    spread(draws_piece, &d, pieces, seats);
    free(scratch);
    return 0;
}
