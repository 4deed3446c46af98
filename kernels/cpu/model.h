/* The whole step. */

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
