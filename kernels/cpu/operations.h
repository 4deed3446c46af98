/* All that a tier offers, in terms of its own primitives. */
#include "linear.h"
#include "int8.h"
#include "layers.h"
#include "mamba.h"
#include "scan.h"
#include "mixer.h"
#include "attention.h"
#include "experts.h"
#include "model.h"
#include "sampling.h"
#include "quantize.h"

/* In the order of `struct operations`. */
#define OPERATIONS                                                                                                       \
    multiply, to_bytes, multiply_int8, decode, attend, route, expert, scatter, draw, amax, quantize, dequantize, transform, \
        mamba_part, scan_forward, scan_backward, convolution_forward, convolution_backward, gate_forward, gate_backward
