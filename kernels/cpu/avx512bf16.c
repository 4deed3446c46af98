/* AVX-512 with products of bytes and of bf16 (VNNI, VBMI, BF16). */
#include "records.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,fma,f16c"))),             \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,fma,f16c,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define BF16 1
#include "avx512.h"

#include "operations.h"
#include "bf16.h"

const struct operations avx512bf16 = {"avx512bf16", OPERATIONS, multiply_bf16};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
