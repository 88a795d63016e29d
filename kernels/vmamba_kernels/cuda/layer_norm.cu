// LayerNorm over the channels of channels-last rows, a warp a row, the row in registers.
//   DIM          channels of a row
//   VEC          of them that a lane reads at once
//   X, G         types of the rows and of the result (and of its gradient)
//   WARPS        of a block
#include "common.cuh"

constexpr int READS = (DIM + 32 * VEC - 1) / (32 * VEC);   // of a lane
constexpr int HELD = READS * VEC;                          // channels a lane holds

__device__ __forceinline__ int channel(int read) { return (read * 32 + (threadIdx.x & 31)) * VEC; }

template <class T> __device__ __forceinline__ void read_row(const T *row, float *values) {
#pragma unroll
    for (int read = 0; read < READS; ++read) {
        if (channel(read) < DIM) {
            const auto v = *reinterpret_cast<const Vec<T, VEC> *>(row + channel(read));
#pragma unroll
            for (int i = 0; i < VEC; ++i) values[read * VEC + i] = v.get(i);
        } else {
#pragma unroll
            for (int i = 0; i < VEC; ++i) values[read * VEC + i] = 0.f;
        }
    }
}

template <class T> __device__ __forceinline__ void write_row(T *row, const float *values) {
#pragma unroll
    for (int read = 0; read < READS; ++read) {
        if (channel(read) < DIM) {
            Vec<T, VEC> v;
            v.set(values + read * VEC);
            *reinterpret_cast<Vec<T, VEC> *>(row + channel(read)) = v;
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
        values[i] = channel(i / VEC) < DIM ? values[i] - mean : 0.f;
        squares = fmaf(values[i], values[i], squares);
    }
    const float inverse = rsqrtf(warp_sum(squares) * (1.f / DIM) + eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) values[i] *= inverse;
    return inverse;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
layer_norm_fwd_kernel(const X *x, const float *weight, const float *bias, G *out, i64 rows, i64 eps_bits) {
    const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
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
extern "C" __global__ void __launch_bounds__(WARPS * 32)
layer_norm_bwd_kernel(const G *dy, const X *x, const float *weight, X *dx, float *partial, i64 rows, i64 eps_bits) {
    const float eps = __int_as_float((int)eps_bits);
    float w[HELD], d_weight[HELD], d_bias[HELD];
    read_row(weight, w);
#pragma unroll
    for (int i = 0; i < HELD; ++i) d_weight[i] = d_bias[i] = 0.f;
    for (i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32; row < rows; row += (i64)gridDim.x * WARPS) {
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
    __shared__ float sums[WARPS][32 * HELD];
    float *const out = partial + (i64)blockIdx.x * 2 * DIM;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            sums[threadIdx.x / 32][channel(i / VEC) + i % VEC] = which ? d_bias[i] : d_weight[i];
        }
        __syncthreads();
        for (int ch = threadIdx.x; ch < DIM; ch += WARPS * 32) {
            float total = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) total += sums[warp][ch];
            out[which * DIM + ch] = total;
        }
        __syncthreads();
    }
}
