/* MLPs, and mixtures of them. */

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

/* The gate's outputs [count] of a row, which become its scores -> the chosen experts [top], the best first, and their
   weights. */
static void route(const struct moe *m, float *gate, int64_t *chosen, float *weights) {
    float choice[m->count], total = 0;
    for (long at = 0; at < m->count; at++) {
        gate[at] = 1 / (1 + expf(-gate[at]));
        choice[at] = gate[at] + m->bias[at];
    }
    if (m->groups > 1) within_groups(m, choice);
    for (long time = 0; time < m->top; time++) {
        const long best = largest(choice, m->count);
        choice[best] = -INFINITY;
        chosen[time] = best;
        total += weights[time] = gate[best];
    }
    const float factor = m->factor / (m->normalise ? total + 1e-20f : 1);
    for (long time = 0; time < m->top; time++) weights[time] *= factor;
}

/* One expert's outputs [count][width] for those rows of x [][width] that chose it. */
static void expert(const struct mlp *of, const float *x, long width, const int32_t *chosen, long count, float *out,
                   float *scratch) {
    float *in = take(&scratch, count * width);
    for (long at = 0; at < count; at++) memcpy(in + at * width, x + chosen[at] * width, width * sizeof(float));
    mlp(of, in, count, out, scratch);
}

/* Adds an expert's outputs to the rows of `out` that chose it, times its weight there. */
static void scatter(const float *from, const int32_t *chosen, long count, const float *weights, long stride, long width,
                    float *out) {
    for (long at = 0; at < count; at++) {
        const float by = weights[chosen[at] * stride];
        float *row = out + chosen[at] * width;
        for (long i = 0; i < width; i += LANES) store(row + i, load(row + i) + load(from + at * width + i) * by);
    }
}

static void moe(const struct moe *m, const float *x, long rows, long hidden, float *out, float *scratch) {
    const long width = m->into.tiles ? m->into.tiles * TILE : hidden, scores = m->gate.tiles * TILE;
    float *gate = take(&scratch, rows * scores), *weights = take(&scratch, rows * m->count);
    float *latent = take(&scratch, rows * width), *routed = take(&scratch, rows * width), *side = take(&scratch, rows * hidden);
    full(&m->gate, x, rows, gate);
    memset(weights, 0, rows * m->count * sizeof(float));
    for (long row = 0; row < rows; row++) {
        int64_t chosen[m->top];
        float by[m->top];
        route(m, gate + row * scores, chosen, by);
        for (long time = 0; time < m->top; time++) weights[row * m->count + chosen[time]] = by[time];
    }
    if (m->into.tiles) full(&m->into, x, rows, latent);
    memset(routed, 0, rows * width * sizeof(float));
    for (long index = 0; index < m->count; index++) {
        int32_t chosen[rows];
        const long count = choosing(weights + index, m->count, rows, chosen);
        if (!count) continue;
        float *back = scratch;
        expert(m->experts + index, m->into.tiles ? latent : x, width, chosen, count, back, scratch + padded(count * width));
        scatter(back, chosen, count, weights + index, m->count, width, routed);
    }
    if (m->back.tiles) full(&m->back, routed, rows, out);
    else memcpy(out, routed, rows * hidden * sizeof(float));
    mlp(&m->shared, x, rows, side, scratch);
    add(out, side, rows * hidden);
}
