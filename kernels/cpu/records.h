/* The records that cross between Python (kernels/native.py mirrors them) and C. All pointers are borrowed. */
#ifndef RECORDS_H
#define RECORDS_H

#include <stdint.h>

#define TILE 16  /* rows of a matrix that are computed side by side */
#define BLOCK 16 /* columns under one NVFP4 scale */
#define SPAN 64  /* tokens of a sequence that the recurrence lays out at a time, as [width / LANES][ROOM][LANES] */
#define ROOM (SPAN + 1) /* a power of two would have a token's parts compete for the same places in the cache */

enum kind { NVFP4, FLOAT32, BFLOAT16, FP8, INT8, FLOAT16 }; /* of weights, activations, states */

/* A weight [16 tiles, columns], the rows beyond those of the original zero.
   NVFP4: data uint32[tiles][columns / 16][2][16], a word for 8 columns of a row: nibbles 0 to 3 the even columns, 4 to 7
   the odd ones; scales E4M3 [tiles][columns / 16][16].  Others: data [tiles][columns][16].
   scale: the global scale of NVFP4 and FP8. */
struct matrix {
    const void *data;
    const uint8_t *scales;
    float scale;
    int32_t kind, tiles, columns;
};

struct mamba {
    struct matrix in, out;
    const float *conv, *conv_bias; /* [kernel][width], [width] */
    const float *dt_bias, *a, *d, *norm; /* [heads], [heads] (negative), [heads], [heads dim] */
    int32_t heads, dim, state, groups, kernel;
    float dt_min; /* time steps are clamped from below; 0: as they are */
};

struct attention {
    struct matrix qkv, out; /* the rows of q, k, v, one after the other */
    int32_t heads, kv_heads, dim;
};

struct mlp {
    struct matrix up, down;
};

struct moe {
    struct matrix gate, into, back; /* into and back: to the latent space and from it; no tiles where there is none */
    const struct mlp *experts;
    struct mlp shared;
    const float *bias; /* [count], of the choice alone */
    int32_t count, top, groups, top_groups, normalise;
    float factor;
};

struct layer {
    int32_t letter; /* of the pattern: M * E - */
    const float *norm; /* [hidden] */
    const void *mixer;
};

struct model {
    const struct layer *layers;
    const float *embeddings, *norm; /* [vocabulary][hidden], [hidden] */
    struct matrix head;
    int32_t count, hidden;
    float eps;
};

/* Per layer, [rows] of: M: first [kernel - 1][conv width] the last inputs, second [heads][dim][state];
   *: first, second [kv heads][capacity][dim] keys and values. */
struct past {
    float *first, *second;
};

struct cache {
    const struct past *layers;
    int64_t capacity;
};

/* Keys and values of many conversations, FLOAT32, BFLOAT16 or FP8 times a scale: [pages][kv heads][tokens][dim]. The pages
   of conversation i, in their order: table[i][stride]. */
struct pages {
    const void *keys, *values;
    const int32_t *table;
    int64_t stride, tokens;
    float key_scale, value_scale;
    int32_t kind, heads, kv_heads, dim;
};

/* Tokens of conversations: which they are, the conversations' rows in the cache, how many tokens those hold before each.
   A conversation's tokens stand one after the other. Logits [wanted tokens][stride] are computed for those that `wanted`
   marks. */
struct batch {
    const int64_t *ids, *rows, *lengths;
    const uint8_t *wanted;
    float *logits;
    int64_t count, stride;
};

/* 16 activations as int8, in the order in which the kernels meet the columns; what the offset of the weights' codes adds to
   every dot product with them; their scale, which they share with the blocks of their group. */
struct bytes {
    int8_t values[BLOCK];
    int32_t offset;
    float scale;
    int32_t unused[2];
};

/* The random Hadamard transform of blocks of 16, 32, 64 or 128 values (size 0: none), with signs [size]. */
struct rotation {
    const float *signs;
    int32_t size, inverse;
};

#define PATCH 256 /* columns that are quantised at once: a multiple of every transform's size and of every tier's lanes */

/* A stack x [matrices][rows][columns], transformed first where there is a rotation, and the NVFP4 that is made of it: codes
   [..][columns / 2] and E4M3 scales [..][columns / 16]; or, where there is room for them, their values [..][columns].
   scale2 [matrices]: the global scales; `bound`: the largest block scale by which they are found, 0: they are given.
   multiples [candidates]: of amax / 6, among which a scale is that of the least squared error.
   amax [matrices]: zero, then the bits of the largest magnitudes. */
struct quantising {
    const float *x, *multiples;
    float *scale2, *values;
    uint8_t *codes, *scales;
    int32_t *amax;
    struct rotation rotation;
    uint64_t seed; /* of the draws of stochastic rounding */
    int64_t matrices, rows, columns;
    float bound;
    int32_t candidates, square, stochastic;
};

enum refusal { NONE, NOT_FINITE, NO_FIT };

static inline long padded(long count) { return (count + 15) / 16 * 16; }

/* The rows that chose an expert: those where its weights, `stride` apart, are not 0. Returns how many. */
static inline long choosing(const float *weights, long stride, long rows, int32_t *chosen) {
    long count = 0;
    for (long row = 0; row < rows; row++)
        if (weights[row * stride] != 0) chosen[count++] = (int32_t)row;
    return count;
}
/* What conversations keep of a Mamba-2 mixer: windows [count][kernel - 1][width]; states [count][heads][dim][state],
   FLOAT32, or BFLOAT16 or FLOAT16 with stochastic rounding. */
struct kept {
    float *windows;
    void *states;
    int64_t count;
    int32_t kind;
};

#define NO_SLOT 2

/* A token each of `count` conversations through a Mamba-2 mixer, its projections aside; what they keep is brought forward.
   Rounding is by a hash of the seed, the slot, and the entry's place. */
struct mamba_step {
    const struct mamba *mamba;
    const float *parts; /* [count] rows `stride` apart: z, x, B, C, dt of the input projection */
    float *y; /* [count][heads dim] */
    const int64_t *slots; /* [count], all different */
    struct kept kept;
    int64_t count, stride;
    uint64_t seed;
    float eps;
};

/* The Mamba-2 recurrence over right-padded sequences: a token of dt 0 changes no state, one that `starts` marks begins with
   a state of zeros. Forward writes y and last; backward reads dy and dlast and writes the rest. Pointers may be NULL:
   initial (then dinitial is not written), starts, dlast. */
struct scan {
    const float *x, *dt, *a; /* [tokens][heads][dim], [tokens][heads], [heads] */
    const float *b, *c, *d; /* [tokens][groups][state] twice, [heads] */
    const float *initial; /* [batch][heads][dim][state], as are last, dlast, dinitial */
    const uint8_t *starts; /* [tokens] */
    float *y, *last;
    const float *dy, *dlast;
    float *dx, *ddt, *da, *db, *dc, *dd, *dinitial; /* da, dd [batch][heads]; db, dc [shares][tokens][groups][state] */
    int64_t batch, length; /* tokens: batch length */
    int64_t heads, dim, groups, state;
    int64_t x_stride, b_stride, c_stride; /* from token to token */
    int64_t shares; /* parts of a group's heads that are computed apart, and whose gradients of B and C are to be added */
};

#define CHANNELS 128 /* of a sequence that are convolved together */

/* silu(causal depthwise convolution) of right-padded sequences; a token sees none before one that `starts` (or NULL) marks.
   Forward writes y; backward reads dy and writes dx and dweight. */
struct convolution {
    const float *x, *weight, *bias; /* [tokens][width], [kernel][width], [width] */
    const uint8_t *starts; /* [tokens] */
    float *y;
    const float *dy;
    float *dx, *dweight; /* [tokens][width]; [batch][kernel + 1][width], the last row the bias's */
    int64_t batch, length, width, kernel, x_stride;
};

#define GATE_ROWS 64 /* rows whose gradients of the weight are added up before the others' are */

/* weight * y silu(z) / rms over each of `groups` parts of a row. Forward writes out; backward reads dout, writes the rest. */
struct gate {
    const float *y, *z, *weight; /* [rows][width] twice, [width] */
    float *out;
    const float *dout;
    float *dy, *dz, *dweight; /* the last [rows / GATE_ROWS, rounded up][width] */
    int64_t rows, width, groups, z_stride;
    float eps;
};

/* One piece of work that a record describes. */
typedef void (*part)(const void *work, long piece, float *scratch);

/* What a tier of instructions offers. */
struct operations {
    const char *name;
    void (*multiply)(const struct matrix *w, long tile, long last, const float *x, long stride, long rows, float *y,
                     long y_stride);
    void (*to_bytes)(const float *x, long blocks, struct bytes *to);
    void (*multiply_int8)(const struct matrix *w, long tile, long last, const struct bytes *x, long rows, float *y,
                          long y_stride);
    void (*decode)(const struct model *model, const struct cache *cache, const struct batch *batch, float *scratch);
    void (*attend)(const struct pages *p, long conversation, long head, const float *q, long length, float *y,
                   float *scores);
    void (*route)(const struct moe *m, float *gate, int64_t *chosen, float *weights);
    void (*expert)(const struct mlp *of, const float *x, long width, const int32_t *chosen, long count, float *out,
                   float *scratch);
    void (*scatter)(const float *from, const int32_t *chosen, long count, const float *weights, long stride, long width,
                    float *out);
    void (*draw)(const float *logits, long width, float temperature, double uniform, int64_t *id, float *logprob,
                 float *scratch);
    int32_t (*amax)(const struct quantising *q, long patch);
    void (*quantize)(const struct quantising *q, long patch, float scale2);
    void (*dequantize)(const uint8_t *codes, const uint8_t *scales, float scale2, long blocks, float *values);
    void (*transform)(const struct rotation *r, const float *x, float *y, long width);
    part mamba_part, scan_forward, scan_backward, convolution_forward, convolution_backward, gate_forward,
        gate_backward;
    void (*multiply_bf16)(const struct matrix *w, long tile, long last, const uint16_t *x, long rows, float *y,
                          long y_stride); /* NVFP4 weights; NULL in a tier without products of bf16 */
};

#if defined(__x86_64__)
extern const struct operations avx2, avx512, avx512bf16;
#endif
extern const struct operations portable;

#endif
