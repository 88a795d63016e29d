// LayerNorm over the channels of channels-last rows, a warp a row, the row in registers.
//   DIM                channels of a row
//   CHANNELS_A_READ    of them that a lane reads at once
//   PixelT, OutT       types of the rows and of the result (and of its gradient)
//   WARPS_A_BLOCK
#include "common.cuh"

constexpr int READS = (DIM + 32 * CHANNELS_A_READ - 1) / (32 * CHANNELS_A_READ);   // of a lane
constexpr int HELD = READS * CHANNELS_A_READ;                          // channels a lane holds

__device__ __forceinline__ int channel(int read) { return (read * 32 + (threadIdx.x & 31)) * CHANNELS_A_READ; }

template <class T> __device__ __forceinline__ void read_row(const T *row, float *values) {
#pragma unroll
    for (int read = 0; read < READS; ++read) {
        if (channel(read) < DIM) {
            const auto v = *reinterpret_cast<const Vec<T, CHANNELS_A_READ> *>(row + channel(read));
#pragma unroll
            for (int i = 0; i < CHANNELS_A_READ; ++i) values[read * CHANNELS_A_READ + i] = v.get(i);
        } else {
#pragma unroll
            for (int i = 0; i < CHANNELS_A_READ; ++i) values[read * CHANNELS_A_READ + i] = 0.f;
        }
    }
}

template <class T> __device__ __forceinline__ void write_row(T *row, const float *values) {
#pragma unroll
    for (int read = 0; read < READS; ++read) {
        if (channel(read) < DIM) {
            Vec<T, CHANNELS_A_READ> v;
            v.set(values + read * CHANNELS_A_READ);
            *reinterpret_cast<Vec<T, CHANNELS_A_READ> *>(row + channel(read)) = v;
        }
    }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// values becomes (values - mean) / deviation; returns 1 / deviation. Lanes beyond the row keep 0.
__device__ __forceinline__ float standardise(float *values, float eps) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum += values[i];
    const float mean = warp_sum(sum) * (1.f / DIM);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        values[i] = channel(i / CHANNELS_A_READ) < DIM ? values[i] - mean : 0.f;
        squares = fmaf(values[i], values[i], squares);
    }
    const float inverse = rsqrtf(warp_sum(squares) * (1.f / DIM) + eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) values[i] *= inverse;
    return inverse;
}

extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_fwd_kernel(const PixelT *x, const float *weight, const float *bias, OutT *out, i64 rows, i64 eps_bits) {
    const i64 row = (i64)blockIdx.x * WARPS_A_BLOCK + threadIdx.x / 32;
    if (row >= rows) return;
    float values[HELD], w[HELD], b[HELD];
    read_row(x + row * DIM, values);
    read_row(weight, w);
    read_row(bias, b);
    standardise(values, __int_as_float((int)eps_bits));
#pragma unroll
    for (int i = 0; i < HELD; ++i) values[i] = fmaf(values[i], w[i], b[i]);
    write_row(out + row * DIM, values);
}

// A fixed number of blocks share the rows, so that every run adds the parameters' gradients in the same order;
// partial (blocks, 2, DIM): what a block's rows give to weight and bias.
extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_bwd_kernel(const OutT *dy, const PixelT *x, const float *weight, PixelT *dx, float *partial, i64 rows,
                      i64 eps_bits) {
    const float eps = __int_as_float((int)eps_bits);
    float w[HELD], d_weight[HELD], d_bias[HELD];
    read_row(weight, w);
#pragma unroll
    for (int i = 0; i < HELD; ++i) d_weight[i] = d_bias[i] = 0.f;
    const int warp = threadIdx.x / 32;
    for (i64 row = (i64)blockIdx.x * WARPS_A_BLOCK + warp; row < rows; row += (i64)gridDim.x * WARPS_A_BLOCK) {
        float values[HELD], g[HELD];
        read_row(x + row * DIM, values);
        read_row(dy + row * DIM, g);
        const float inverse = standardise(values, eps);
        float sum = 0.f, along = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            d_weight[i] = fmaf(g[i], values[i], d_weight[i]);
            d_bias[i] += g[i];
            g[i] *= w[i];
            sum += g[i];
            along = fmaf(g[i], values[i], along);
        }
        sum = warp_sum(sum) * (1.f / DIM);
        along = warp_sum(along) * (1.f / DIM);
#pragma unroll
        for (int i = 0; i < HELD; ++i) values[i] = inverse * (g[i] - sum - values[i] * along);
        write_row(dx + row * DIM, values);
    }
    __shared__ float sums[WARPS_A_BLOCK][32 * HELD];
    float *const out = partial + (i64)blockIdx.x * 2 * DIM;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int ch = channel(i / CHANNELS_A_READ) + i % CHANNELS_A_READ;
            sums[warp][ch] = which ? d_bias[i] : d_weight[i];
        }
        __syncthreads();
        for (int ch = threadIdx.x; ch < DIM; ch += WARPS_A_BLOCK * 32) {
            float total = 0.f;
#pragma unroll
            for (int other = 0; other < WARPS_A_BLOCK; ++other) total += sums[other][ch];
            out[which * DIM + ch] = total;
        }
        __syncthreads();
    }
}
