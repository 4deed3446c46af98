/* The layers of a hybrid model, token by token: what a conversation's state is owes nothing to how many of its tokens came
   at once. Rows of activations are float32 and lie their own width apart. Every width is a multiple of 16. */

INLINE float *take(float **scratch, long count) {
    float *found = *scratch;
    *scratch += (count + 15) / 16 * 16;
    return found;
}

INLINE void full(const struct matrix *w, const float *x, long rows, float *y) { /* rows of y are padded to whole tiles */
    multiply(w, 0, w->tiles, x, w->columns, rows, y, w->tiles * TILE);
}

INLINE float mean_square(const float *x, long width) {
    vec total = {0};
    for (long i = 0; i < width; i += LANES) total += load(x + i) * load(x + i);
    return sum(total) / width;
}

static void normalise(const float *x, const float *weight, long width, float eps, float *y) {
    float scale = 1 / sqrtf(mean_square(x, width) + eps);
    for (long i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

static void add(float *x, const float *y, long count) {
    for (long i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

static void relu_squared(float *x, long count) {
    for (long i = 0; i < count; i += LANES) {
        vec value = larger(load(x + i), (vec){0});
        store(x + i, value * value);
    }
}

/* ---- Mamba-2 */

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

/* ---- attention */

/* Scores [group][length] of a group of queries with their shared keys [length][dim], as probabilities. */
static void attend_scores(const float *q, const float *keys, long group, long dim, long length, float *scores) {
    const float scale = 1 / sqrtf(dim);
    for (long head = 0; head < group; head++) {
        float *row = scores + head * length, most = -INFINITY;
        for (long first = 0; first < length; first += LANES) {
            vec products[LANES] = {0};
            for (long at = 0; at < LANES && first + at < length; at++)
                for (long i = 0; i < dim; i += LANES)
                    products[at] += load(q + head * dim + i) * load(keys + (first + at) * dim + i);
            vec found = sums(products) * scale;
            for (long at = 0; at < LANES && first + at < length; at++) {
                row[first + at] = found[at];
                if (found[at] > most) most = found[at];
            }
        }
        float total = 0;
        for (long at = 0; at < length; at++) total += row[at] = expf(row[at] - most);
        for (long at = 0; at < length; at++) row[at] /= total;
    }
}

static void attend(const struct attention *a, const float *q, const float *keys, const float *values, long length, float *y,
                   float *scores) {
    const long group = a->heads / a->kv_heads, dim = a->dim;
    attend_scores(q, keys, group, dim, length, scores);
    for (long head = 0; head < group; head++)
        for (long i = 0; i < dim; i += LANES) {
            vec total = {0};
            for (long at = 0; at < length; at++) total += load(values + at * dim + i) * scores[head * length + at];
            store(y + head * dim + i, total);
        }
}

static void attention(const struct attention *a, const struct past *past, int64_t capacity, const struct batch *batch,
                      const float *x, float *out, float *scratch) {
    const long row = a->qkv.tiles * TILE, wide = (long)a->heads * a->dim, narrow = (long)a->kv_heads * a->dim;
    const long group = a->heads / a->kv_heads * a->dim;
    float *qkv = take(&scratch, batch->count * row), *y = take(&scratch, batch->count * wide);
    full(&a->qkv, x, batch->count, qkv);
    for (long i = 0; i < batch->count; i++)
        for (long head = 0; head < a->kv_heads; head++) {
            const int64_t length = batch->lengths[i], from = (batch->rows[i] * a->kv_heads + head) * capacity * a->dim;
            const float *q = qkv + i * row;
            float *keys = past->first + from, *values = past->second + from;
            memcpy(keys + length * a->dim, q + wide + head * a->dim, a->dim * sizeof(float));
            memcpy(values + length * a->dim, q + wide + narrow + head * a->dim, a->dim * sizeof(float));
            attend(a, q + head * group, keys, values, length + 1, y + i * wide + head * group, scratch);
        }
    full(&a->out, y, batch->count, out);
}

/* ---- mixture of experts */

static void mlp(const struct mlp *m, const float *x, long rows, float *out, float *scratch) {
    float *inner = take(&scratch, rows * m->up.tiles * TILE);
    full(&m->up, x, rows, inner);
    relu_squared(inner, rows * m->up.tiles * TILE);
    full(&m->down, inner, rows, out);
}

/* The place of the largest, the first of equals. */
INLINE long largest(const float *values, long count) {
    long best = 0;
    for (long at = 1; at < count; at++)
        if (values[at] > values[best]) best = at;
    return best;
}

/* Only experts of the best groups, by their two best scores, keep theirs; the others have 0. */
static void within_groups(const struct moe *m, float *scores) {
    const long size = m->count / m->groups;
    float best[m->groups];
    char keep[m->groups];
    memset(keep, 0, m->groups);
    for (long group = 0; group < m->groups; group++) {
        const float *of = scores + group * size;
        long first = largest(of, size);
        float second = -INFINITY;
        for (long at = 0; at < size; at++)
            if (at != first && of[at] > second) second = of[at];
        best[group] = of[first] + second;
    }
    for (long time = 0; time < m->top_groups; time++) {
        long group = largest(best, m->groups);
        keep[group] = 1;
        best[group] = -INFINITY;
    }
    for (long at = 0; at < m->count; at++)
        if (!keep[at / size]) scores[at] = 0;
}

/* The gate's outputs [count] of a row -> the weight of every expert [count], 0 for those not chosen. */
static void route(const struct moe *m, float *gate, float *weights) {
    float choice[m->count], total = 0;
    for (long at = 0; at < m->count; at++) {
        gate[at] = 1 / (1 + expf(-gate[at]));
        choice[at] = gate[at] + m->bias[at];
        weights[at] = 0;
    }
    if (m->groups > 1) within_groups(m, choice);
    for (long time = 0; time < m->top; time++) {
        long best = largest(choice, m->count);
        choice[best] = -INFINITY;
        weights[best] = gate[best];
        total += gate[best];
    }
    const float factor = m->factor / (m->normalise ? total + 1e-20f : 1);
    for (long at = 0; at < m->count; at++) weights[at] *= factor;
}

/* Adds one expert's outputs to those rows of `out` that chose it; rows of x and out are `width` wide. */
static void expert(const struct moe *m, long index, const float *weights, const float *x, long rows, long width, float *out,
                   float *scratch) {
    const struct mlp *of = m->experts + index;
    long chosen[rows], count = 0;
    for (long row = 0; row < rows; row++)
        if (weights[row * m->count + index] != 0) chosen[count++] = row;
    if (!count) return;
    float *in = take(&scratch, count * width), *back = take(&scratch, count * width);
    for (long at = 0; at < count; at++) memcpy(in + at * width, x + chosen[at] * width, width * sizeof(float));
    mlp(of, in, count, back, scratch);
    for (long at = 0; at < count; at++) {
        const float by = weights[chosen[at] * m->count + index];
        float *row = out + chosen[at] * width;
        for (long i = 0; i < width; i += LANES) store(row + i, load(row + i) + load(back + at * width + i) * by);
    }
}

static void moe(const struct moe *m, const float *x, long rows, long hidden, float *out, float *scratch) {
    const long width = m->into.tiles ? m->into.tiles * TILE : hidden, scores = m->gate.tiles * TILE;
    float *gate = take(&scratch, rows * scores), *weights = take(&scratch, rows * m->count);
    float *latent = take(&scratch, rows * width), *routed = take(&scratch, rows * width), *side = take(&scratch, rows * hidden);
    full(&m->gate, x, rows, gate);
    for (long row = 0; row < rows; row++) route(m, gate + row * scores, weights + row * m->count);
    if (m->into.tiles) full(&m->into, x, rows, latent);
    memset(routed, 0, rows * width * sizeof(float));
    for (long index = 0; index < m->count; index++)
        expert(m, index, weights, m->into.tiles ? latent : x, rows, width, routed, scratch);
    if (m->back.tiles) full(&m->back, routed, rows, out);
    else memcpy(out, routed, rows * hidden * sizeof(float));
    mlp(&m->shared, x, rows, side, scratch);
    add(out, side, rows * hidden);
}

/* ---- the whole step */

static void decode(const struct model *model, const struct cache *cache, const struct batch *batch, float *scratch) {
    const long rows = batch->count, hidden = model->hidden;
    float *x = take(&scratch, rows * hidden), *normed = take(&scratch, rows * hidden), *out = take(&scratch, rows * hidden);
    for (long i = 0; i < rows; i++) memcpy(x + i * hidden, model->embeddings + batch->ids[i] * hidden, hidden * sizeof(float));
    for (long index = 0; index < model->count; index++) {
        const struct layer *layer = model->layers + index;
        for (long i = 0; i < rows; i++) normalise(x + i * hidden, layer->norm, hidden, model->eps, normed + i * hidden);
        switch (layer->letter) {
        case 'M': mamba(model, layer->mixer, cache->layers + index, batch, normed, out, scratch); break;
        case '*': attention(layer->mixer, cache->layers + index, cache->capacity, batch, normed, out, scratch); break;
        case 'E': moe(layer->mixer, normed, rows, hidden, out, scratch); break;
        default: mlp(layer->mixer, normed, rows, out, scratch);
        }
        add(x, out, rows * hidden);
    }
    long wanted = 0;
    for (long i = 0; i < rows; i++)
        if (batch->wanted[i]) normalise(x + i * hidden, model->norm, hidden, model->eps, normed + wanted++ * hidden);
    multiply(&model->head, 0, model->head.tiles, normed, hidden, wanted, batch->logits, batch->stride);
}
