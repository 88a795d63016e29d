// LayerNorm over the channels of channels-last rows, a warp for ROWS rows at a time, which lie in registers; also of the
// sum of two images, x + factor * branch, which is written too.
//   DIM                       channels of a row
//   CHANNELS_A_READ           of them that a lane reads at once
//   ADDS                      whether there is a branch
//   PixelT, BranchT, OutT     types of the rows (and of the sum), of the branch and its factors, of the result; and of
//                             their gradients
//   WARPS_A_BLOCK, ROWS
#include "common.cuh"

constexpr int READS = (DIM + 32 * CHANNELS_A_READ - 1) / (32 * CHANNELS_A_READ);   // of a lane
constexpr int HELD = READS * CHANNELS_A_READ;                          // channels a lane holds

__device__ __forceinline__ int channel(int read) { return (read * 32 + (threadIdx.x & 31)) * CHANNELS_A_READ; }

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

// Each row's values become (values - mean) / deviation, and inverse 1 / deviation. Lanes beyond the row keep 0.
__device__ __forceinline__ void standardise(float (&values)[ROWS][HELD], float (&inverse)[ROWS], float eps) {
    float mean[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) sum += values[r][i];
        mean[r] = warp_sum(sum) * (1.f / DIM);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            values[r][i] = channel(i / CHANNELS_A_READ) < DIM ? values[r][i] - mean[r] : 0.f;
            squares = fmaf(values[r][i], values[r][i], squares);
        }
        inverse[r] = rsqrtf(warp_sum(squares) * (1.f / DIM) + eps);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) values[r][i] *= inverse[r];
    }
}

// branch, factors and sum: where ADDS alone, and factors may be null there.
extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_fwd_kernel(const PixelT *x, const BranchT *branch, const BranchT *factors, const float *weight,
                      const float *bias, PixelT *sum, OutT *out, i64 rows, i64 rows_an_image, i64 eps_bits) {
    const i64 first = ((i64)blockIdx.x * WARPS_A_BLOCK + threadIdx.x / 32) * ROWS;
    if (first >= rows) return;
    float values[ROWS][HELD], inverse[ROWS], w[HELD], b[HELD];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 row = first + r;
        read_row(x + row * DIM, values[r], row < rows);
        if constexpr (ADDS) {
            float added[HELD];
            read_row(branch + row * DIM, added, row < rows);
            const float factor = row < rows ? factor_of(factors, row, rows, rows_an_image) : 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                values[r][i] = to_float(from_float<PixelT>(fmaf(factor, added[i], values[r][i])));
            if (row < rows) write_row(sum + row * DIM, values[r]);
        }
    }
    read_row(weight, w);
    read_row(bias, b);
    standardise(values, inverse, __int_as_float((int)eps_bits));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (first + r >= rows) break;
#pragma unroll
        for (int i = 0; i < HELD; ++i) values[r][i] = fmaf(values[r][i], w[i], b[i]);
        write_row(out + (first + r) * DIM, values[r]);
    }
}

// x is what was normed, so the sum where ADDS; there d_sum is the gradient that reaches it by other ways, and d_branch
// that of the branch. A fixed number of blocks share the rows, so that every run adds the parameters' gradients in the
// same order; partial (blocks, 2, DIM): what a block's rows give to weight and bias.
extern "C" __global__ void __launch_bounds__(WARPS_A_BLOCK * 32)
layer_norm_bwd_kernel(const OutT *dy, const PixelT *x, const PixelT *d_sum, const BranchT *factors, const float *weight,
                      PixelT *dx, BranchT *d_branch, float *partial, i64 rows, i64 rows_an_image, i64 eps_bits) {
    const float eps = __int_as_float((int)eps_bits);
    float w[HELD], d_weight[HELD], d_bias[HELD];
    read_row(weight, w);
#pragma unroll
    for (int i = 0; i < HELD; ++i) d_weight[i] = d_bias[i] = 0.f;
    const int warp = threadIdx.x / 32;
    for (i64 first = ((i64)blockIdx.x * WARPS_A_BLOCK + warp) * ROWS; first < rows;
         first += (i64)gridDim.x * WARPS_A_BLOCK * ROWS) {
        float values[ROWS][HELD], g[ROWS][HELD], others[ADDS ? ROWS : 1][HELD], inverse[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            read_row(x + (first + r) * DIM, values[r], first + r < rows);
            read_row(dy + (first + r) * DIM, g[r], first + r < rows);
            if constexpr (ADDS) read_row(d_sum + (first + r) * DIM, others[r], first + r < rows);
        }
        standardise(values, inverse, eps);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0.f, along = 0.f;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                d_weight[i] = fmaf(g[r][i], values[r][i], d_weight[i]);
                d_bias[i] += g[r][i];
                g[r][i] *= w[i];
                sum += g[r][i];
                along = fmaf(g[r][i], values[r][i], along);
            }
            sum = warp_sum(sum) * (1.f / DIM);
            along = warp_sum(along) * (1.f / DIM);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                values[r][i] = inverse[r] * (g[r][i] - sum - values[r][i] * along);
                if constexpr (ADDS) values[r][i] += others[r][i];
            }
            const i64 row = first + r;
            if (row >= rows) break;
            write_row(dx + row * DIM, values[r]);
            if constexpr (ADDS) {
                const float factor = factor_of(factors, row, rows, rows_an_image);
#pragma unroll
                for (int i = 0; i < HELD; ++i) values[r][i] *= factor;
                write_row(d_branch + row * DIM, values[r]);
            }
        }
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
