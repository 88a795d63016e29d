// A warp walks one segment of one route of one image for LANES * C channels. C: channels a lane; K: steps a stage;
// WARPS: warps a block. With chunk = 0 no states are kept.
#include "scan.cuh"

constexpr int CW = LANES * C;    // channels a warp
constexpr int SW = CW + 8;       // of a row of steps in shared memory: spreads the rows over the banks

// The rows' B and C as float32: where they lie in the copied rows, or in a converted copy of RS floats a row.
constexpr int RB = CONVERT ? 0 : B0, RC = RB + NP;
constexpr bool ALIGNED = NS % 4 == 0 && NP % 4 == 0 && B0 % 4 == 0;
constexpr int RS = CONVERT ? (NP == 1 ? 2 : (2 * NP + 3) / 4 * 4) : ROW;

// A lane's NS values of B (COLUMN = RB) or C (RC); q is the lane's state group.
template <int COLUMN> __device__ __forceinline__ void read_states(float *dst, const float *row, int q) {
    if constexpr (S == 1) {
        read_row<COLUMN, NS>(dst, row);
    } else if constexpr (ALIGNED) {
        read_row<0, NS>(dst, row + COLUMN + q * NS);
    } else {
#pragma unroll
        for (int n = 0; n < NS; ++n) dst[n] = row[COLUMN + q * NS + n];
    }
}

// Start copying COUNT projected rows, 16 bytes a lane and turn; pixel[j] is the row's pixel in this image.
template <int COUNT>
__device__ __forceinline__ void load_rows(P *raw, const P *rows, const int *pixel, int stride_bytes, int lane) {
    constexpr int EACH = 16 / sizeof(P), PER_ROW = ROW / EACH, TOTAL = COUNT * PER_ROW;
#pragma unroll
    for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
        const int v = i * 32 + lane, j = v / PER_ROW, c = v % PER_ROW;
        if (TOTAL % 32 == 0 || v < TOTAL)
            copy_async<16>(raw + v * EACH, at(rows, pixel[j], stride_bytes) + c * EACH, true);
    }
    copy_commit();
}

// B and C of COUNT copied rows as float32.
template <int COUNT> __device__ __forceinline__ void convert_rows(float *dst, const P *raw, int lane) {
    if constexpr (CONVERT && NP % 4 == 0 && B0 % 4 == 0) {
        constexpr int PER_ROW = NP < 2 ? 1 : 2 * NP / 4, TOTAL = COUNT * PER_ROW;
#pragma unroll
        for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
            const int v = i * 32 + lane, j = v / PER_ROW, c = v % PER_ROW * 4;
            if (TOTAL % 32 == 0 || v < TOTAL) {
                const uint2 w = *reinterpret_cast<const uint2 *>(raw + j * ROW + B0 + c);
                *reinterpret_cast<float4 *>(dst + j * RS + c) =
                    make_float4(lower_half(w.x), upper_half(w.x), lower_half(w.y), upper_half(w.y));
            }
        }
    } else if constexpr (CONVERT) {
        constexpr int TOTAL = COUNT * 2 * NP;
#pragma unroll
        for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
            const int v = i * 32 + lane, j = v / (2 * NP), c = v % (2 * NP);
            if (TOTAL % 32 == 0 || v < TOTAL) dst[j * RS + c] = to_float(raw[j * ROW + B0 + c]);
        }
    }
}

// FORWARD: the scan itself. SUMMARY: a segment's end state from a zero start, and the sum of its steps. ADJOINT: the
// same for the gradient's recurrence, walked backwards: g = C dy + carry, carry = a g.
enum Mode { FORWARD, SUMMARY, ADJOINT };

template <Mode MODE, class U>
__device__ __forceinline__ void scan(
    const U *__restrict__ u, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const float *__restrict__ entries,
    Y *__restrict__ y, BORDER *__restrict__ borders, float *__restrict__ end_state, float *__restrict__ end_sum,
    i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 u_pixel, i64 u_route, i64 division, i64 chunk,
    i64 segment_length, i64 segments) {
    using Projection = StepProjection<K, CW>;
    constexpr int TILES = Projection::TILES, OCTETS = Projection::OCTETS;
    __shared__ __align__(16) P raw_all[WARPS][2][K * ROW];
    __shared__ __align__(16) float rows_all[CONVERT ? WARPS : 1][CONVERT ? K * RS : 1];
    __shared__ __align__(16) float steps_all[WARPS][K * SW];
    __shared__ __align__(16) int pixel_all[WARPS][2][K];

    // What this warp works on. A lane past the last channel repeats the last one, and stores the same values.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / LANES;
    const int groups = (int)((dim + CW - 1) / CW), blocks = (groups + WARPS - 1) / WARPS;
    const int first = min((int)(blockIdx.x % blocks) * WARPS + warp, groups - 1) * CW;
    const int channel = min(first + lane % LANES * C, (int)dim - C);
    const i64 slot = blockIdx.x / blocks;   // (image, route, segment)
    const int segment = (int)(slot % segments);
    const i64 sequence = slot / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;

    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int count = min((int)segment_length, length - start);
    const int u_stride = (int)(u_pixel * sizeof(U)), y_stride = (int)(routes * dim * sizeof(Y));
    const int row_stride = (int)(routes * ROW * sizeof(P)), step_stride = (int)(u_pixel * sizeof(X));
    u += image * length * u_pixel + route * u_route + channel;
    if constexpr (R == 0) steps += image * length * u_pixel + route * u_route;
    rows += (image * length * routes + route) * ROW;
    if constexpr (MODE == FORWARD) {
        y += (image * length * routes + route) * dim + channel;
        if (chunk) borders += sequence * ((length + chunk - 1) / chunk - 1) * N * dim + channel;
    }

    Projection projection;
    projection.init(dt_weight, dt_bias, route * dim + first, route * dim + dim - 1, lane);
    float a_log[C][NS], h[C][NS], sum[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        sum[c] = 0.f;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int state = q * NS + n;
            a_log[c][n] = state < N ? A[(route * dim + channel + c) * N + state] : 0.f;
            h[c][n] = 0.f;
            if constexpr (MODE == FORWARD)
                if (segment > 0 && state < N) h[c][n] = entries[(slot * N + state) * dim + channel + c];
        }
    }

    // Loading runs a stage of K steps ahead of the scan.
    auto set_pixels = [&](int stage) {
        if (lane < K) {
            const int step = min(stage * K + lane, count - 1);
            pixel_all[warp][stage & 1][lane] =
                route_pixel(start + (MODE == ADJOINT ? count - 1 - step : step), kind, (int)height, (int)width, length,
                            division);
        }
    };
    Vec<U, C> next[K];
    X next_steps[R ? 1 : OCTETS][TILES][2];
    auto load = [&](int stage) {
        const int *pixel = pixel_all[warp][stage & 1];
        load_rows<K>(raw_all[warp][stage & 1], rows, pixel, row_stride, lane);
#pragma unroll
        for (int j = 0; j < K; j += 4) {
            const int4 p = *reinterpret_cast<const int4 *>(pixel + j);
            next[j] = *reinterpret_cast<const Vec<U, C> *>(at(u, p.x, u_stride));
            next[j + 1] = *reinterpret_cast<const Vec<U, C> *>(at(u, p.y, u_stride));
            next[j + 2] = *reinterpret_cast<const Vec<U, C> *>(at(u, p.z, u_stride));
            next[j + 3] = *reinterpret_cast<const Vec<U, C> *>(at(u, p.w, u_stride));
        }
        if constexpr (R == 0)
#pragma unroll
            for (int o = 0; o < OCTETS; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        next_steps[o][t][e] = at(steps, pixel[o * 8 + lane / 4],
                                                 step_stride)[min(first + t * 8 + lane % 4 * 2 + e, (int)dim - 1)];
    };

    const int stages = (count + K - 1) / K;
    set_pixels(0);
    __syncwarp();
    load(0);
    for (int stage = 0; stage < stages; ++stage) {
        float now[C][K], w[OCTETS][TILES][2];
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int j = 0; j < K; ++j) now[c][j] = next[j].get(c);
        if constexpr (R == 0)
#pragma unroll
            for (int o = 0; o < OCTETS; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) w[o][t][e] = to_float(next_steps[o][t][e]);
        set_pixels(stage + 1);
        copy_wait<0>();
        __syncwarp();
        load(stage + 1);

        const P *raw = raw_all[warp][stage & 1];
        float *step_rows = steps_all[warp];
        convert_rows<K>(rows_all[CONVERT ? warp : 0], raw, lane);
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                float *to = step_rows + (o * 8 + lane / 4) * SW + t * 8 + lane % 4 * 2;
                *reinterpret_cast<float2 *>(to) = SOFTPLUS ? make_float2(softplus2(w[o][t][0]), softplus2(w[o][t][1]))
                                                           : make_float2(w[o][t][0], w[o][t][1]);
            }
        __syncwarp();
        const float *stage_rows = CONVERT ? rows_all[warp] : reinterpret_cast<const float *>(raw);
        const int *pixel = pixel_all[warp][stage & 1];

        if constexpr (MODE == FORWARD) {
            const int step = start + stage * K;
            if (chunk && step > 0 && step % (int)chunk == 0) {
#pragma unroll
                for (int n = 0; n < NS; ++n)
                    if (q * NS + n < N)
#pragma unroll
                        for (int c = 0; c < C; ++c)
                            borders[((step / (int)chunk - 1) * (i64)N + q * NS + n) * dim + c] =
                                from_float<BORDER>(h[c][n]);
            }
        }

        auto one = [&](int j) {
            const float *row = stage_rows + j * RS;
            float b[NS], cc[NS], s[C], out[C];
            if constexpr (MODE != ADJOINT) read_states<RB>(b, row, q);
            if constexpr (MODE != SUMMARY) read_states<RC>(cc, row, q);
            read_row<0, C>(s, step_rows + j * SW + channel - first);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                if constexpr (MODE != FORWARD) sum[c] += s[c];
                const float su = s[c] * now[c][j];
#pragma unroll
                for (int n = 0; n < NS; ++n) {
                    const float a = exp2_fast(s[c] * a_log[c][n]);
                    if constexpr (MODE == ADJOINT) {
                        h[c][n] = a * fmaf(cc[n], now[c][j], h[c][n]);
                    } else {
                        h[c][n] = fmaf(a, h[c][n], su * b[n]);
                        if constexpr (MODE == FORWARD) out[c] = n ? fmaf(cc[n], h[c][n], out[c]) : cc[n] * h[c][n];
                    }
                }
            }
            if constexpr (MODE == FORWARD) {
                Vec<Y, C> result;
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int offset = LANES; offset < 32; offset *= 2) out[c] += __shfl_xor_sync(~0u, out[c], offset);
                result.set(out);
                if (S == 1 || q == 0) *reinterpret_cast<Vec<Y, C> *>(at(y, pixel[j], y_stride)) = result;
            }
        };
        const int here = count - stage * K;
        if (here >= K) {
#pragma unroll
            for (int j = 0; j < K; ++j) one(j);
        } else {   // the last stage: a step past the end must not happen
#pragma unroll
            for (int j = 0; j < K; ++j)
                if (j < here) one(j);
        }
        __syncwarp();
    }
    copy_wait<0>();

    if constexpr (MODE != FORWARD) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
            if (q == 0) end_sum[slot * dim + channel + c] = sum[c];
#pragma unroll
            for (int n = 0; n < NS; ++n)
                if (q * NS + n < N)
                    end_state[(slot * N + q * NS + n) * dim + channel + c] = h[c][n];
        }
    }
}

#define BOUNDS __launch_bounds__(32 * WARPS, MIN_BLOCKS)

extern "C" __global__ void BOUNDS scan_fwd_kernel(
    const X *x, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A,
    const float *entries, Y *y, BORDER *borders, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds,
    i64 x_pixel, i64 x_route, i64 division, i64 chunk, i64 segment_length, i64 segments) {
    scan<FORWARD>(x, steps, rows, dt_weight, dt_bias, A, entries, y, borders, nullptr, nullptr, height, width, dim,
                  routes, route_kinds, x_pixel, x_route, division, chunk, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_summary_kernel(
    const X *x, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A,
    float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 division, i64 segment_length, i64 segments) {
    scan<SUMMARY>(x, steps, rows, dt_weight, dt_bias, A, nullptr, (Y *)nullptr, nullptr, end_state, end_sum, height,
                  width, dim, routes, route_kinds, x_pixel, x_route, division, 0, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_adjoint_kernel(
    const G *dy, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A,
    float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 division, i64 segment_length, i64 segments) {
    scan<ADJOINT>(dy, steps, rows, dt_weight, dt_bias, A, nullptr, (Y *)nullptr, nullptr, end_state, end_sum, height,
                  width, dim, routes, route_kinds, x_pixel, x_route, division, 0, segment_length, segments);
}

// Passes the states over the segments: one thread a (image, route, state, channel). Forward, the states that enter the
// segments; in the adjoint direction, the gradients of those that leave them: (image, route, segment, N, dim).
extern "C" __global__ void scan_pass_kernel(const float *end_state, const float *end_sum, const float *A, float *to,
                                            i64 count, i64 dim, i64 routes, i64 segments, i64 adjoint) {
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= count) return;
    i64 ch = thread % dim, state = thread / dim % N, sequence = thread / dim / N;   // sequence: (image, route)
    float a = A[((sequence % routes) * dim + ch) * N + state], h = 0.f;
    for (i64 i = 0; i < segments - 1; ++i) {
        i64 segment = adjoint ? segments - 1 - i : i, slot = sequence * segments + segment;
        h = fmaf(exp2_fast(end_sum[slot * dim + ch] * a), h, end_state[(slot * N + state) * dim + ch]);
        to[((slot + (adjoint ? -1 : 1)) * N + state) * dim + ch] = h;
    }
}
