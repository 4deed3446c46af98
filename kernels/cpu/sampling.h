/* Drawing a token by inverting the distribution function. */

#define CHUNK 128 /* weights that are summed in float32; the chunks are in float64 */

/* The place of the first of the largest. */
static long argmax(const float *values, long width) {
    vec most = splat(values[0]);
    long i = 0;
    for (; i + LANES <= width; i += LANES) most = larger(load(values + i), most);
    float best = values[0];
    for (int lane = 0; lane < LANES; lane++) best = most[lane] > best ? most[lane] : best;
    for (; i < width; i++) best = values[i] > best ? values[i] : best;
    for (i = 0; i < width - 1 && values[i] != best; i++) {}
    return i;
}

/* Weights e^((x - most) / temperature) of a row, 0 where x is -inf. */
static void weigh(const float *x, long width, float most, float inverse, float *weights) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec score = (load(x + i) - most) * inverse;
        store(weights + i, where(score < splat(-87.f), (vec){0}, exponential(score)));
    }
    for (; i < width; i++) weights[i] = expf((x[i] - most) * inverse);
}

static double chunk_sum(const float *weights, long from, long width) {
    const long to = from + CHUNK < width ? from + CHUNK : width;
    vec total = {0};
    long i = from;
    for (; i + LANES <= to; i += LANES) total += load(weights + i);
    float found = sum(total);
    for (; i < to; i++) found += weights[i];
    return found;
}

/* The first token whose cumulative weight is beyond `target`; where rounding lets none be, the last of its chunk, or of
   all, that has any. */
static long invert(const float *weights, long width, double target) {
    double before = 0;
    long from = 0, last = 0;
    for (; from + CHUNK < width; from += CHUNK) {
        double next = before + chunk_sum(weights, from, width);
        if (next > target) break;
        before = next;
    }
    for (long i = from; i < width && i < from + CHUNK; i++) {
        if (weights[i] <= 0) continue;
        last = i;
        before += weights[i];
        if (before > target) return i;
    }
    while (!last && from > 0 && weights[--from] <= 0) {}
    return last ? last : from;
}

static void draw(const float *x, long width, float temperature, double uniform, int64_t *id, float *logprob, float *weights) {
    const float inverse = temperature > 0 ? 1 / temperature : 1;
    const long best = argmax(x, width);
    double total = 0;
    weigh(x, width, x[best], inverse, weights);
    for (long from = 0; from < width; from += CHUNK) total += chunk_sum(weights, from, width);
    *id = temperature > 0 ? invert(weights, width, uniform * total) : best;
    *logprob = (float)((double)((x[*id] - x[best]) * inverse) - log(total));
}
