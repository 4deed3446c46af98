// A product by ggml's dot product alone, on one thread: what a graph and its threads cost is no part of it.
#include "ggml-cpu.h"
#include "ggml.h"

// y [batch, rows] = x [batch, columns] times a weight [rows, columns] of ggml's type, both y and x in float32.
// `rounded` has room for x in the type that ggml multiplies such a weight with.
void rows_multiply(int type, const char *weight, long rows, long columns, const float *x, long batch, char *rounded,
                   float *y) {
    const struct ggml_type_traits_cpu *traits = ggml_get_type_traits_cpu(type);
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float;
    const size_t stride = ggml_row_size(type, columns), step = ggml_row_size(traits->vec_dot_type, columns);
    for (long i = 0; i < batch; i++)
        from_float(x + i * columns, rounded + i * step, columns);
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < batch; i++)
            traits->vec_dot(columns, y + i * rows + row, 0, weight + row * stride, 0, rounded + i * step, 0, 1);
}
