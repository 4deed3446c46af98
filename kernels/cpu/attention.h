/* Attention of one token over what a conversation keeps, in pages. */

/* As floats LANES tokens at most that lie side by side, from `first` on, and how many they are; in `room` where they are kept
   as something else. */
static const float *beside(const struct pages *p, const void *kept, long conversation, long head, long first, long length,
                           float *room, long *count) {
    const long page = p->table[conversation * p->stride + first / p->tokens], at = first % p->tokens;
    const long from = ((page * p->kv_heads + head) * p->tokens + at) * p->dim;
    *count = length - first < p->tokens - at ? length - first : p->tokens - at;
    *count = *count < LANES ? *count : LANES;
    if (p->kind == FLOAT32) return (const float *)kept + from;
    if (p->kind == BFLOAT16)
        for (long i = 0; i < *count * p->dim; i += LANES) store(room + i, bfloat16((const uint16_t *)kept + from + i));
    else
        for (long i = 0; i < *count * p->dim; i += LANES) store(room + i, e4m3((const uint8_t *)kept + from + i));
    return room;
}

/* Scores q k / sqrt(dim) of the queries [group][dim] that share a head of keys -> [group][length]. */
static void score(const struct pages *p, long conversation, long head, const float *q, long length, float *scores) {
    const long group = p->heads / p->kv_heads, dim = p->dim;
    const float scale = p->key_scale / sqrtf(dim);
    float room[LANES * dim];
    for (long first = 0, count; first < length; first += count) {
        const float *keys = beside(p, p->keys, conversation, head, first, length, room, &count);
        for (long of = 0; of < group; of++) {
            vec products[LANES] = {0};
            for (long at = 0; at < count; at++)
                for (long i = 0; i < dim; i += LANES) products[at] += load(q + of * dim + i) * load(keys + at * dim + i);
            const vec found = sums(products) * scale;
            memcpy(scores + of * length + first, &found, count * sizeof(float));
        }
    }
}

INLINE vec load_some(const float *from, long count, float beyond) {
    vec found = splat(beyond);
    memcpy(&found, from, (count < LANES ? count : LANES) * sizeof(float));
    return found;
}

static void softmax(float *scores, long length) {
    vec top = splat(-INFINITY), totals = {0};
    for (long at = 0; at < length; at += LANES) top = larger(load_some(scores + at, length - at, -INFINITY), top);
    float most = top[0];
    for (int lane = 1; lane < LANES; lane++) most = top[lane] > most ? top[lane] : most;
    for (long at = 0; at < length; at += LANES) {
        const vec score = load_some(scores + at, length - at, -INFINITY) - most;
        const vec weight = where(score < splat(-87.f), (vec){0}, exponential(score));
        totals += weight;
        memcpy(scores + at, &weight, (length - at < LANES ? length - at : LANES) * sizeof(float));
    }
    const float inverse = 1 / sum(totals);
    for (long at = 0; at < length; at++) scores[at] *= inverse;
}

/* Values [length][dim] by the probabilities [group][length] -> y [group][dim]. */
static void weigh_values(const struct pages *p, long conversation, long head, const float *scores, long length, float *y) {
    const long group = p->heads / p->kv_heads, dim = p->dim;
    float room[LANES * dim];
    memset(y, 0, group * dim * sizeof(float));
    for (long first = 0, count; first < length; first += count) {
        const float *values = beside(p, p->values, conversation, head, first, length, room, &count);
        for (long of = 0; of < group; of++)
            for (long i = 0; i < dim; i += LANES) {
                vec total = load(y + of * dim + i);
                for (long at = 0; at < count; at++)
                    total += load(values + at * dim + i) * (scores[of * length + first + at] * p->value_scale);
                store(y + of * dim + i, total);
            }
    }
}

/* The queries [group][dim] that share a head of keys and values -> y [group][dim]; `scores`: room for [group][length]. */
static void attend(const struct pages *p, long conversation, long head, const float *q, long length, float *y,
                   float *scores) {
    score(p, conversation, head, q, length, scores);
    for (long of = 0; of < p->heads / p->kv_heads; of++) softmax(scores + of * length, length);
    weigh_values(p, conversation, head, scores, length, y);
}

/* In the whole step a conversation has one page of float32, the row of the cache. */
static void attention(const struct attention *a, const struct past *past, int64_t capacity, const struct batch *batch,
                      const float *x, float *out, float *scratch) {
    const long row = a->qkv.tiles * TILE, wide = (long)a->heads * a->dim, narrow = (long)a->kv_heads * a->dim;
    const long group = a->heads / a->kv_heads * a->dim;
    float *qkv = take(&scratch, batch->count * row), *y = take(&scratch, batch->count * wide);
    full(&a->qkv, x, batch->count, qkv);
    for (long i = 0; i < batch->count; i++) {
        const int32_t page = (int32_t)batch->rows[i];
        const struct pages pages = {past->first, past->second, &page, 0, capacity, 1, 1, FLOAT32, a->heads, a->kv_heads, a->dim};
        for (long head = 0; head < a->kv_heads; head++) {
            const int64_t length = batch->lengths[i], at = ((page * a->kv_heads + head) * capacity + length) * a->dim;
            const float *q = qkv + i * row;
            memcpy(past->first + at, q + wide + head * a->dim, a->dim * sizeof(float));
            memcpy(past->second + at, q + wide + narrow + head * a->dim, a->dim * sizeof(float));
            attend(&pages, 0, head, q + head * group, length + 1, y + i * wide + head * group, scratch);
        }
    }
    full(&a->out, y, batch->count, out);
}
