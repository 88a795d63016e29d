// What stands between the two matrix products of an MLP, and the sums of a matrix's columns, which are gradients of
// biases. A thread has CHANNELS_A_READ columns, LANES threads stand side by side, STRIPS of them one below the other.
#include "common.cuh"

using Channels = Vec<PixelT, CHANNELS_A_READ>;

// Of a standard normal variable: the share below v, and its density there.
struct Normal {
    float share, density;

    __device__ __forceinline__ explicit Normal(float v) {
        const float e = exp2_fast(-0.5f * LOG2E * v * v);
        density = 0.3989422804014327f * e;
        if constexpr (sizeof(PixelT) == 2) {
            // The share beyond |v| is e t q(t), t = 1 / (1 + 0.3 |v|), with a relative error of 8e-6: a hundredth of
            // what rounding the result costs. erff takes twice the instructions, more than the memory takes time.
            const float t = __fdividef(1.f, fmaf(0.3f, fabsf(v), 1.f));
            float q = -0.0770981f;
            q = fmaf(q, t, 0.21603918f);
            q = fmaf(q, t, -0.01695058f);
            q = fmaf(q, t, 0.14419776f);
            q = fmaf(q, t, 0.11374157f);
            q = fmaf(q, t, 0.12007427f);
            const float beyond = q * t * e;
            share = v < 0.f ? beyond : 1.f - beyond;
        } else {
            share = 0.5f + 0.5f * erff(v * 0.70710678118654752f);
        }
    }
};

// out = GELU(h) = h * Normal(h).share, count vectors of CHANNELS_A_READ; out may be h.
extern "C" __global__ void __launch_bounds__(256) gelu_fwd_kernel(const PixelT *h, PixelT *out, i64 count) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const Channels from = reinterpret_cast<const Channels *>(h)[i];
        float values[CHANNELS_A_READ];
#pragma unroll
        for (int c = 0; c < CHANNELS_A_READ; ++c) values[c] = from.get(c) * Normal(from.get(c)).share;
        Channels to;
        to.set(values);
        reinterpret_cast<Channels *>(out)[i] = to;
    }
}

// The columns' sums of a block, added over its strips, to partial (row blocks, DIM).
__device__ __forceinline__ void write_sums(const float *own, float *partial, int group, i64 row_block) {
    __shared__ float sums[STRIPS][LANES * CHANNELS_A_READ];
    const int lane = threadIdx.x % LANES, strip = threadIdx.x / LANES;
#pragma unroll
    for (int c = 0; c < CHANNELS_A_READ; ++c) sums[strip][lane * CHANNELS_A_READ + c] = own[c];
    __syncthreads();
    if (strip || group * CHANNELS_A_READ >= DIM) return;
#pragma unroll
    for (int c = 0; c < CHANNELS_A_READ; ++c) {
        float sum = 0.f;
        for (int other = 0; other < STRIPS; ++other) sum += sums[other][lane * CHANNELS_A_READ + c];
        partial[row_block * DIM + group * CHANNELS_A_READ + c] = sum;
    }
}

// Of rows (rows, DIM), a fixed number of blocks share them, so that every run adds in the same order.
// GELU's gradient of h, d_out * (share + h * density), in the place of d_out; GELU(h) again to out; and the
// sums over the rows of the gradient before it is rounded.
extern "C" __global__ void __launch_bounds__(LANES * STRIPS) gelu_bwd_kernel(
    PixelT *d_out, const PixelT *h, PixelT *out, float *partial, i64 rows, i64 row_blocks) {
    const int group = (int)(blockIdx.x / row_blocks) * LANES + threadIdx.x % LANES;
    const i64 row_block = blockIdx.x % row_blocks;
    float sums[CHANNELS_A_READ];
#pragma unroll
    for (int c = 0; c < CHANNELS_A_READ; ++c) sums[c] = 0.f;
    if (group * CHANNELS_A_READ < DIM) {
        constexpr int GROUPS = DIM / CHANNELS_A_READ;
#pragma unroll 2
        for (i64 row = row_block * STRIPS + threadIdx.x / LANES; row < rows; row += row_blocks * STRIPS) {
            const i64 i = row * GROUPS + group;
            const Channels from = reinterpret_cast<const Channels *>(h)[i];
            const Channels gradient = reinterpret_cast<const Channels *>(d_out)[i];
            float values[CHANNELS_A_READ], d_values[CHANNELS_A_READ];
#pragma unroll
            for (int c = 0; c < CHANNELS_A_READ; ++c) {
                const float v = from.get(c);
                const Normal normal(v);
                values[c] = v * normal.share;
                d_values[c] = gradient.get(c) * fmaf(v, normal.density, normal.share);
                sums[c] += d_values[c];
            }
            Channels to;
            to.set(values);
            reinterpret_cast<Channels *>(out)[i] = to;
            to.set(d_values);
            reinterpret_cast<Channels *>(d_out)[i] = to;
        }
    }
    write_sums(sums, partial, group, row_block);
}

// The sums over the rows of x (rows, DIM).
extern "C" __global__ void __launch_bounds__(LANES * STRIPS)
sum_columns_kernel(const PixelT *x, float *partial, i64 rows, i64 row_blocks) {
    const int group = (int)(blockIdx.x / row_blocks) * LANES + threadIdx.x % LANES;
    const i64 row_block = blockIdx.x % row_blocks;
    float sums[CHANNELS_A_READ];
#pragma unroll
    for (int c = 0; c < CHANNELS_A_READ; ++c) sums[c] = 0.f;
    if (group * CHANNELS_A_READ < DIM) {
        constexpr int GROUPS = DIM / CHANNELS_A_READ;
#pragma unroll 4
        for (i64 row = row_block * STRIPS + threadIdx.x / LANES; row < rows; row += row_blocks * STRIPS) {
            const Channels from = reinterpret_cast<const Channels *>(x)[row * GROUPS + group];
#pragma unroll
            for (int c = 0; c < CHANNELS_A_READ; ++c) sums[c] += from.get(c);
        }
    }
    write_sums(sums, partial, group, row_block);
}
