/* Attention over the cache, token by token. */

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
