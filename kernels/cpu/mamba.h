/* Mamba-2: convolution, recurrence, gate and norm, token by token. */

INLINE long conv_width(const struct mamba *m) { return (long)m->heads * m->dim + 2 * m->groups * m->state; }

/* Causal convolution over the window and x [width], then silu, in place; x moves into the window. */
static void convolve(const struct mamba *m, float *window, float *x) {
    const long width = conv_width(m), past = m->kernel - 1;
    for (long i = 0; i < width; i += LANES) {
        vec fresh = load(x + i), total = {0};
        for (long at = 0; at < past; at++) {
            vec old = load(window + at * width + i);
            total += old * load(m->conv + at * width + i);
            if (at) store(window + (at - 1) * width + i, old);
        }
        if (past) store(window + (past - 1) * width + i, fresh);
        total += fresh * load(m->conv + past * width + i);
        total += load(m->conv_bias + i);
        store(x + i, total * sigmoid(total));
    }
}

/* The recurrence of one head: state [dim][state] = decay state + step x B;  y [dim] = state C + d x. */
INLINE void recur(const struct mamba *m, long head, float dt, const float *x, const float *b, const float *c, float *state,
                  float *y) {
    const float decay = expf(dt * m->a[head]);
    const long width = m->state;
    for (long first = 0; first < m->dim; first += LANES) {
        vec products[LANES];
        for (int row = 0; row < LANES; row++) {
            const float in = dt * x[first + row];
            float *s = state + (first + row) * width;
            vec total = {0};
            for (long i = 0; i < width; i += LANES) {
                vec next = load(s + i) * decay + load(b + i) * in;
                store(s + i, next);
                total += next * load(c + i);
            }
            products[row] = total;
        }
        store(y + first, sums(products) + load(x + first) * m->d[head]);
    }
}

static float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

/* One conversation: the parts [z | x B C | dt] of the input projection -> y [heads dim], gated and normalised. */
static void mamba_step(const struct mamba *m, float *parts, float *window, float *state, float eps, float *y) {
    const long inner = (long)m->heads * m->dim, group = inner / m->groups;
    const float *z = parts, *dt = parts + inner + conv_width(m);
    float *x = parts + inner, *b = x + inner, *c = b + (long)m->groups * m->state;
    convolve(m, window, x);
    for (long head = 0; head < m->heads; head++) {
        const long of = head / (m->heads / m->groups) * m->state, size = (long)m->dim * m->state;
        float step = softplus(dt[head] + m->dt_bias[head]);
        recur(m, head, step > m->dt_min ? step : m->dt_min, x + head * m->dim, b + of, c + of, state + head * size,
              y + head * m->dim);
    }
    for (long i = 0; i < inner; i += LANES) store(y + i, load(y + i) * load(z + i) * sigmoid(load(z + i)));
    for (long at = 0; at < inner; at += group) normalise(y + at, m->norm + at, group, eps, y + at);
}

static void mamba(const struct model *model, const struct mamba *m, const struct past *past, const struct batch *batch,
                  const float *x, float *out, float *scratch) {
    const long inner = (long)m->heads * m->dim, width = conv_width(m), row = m->in.tiles * TILE;
    const long size = inner * m->state, window = width * (m->kernel - 1);
    float *parts = take(&scratch, batch->count * row), *y = take(&scratch, batch->count * inner);
    full(&m->in, x, batch->count, parts);
    for (long i = 0; i < batch->count; i++) {
        const int64_t at = batch->rows[i];
        mamba_step(m, parts + i * row, past->first + at * window, past->second + at * size, model->eps, y + i * inner);
    }
    full(&m->out, y, batch->count, out);
}
