// LayerNorm over the channels of channels-last rows, which lie in the registers of LANES lanes each; also of the sum of
// two images, x + factor * branch, which is written too.
//   DIM                       channels of a row
//   CHANNELS_A_READ           of them that a lane reads at once
//   LANES                     of a warp that share a row, a power of two
//   ADDS                      whether there is a branch
//   PixelT, BranchT, OutT     types of the rows (and of the sum), of the branch and its factors, of the result; and of
//                             their gradients
//   WARPS_A_BLOCK
#include "common.cuh"

constexpr int READS = (DIM + LANES * CHANNELS_A_READ - 1) / (LANES * CHANNELS_A_READ);   // of a lane
constexpr int HELD = READS * CHANNELS_A_READ;                                // channels a lane holds
constexpr int ROWS_A_BLOCK = WARPS_A_BLOCK * 32 / LANES;                     // at a time

__device__ __forceinline__ int channel(int read) { return (read * LANES + threadIdx.x % LANES) * CHANNELS_A_READ; }

// Of the row's lanes.
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane /= 2) v += __shfl_xor_sync(~0u, v, lane);
    return v;
}

template <class T> __device__ __forceinline__ void read_row(const T *row, float *values, bool there = true) {
#pragma unroll
    for (int read = 0; read < READS; ++read) {
        if (there && channel(read) < DIM) {
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

// What a row's branch is multiplied with.
__device__ __forceinline__ float factor_of(const BranchT *factors, i64 row, i64 rows, i64 rows_an_image) {
    if (!factors) return 1.f;
    const bool narrow = rows >> 32 == 0;   // 64-bit divisions are slow
    return to_float(factors[narrow ? (unsigned)row / (unsigned)rows_an_image : row / rows_an_image]);
}

// The row's values become (values - mean) / deviation, and the result is 1 / deviation. Lanes beyond the row keep 0.
__device__ __forceinline__ float standardise(float (&values)[HELD], float eps) {
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum += values[i];
    const float mean = row_sum(sum) * (1.f / DIM);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        values[i] = channel(i / CHANNELS_A_READ) < DIM ? values[i] - mean : 0.f;
        squares = fmaf(values[i], values[i], squares);
    }
    const float inverse = rsqrtf(row_sum(squares) * (1.f / DIM) + eps);
#pragma unroll
    for (int i = 0; i < HELD; ++i) values[i] *= inverse;
    return inverse;
}

// branch, factors and sum: where ADDS alone, and factors may be null there.
extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_fwd_kernel(const PixelT *x, const BranchT *branch, const BranchT *factors, const float *weight,
                      const float *bias, PixelT *sum, OutT *out, i64 rows, i64 rows_an_image, i64 eps_bits) {
    const i64 row = (i64)blockIdx.x * ROWS_A_BLOCK + threadIdx.x / LANES;
    const bool there = row < rows;
    float values[HELD], w[HELD], b[HELD];
    read_row(x + row * DIM, values, there);
    if constexpr (ADDS) {
        float added[HELD];
        read_row(branch + row * DIM, added, there);
        const float factor = there ? factor_of(factors, row, rows, rows_an_image) : 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) values[i] = to_float(from_float<PixelT>(fmaf(factor, added[i], values[i])));
        if (there) write_row(sum + row * DIM, values);
    }
    read_row(weight, w);
    read_row(bias, b);
    standardise(values, __int_as_float((int)eps_bits));
#pragma unroll
    for (int i = 0; i < HELD; ++i) values[i] = fmaf(values[i], w[i], b[i]);
    if (there) write_row(out + row * DIM, values);
}

// x is what was normed, so the sum where ADDS; there d_sum is the gradient that reaches it by other ways, and d_branch
// that of the branch. A fixed number of blocks share the rows, so that every run adds the parameters' gradients in the
// same order; partial (blocks, 2, DIM): what a block's rows give to weight and bias.
extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_bwd_kernel(const OutT *dy, const PixelT *x, const PixelT *d_sum, const BranchT *factors, const float *weight,
                      PixelT *dx, BranchT *d_branch, float *partial, i64 rows, i64 rows_an_image, i64 eps_bits) {
    const float eps = __int_as_float((int)eps_bits);
    const int group = threadIdx.x / LANES;   // of the block's lanes that share a row
    float w[HELD], d_weight[HELD], d_bias[HELD];
    read_row(weight, w);
#pragma unroll
    for (int i = 0; i < HELD; ++i) d_weight[i] = d_bias[i] = 0.f;
    for (i64 first = (i64)blockIdx.x * ROWS_A_BLOCK; first < rows; first += (i64)gridDim.x * ROWS_A_BLOCK) {
        const i64 row = first + group;
        const bool there = row < rows;
        float values[HELD], g[HELD], others[ADDS ? HELD : 1], sum = 0.f, along = 0.f;
        read_row(x + row * DIM, values, there);
        read_row(dy + row * DIM, g, there);
        if constexpr (ADDS) read_row(d_sum + row * DIM, others, there);
        const float inverse = standardise(values, eps);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            d_weight[i] = fmaf(g[i], values[i], d_weight[i]);
            d_bias[i] += g[i];
            g[i] *= w[i];
            sum += g[i];
            along = fmaf(g[i], values[i], along);
        }
        sum = row_sum(sum) * (1.f / DIM);
        along = row_sum(along) * (1.f / DIM);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            values[i] = inverse * (g[i] - sum - values[i] * along);
            if constexpr (ADDS) values[i] += others[i];
        }
        if (there) write_row(dx + row * DIM, values);
        if constexpr (ADDS) {
            const float factor = there ? factor_of(factors, row, rows, rows_an_image) : 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) values[i] *= factor;
            if (there) write_row(d_branch + row * DIM, values);
        }
    }
    __shared__ float sums[ROWS_A_BLOCK][LANES * HELD];
    float *const out = partial + (i64)blockIdx.x * 2 * DIM;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int ch = channel(i / CHANNELS_A_READ) + i % CHANNELS_A_READ;
            sums[group][ch] = which ? d_bias[i] : d_weight[i];
        }
        __syncthreads();
        for (int ch = threadIdx.x; ch < DIM; ch += WARPS_A_BLOCK * 32) {
            float total = 0.f;
#pragma unroll
            for (int other = 0; other < ROWS_A_BLOCK; ++other) total += sums[other][ch];
            out[which * DIM + ch] = total;
        }
        __syncthreads();
    }
}
