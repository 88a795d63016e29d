// Shared by the kernels of the scans. What they are compiled with, in capitals or as a type, and the words they use are
// explained in layout.py, which makes it.
// The steps are kept as s = delta / ln 2, so that exp(delta A) = 2^(s A); a state is then h / ln 2, and whoever reads a
// route's output multiplies it by ln 2 once.
#include "common.cuh"

constexpr int STATES_A_LANE = (STATES + STATE_LANES - 1) / STATE_LANES;
constexpr int CHANNEL_LANES = 32 / STATE_LANES;     // lanes of a warp that hold different channels
constexpr int C_COLUMN = B_COLUMN + PADDED_STATES;   // of a row, where C starts
constexpr bool HALF_ROWS = sizeof(RowT) == 2;        // rows are bfloat16: B and C are turned into float32

// log2(1 + 2^w), accurate to float32's relative precision for float32 pixels and to 6e-5 for the half types: one
// exponential of -|w|, then a polynomial of log2(1 + z) / z on [0, 1] (fitted for relative error).
__device__ __forceinline__ float softplus2(float w) {
    float z = exp2_fast(-fabsf(w));
    float p;
    if constexpr (sizeof(PixelT) == 4) {
        p = 0.00754917785525322f;
        p = fmaf(p, z, -0.042567044496536255f);
        p = fmaf(p, z, 0.11285616457462311f);
        p = fmaf(p, z, -0.19711895287036896f);
        p = fmaf(p, z, 0.27564141154289246f);
        p = fmaf(p, z, -0.35840848088264465f);
        p = fmaf(p, z, 0.48069295287132263f);
        p = fmaf(p, z, -0.7213401794433594f);
        p = fmaf(p, z, 1.4426950216293335f);
    } else {
        p = 0.05965152010321617f;
        p = fmaf(p, z, -0.22711940109729767f);
        p = fmaf(p, z, 0.44189879298210144f);
        p = fmaf(p, z, -0.7169874310493469f);
        p = fmaf(p, z, 1.4426132440567017f);
    }
    return fmaf(p, z, fmaxf(w, 0.f));
}

// The derivative of softplus from its value s = log2(1 + 2^w): 1 - 2^-s, or its series where the difference would lose
// digits (relative error 2e-7 for float32 pixels, 4e-4 for the half types).
__device__ __forceinline__ float softplus_derivative(float s) {
    const float t = s * LN2, direct = 1.f - exp2_fast(-s);
    if constexpr (sizeof(PixelT) == 4) {
        float p = 1.f / 3628800;
        p = fmaf(p, -t, 1.f / 362880);
        p = fmaf(p, -t, 1.f / 40320);
        p = fmaf(p, -t, 1.f / 5040);
        p = fmaf(p, -t, 1.f / 720);
        p = fmaf(p, -t, 1.f / 120);
        p = fmaf(p, -t, 1.f / 24);
        p = fmaf(p, -t, 1.f / 6);
        p = fmaf(p, -t, 0.5f);
        p = fmaf(p, -t, 1.f);
        return s < 1.f ? t * p : direct;
    } else {
        return s < 0.001f ? t : direct;
    }
}

// The pixel that a route visits at a step. Routes: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed. division: a
// division by the height as a multiplication, (step * (division >> 6)) >> (division & 63), exact below 2^31.
__device__ __forceinline__ int route_pixel(int step, int route, int height, int width, int length, i64 division) {
    if (route & 2) step = length - 1 - step;
    if (route & 1) {
        const int column = (int)(((unsigned long long)step * (unsigned)(division >> 6)) >> (division & 63));
        step = (step - column * height) * width + column;
    }
    return step;
}

// COUNT floats from shared memory in the widest reads that OFFSET's alignment allows; src is 16-byte aligned.
template <int OFFSET, int COUNT> __device__ __forceinline__ void read_row(float *dst, const float *src) {
    if constexpr (COUNT >= 4 && OFFSET % 4 == 0) {
        float4 v = *reinterpret_cast<const float4 *>(src + OFFSET);
        dst[0] = v.x, dst[1] = v.y, dst[2] = v.z, dst[3] = v.w;
        if constexpr (COUNT > 4) read_row<OFFSET + 4, COUNT - 4>(dst + 4, src);
    } else if constexpr (COUNT >= 2 && OFFSET % 2 == 0) {
        float2 v = *reinterpret_cast<const float2 *>(src + OFFSET);
        dst[0] = v.x, dst[1] = v.y;
        if constexpr (COUNT > 2) read_row<OFFSET + 2, COUNT - 2>(dst + 2, src);
    } else if constexpr (COUNT >= 1) {
        dst[0] = src[OFFSET];
        if constexpr (COUNT > 1) read_row<OFFSET + 1, COUNT - 1>(dst + 1, src);
    }
}

// The steps of a warp's CHANNELS at STEPS positions, w = (dt + bias) / ln 2 before the softplus, dt = rows *
// dt_weight. A lane holds w[o][t][e]: position o * 8 + lane / 4, channel t * 8 + lane % 4 * 2 + e: the layout of a
// matrix instruction's result, which bfloat16 rows are multiplied with (its products are exact, its sums float32).
template <int STEPS, int CHANNELS> struct StepProjection {
    static constexpr int TILES = (CHANNELS + 7) / 8, RANK_OCTETS = RANK ? (RANK + 7) / 8 : 1, OCTETS = STEPS / 8;
    float bias[TILES][2];
    unsigned weight[TILES][RANK_OCTETS];
    const PixelT *weights[HALF_ROWS ? 1 : TILES][2];

    // first: of the warp's channels in (routes * dim); last: the largest that exists.
    __device__ __forceinline__ void init(const PixelT *dt_weight, const float *dt_bias, i64 first, i64 last, int lane) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const i64 channel = min(first + t * 8 + lane % 4 * 2 + e, last);
                bias[t][e] = dt_bias ? dt_bias[channel] * LOG2E : 0.f;
                if constexpr (RANK && !HALF_ROWS) weights[t][e] = dt_weight + channel * RANK;
            }
            if constexpr (RANK && HALF_ROWS) {
                const PixelT *own = dt_weight + min(first + t * 8 + lane / 4, last) * RANK;
#pragma unroll
                for (int k = 0; k < RANK_OCTETS; ++k) {
                    const int r = k * 8 + lane % 4 * 2;
                    unsigned low = r < RANK ? bits(own[r]) : 0, high = r + 1 < RANK ? bits(own[r + 1]) : 0;
                    weight[t][k] = low | high << 16;
                }
            }
        }
    }

    // given: the steps themselves (RANK = 0), in the same layout as w.
    __device__ __forceinline__ void project(float (*w)[TILES][2], const RowT *raw, const float (*given)[TILES][2],
                                            int lane) {
        static_assert(OCTETS <= 2, "one matrix instruction has 16 positions");
        if constexpr (RANK == 0) {
#pragma unroll
            for (int o = 0; o < OCTETS; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) w[o][t][e] = fmaf(given[o][t][e], LOG2E, bias[t][e]);
        } else if constexpr (HALF_ROWS) {
            unsigned a[RANK_OCTETS][2];
#pragma unroll
            for (int k = 0; k < RANK_OCTETS; ++k)
#pragma unroll
                for (int o = 0; o < 2; ++o)
                    a[k][o] = o < OCTETS ? *reinterpret_cast<const unsigned *>(
                                               raw + (o * 8 + lane / 4) * ROW_WIDTH + k * 8 + lane % 4 * 2) : 0;
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int k = 0; k < RANK_OCTETS; ++k) matrix_multiply_add(d, a[k][0], a[k][1], weight[t][k]);
#pragma unroll
                for (int o = 0; o < OCTETS; ++o)
#pragma unroll
                    for (int e = 0; e < 2; ++e) w[o][t][e] = fmaf(d[2 * o + e], LOG2E, bias[t][e]);
            }
        } else {
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float d[OCTETS] = {};
#pragma unroll 8
                    for (int r = 0; r < RANK; ++r) {
                        const float weight = to_float(weights[t][e][r]);
#pragma unroll
                        for (int o = 0; o < OCTETS; ++o)
                            d[o] = fmaf(to_float(raw[(o * 8 + lane / 4) * ROW_WIDTH + r]), weight, d[o]);
                    }
#pragma unroll
                    for (int o = 0; o < OCTETS; ++o) w[o][t][e] = fmaf(d[o], LOG2E, bias[t][e]);
                }
        }
    }
};
