/* Mamba-2: convolution, recurrence, gate and norm, token by token. */

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE long conv_width(const struct mamba *m) { return (long)m->heads * m->dim + 2 * m->groups * m->state; }

/* Causal convolution over the window and x, both [width], then silu, to `out` (which may be x): `count` channels from
   `first` on; x moves into the window. */
static void convolve(const struct mamba *m, float *window, const float *x, long first, long count, float *out) {
    const long width = conv_width(m), past = m->kernel - 1;
    for (long i = first; i < first + count; i += LANES) {
        vec fresh = load(x + i), total = {0};
        for (long at = 0; at < past; at++) {
            vec old = load(window + at * width + i);
            total += old * load(m->conv + at * width + i);
            if (at) store(window + (at - 1) * width + i, old);
        }
        if (past) store(window + (past - 1) * width + i, fresh);
        total += fresh * load(m->conv + past * width + i);
        total += load(m->conv_bias + i);
        store(out + i, total * sigmoid(total));
    }
}

/* Random bits for LANES entries from `at` on: a hash of their numbers, the same in every tier. */
INLINE uvec random_bits(uint32_t key, uint32_t at) {
    static const uint32_t LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    uvec x;
    memcpy(&x, LANE, sizeof x);
    x = (x + at) * 0x9e3779b1u ^ key;
    x = (x ^ x >> 16) * 0x21f0aaadu;
    x = (x ^ x >> 15) * 0x735a2d97u;
    return x ^ x >> 15;
}

static uint32_t key_of(uint64_t seed, uint64_t row) { /* of a head in a slot */
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u + row * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)(x >> 32);
}

/* x, further from zero by a random part of the distance of float16 numbers there: to be cut off. */
INLINE vec raised(vec x, uvec noise) {
    const uvec power = (uvec)x & 0x7f800000u, least = (uvec){0} + 0x38800000u; /* 2^-14, below which they are even */
    const uvec normal = (uvec)(power > least);
    const vec unit = (vec)(((power & normal) | (least & ~normal)) - (10u << 23));
    const vec part = __builtin_convertvector((ivec)(noise >> 19), vec) * 0x1p-13f;
    return (vec)((uvec)((vec)((uvec)x & 0x7fffffffu) + unit * part) | ((uvec)x & 0x80000000u));
}

/* LANES entries of a state from `at` on. */
INLINE vec state_load(const void *state, long at, int kind) {
    if (kind == FLOAT32) return load((const float *)state + at);
    return kind == BFLOAT16 ? bfloat16((const uint16_t *)state + at) : float16((const uint16_t *)state + at);
}

/* A state of 16 bits is rounded away from zero with the probability of the part that is cut off. */
INLINE void state_store(void *state, long at, vec x, int kind, uint32_t key) {
    if (kind == FLOAT32) {
        store((float *)state + at, x);
        return;
    }
    const uvec noise = random_bits(key, (uint32_t)at);
    if (kind == FLOAT16) {
        store_float16((uint16_t *)state + at, raised(x, noise));
        return;
    }
    const halves found = __builtin_convertvector(((uvec)x + (noise >> 16)) >> 16, halves);
    memcpy((uint16_t *)state + at, &found, sizeof found);
}

/* The state of one conversation at one head: its entry 0, how it is kept, what rounds it. */
struct head_state {
    void *state;
    int kind;
    uint32_t key;
};

#define PAGE 4096 /* bytes: hardware fetches ahead within one, and every fourth line of the next one sets it going there */

/* The recurrence of one head: state [dim][state] = decay state + step x B;  y [dim] = state C + d x. */
INLINE void recur_as(const struct mamba *m, long head, float dt, const float *x, const float *b, const float *c,
                     struct head_state kept, int kind, float *y) {
    const float decay = expf(dt * m->a[head]);
    const long width = m->state;
    for (long first = 0; first < m->dim; first += LANES) {
        vec products[LANES];
        for (int row = 0; row < LANES; row++) {
            const float in = dt * x[first + row];
            const long at = (first + row) * width;
            vec total = {0};
            for (long i = 0; i < width; i += LANES) {
                if (i % 64 == 0) __builtin_prefetch((char *)kept.state + (at + i) * (kind == FLOAT32 ? 4 : 2) + PAGE, 0, 2);
                vec next = state_load(kept.state, at + i, kind) * decay + load(b + i) * in;
                state_store(kept.state, at + i, next, kind, kept.key);
                total += next * load(c + i);
            }
            products[row] = total;
        }
        store(y + first, sums(products) + load(x + first) * m->d[head]);
    }
}

static void recur(const struct mamba *m, long head, float dt, const float *x, const float *b, const float *c,
                  struct head_state kept, float *y) {
    switch (kept.kind) {
    case BFLOAT16: recur_as(m, head, dt, x, b, c, kept, BFLOAT16, y); break;
    case FLOAT16: recur_as(m, head, dt, x, b, c, kept, FLOAT16, y); break;
    default: recur_as(m, head, dt, x, b, c, kept, FLOAT32, y);
    }
}

static float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

static void *state_of(const struct mamba_step *s, int64_t row) { /* one head's, of all slots' heads */
    const struct mamba *m = s->mamba;
    return (char *)s->kept.states + row * m->dim * m->state * (s->kept.kind == FLOAT32 ? 4 : 2);
}

/* One token, one group: the parts [z | x B C | dt] of the input projection -> y, gated and normalised. `convolved`
   [width] may be the parts' own x B C. */
static void mamba_group(const struct mamba_step *s, long token, long group, float *convolved) {
    const struct mamba *m = s->mamba;
    const long inner = (long)m->heads * m->dim, width = conv_width(m), heads = m->heads / m->groups, share = heads * m->dim;
    const float *z = s->parts + token * s->stride, *x = z + inner, *dt = x + width;
    const long of_b = inner + group * m->state, of_c = of_b + (long)m->groups * m->state, first = group * share;
    float *window = s->kept.windows + s->slots[token] * width * (m->kernel - 1), *y = s->y + token * inner;
    convolve(m, window, x, first, share, convolved);
    convolve(m, window, x, of_b, m->state, convolved);
    convolve(m, window, x, of_c, m->state, convolved);
    for (long head = group * heads; head < (group + 1) * heads; head++) {
        const float step = softplus(dt[head] + m->dt_bias[head]);
        const int64_t row = s->slots[token] * m->heads + head;
        const struct head_state kept = {state_of(s, row), s->kept.kind, key_of(s->seed, row)};
        recur(m, head, step > m->dt_min ? step : m->dt_min, convolved + head * m->dim, convolved + of_b, convolved + of_c,
              kept, y + head * m->dim);
    }
    for (long i = first; i < first + share; i += LANES) store(y + i, load(y + i) * load(z + i) * sigmoid(load(z + i)));
    normalise(y + first, m->norm + first, share, s->eps, y + first);
}

static void mamba_part(const void *work, long piece, float *scratch) {
    const struct mamba_step *s = work;
    mamba_group(s, piece / s->mamba->groups, piece % s->mamba->groups, scratch);
}

static void mamba(const struct model *model, const struct mamba *m, const struct past *past, const struct batch *batch,
                  const float *x, float *out, float *scratch) {
    const long inner = (long)m->heads * m->dim, row = m->in.tiles * TILE;
    float *parts = take(&scratch, batch->count * row), *y = take(&scratch, batch->count * inner);
    const struct mamba_step s = {.mamba = m, .parts = parts, .stride = row, .y = y, .slots = batch->rows,
                                 .kept = {past->first, past->second, 0, FLOAT32}, .eps = model->eps};
    full(&m->in, x, batch->count, parts);
    for (long i = 0; i < batch->count; i++)
        for (long group = 0; group < m->groups; group++) mamba_group(&s, i, group, parts + i * row + inner);
    full(&m->out, y, batch->count, out);
}
