// A warp walks one segment of one route of one image for CHANNELS_A_WARP. With chunk = 0 no states are kept.
#include "scan.cuh"

constexpr int CHANNELS_A_WARP = CHANNEL_LANES * CHANNELS_A_LANE;

// The rows' B and C as float32: where they lie in the copied rows, or in a converted copy of FLOATS_WIDTH a row.
constexpr int B_AT = HALF_ROWS ? 0 : B_COLUMN, C_AT = B_AT + PADDED_STATES;
constexpr bool ALIGNED = STATES_A_LANE % 4 == 0 && PADDED_STATES % 4 == 0 && B_COLUMN % 4 == 0;

// A lane's values of B (COLUMN = B_AT) or C (C_AT).
template <int COLUMN> __device__ __forceinline__ void read_states(float *dst, const float *row, int state_lane) {
    if constexpr (STATE_LANES == 1) {
        read_row<COLUMN, STATES_A_LANE>(dst, row);
    } else if constexpr (ALIGNED) {
        read_row<0, STATES_A_LANE>(dst, row + COLUMN + state_lane * STATES_A_LANE);
    } else {
#pragma unroll
        for (int n = 0; n < STATES_A_LANE; ++n) dst[n] = row[COLUMN + state_lane * STATES_A_LANE + n];
    }
}

// Start copying COUNT projected rows, 16 bytes a lane and turn; pixel[j] is the row's pixel in this image.
template <int COUNT>
__device__ __forceinline__ void load_rows(RowT *raw, const RowT *rows, const int *pixel, int stride_bytes, int lane) {
    constexpr int EACH = 16 / sizeof(RowT), PER_ROW = ROW_WIDTH / EACH, TOTAL = COUNT * PER_ROW;
#pragma unroll
    for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
        const int v = i * 32 + lane, j = v / PER_ROW, c = v % PER_ROW;
        if (TOTAL % 32 == 0 || v < TOTAL)
            copy_async<16>(raw + v * EACH, at(rows, pixel[j], stride_bytes) + c * EACH, true);
    }
    copy_commit();
}

// B and C of COUNT copied rows as float32.
template <int COUNT> __device__ __forceinline__ void convert_rows(float *dst, const RowT *raw, int lane) {
    if constexpr (HALF_ROWS && PADDED_STATES % 4 == 0 && B_COLUMN % 4 == 0) {
        constexpr int PER_ROW = PADDED_STATES < 2 ? 1 : 2 * PADDED_STATES / 4, TOTAL = COUNT * PER_ROW;
#pragma unroll
        for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
            const int v = i * 32 + lane, j = v / PER_ROW, c = v % PER_ROW * 4;
            if (TOTAL % 32 == 0 || v < TOTAL) {
                const uint2 w = *reinterpret_cast<const uint2 *>(raw + j * ROW_WIDTH + B_COLUMN + c);
                *reinterpret_cast<float4 *>(dst + j * FLOATS_WIDTH + c) =
                    make_float4(lower_half(w.x), upper_half(w.x), lower_half(w.y), upper_half(w.y));
            }
        }
    } else if constexpr (HALF_ROWS) {
        constexpr int TOTAL = COUNT * 2 * PADDED_STATES;
#pragma unroll
        for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
            const int v = i * 32 + lane, j = v / (2 * PADDED_STATES), c = v % (2 * PADDED_STATES);
            if (TOTAL % 32 == 0 || v < TOTAL) dst[j * FLOATS_WIDTH + c] = to_float(raw[j * ROW_WIDTH + B_COLUMN + c]);
        }
    }
}

// FORWARD: the scan itself. SUMMARY: a segment's end state from a zero start, and the sum of its steps. ADJOINT: the
// same for the gradient's recurrence, walked backwards: g = C dy + carry, carry = a g.
enum Mode { FORWARD, SUMMARY, ADJOINT };

template <Mode MODE, class U>
__device__ __forceinline__ void scan(
    const U *__restrict__ u, const PixelT *__restrict__ steps, const RowT *__restrict__ rows,
    const PixelT *__restrict__ dt_weight, const float *__restrict__ dt_bias, const float *__restrict__ A,
    const float *__restrict__ entries, RouteT *__restrict__ y, BorderT *__restrict__ borders,
    float *__restrict__ end_state, float *__restrict__ end_sum, i64 height, i64 width, i64 dim, i64 routes,
    i64 route_kinds, i64 u_pixel, i64 u_route, i64 division, i64 chunk, i64 segment_length, i64 segments) {
    using Projection = StepProjection<STAGE, CHANNELS_A_WARP>;
    constexpr int TILES = Projection::TILES, OCTETS = Projection::OCTETS;
    __shared__ __align__(16) RowT raw_all[WARPS_A_BLOCK][2][STAGE * ROW_WIDTH];
    __shared__ __align__(16) float rows_all[HALF_ROWS ? WARPS_A_BLOCK : 1][HALF_ROWS ? STAGE * FLOATS_WIDTH : 1];
    __shared__ __align__(16) float steps_all[WARPS_A_BLOCK][STAGE * STEPS_WIDTH];
    __shared__ __align__(16) int pixel_all[WARPS_A_BLOCK][2][STAGE];

    // What this warp works on. A lane past the last channel repeats the last one, and stores the same values.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, state_lane = lane / CHANNEL_LANES;
    const int groups = (int)((dim + CHANNELS_A_WARP - 1) / CHANNELS_A_WARP);
    const int blocks = (groups + WARPS_A_BLOCK - 1) / WARPS_A_BLOCK;
    const int first = min((int)(blockIdx.x % blocks) * WARPS_A_BLOCK + warp, groups - 1) * CHANNELS_A_WARP;
    const int channel = min(first + lane % CHANNEL_LANES * CHANNELS_A_LANE, (int)dim - CHANNELS_A_LANE);
    const i64 walk = blockIdx.x / blocks;   // (image, route, segment)
    const int segment = (int)(walk % segments);
    const i64 sequence = walk / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;

    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int count = min((int)segment_length, length - start);
    const int u_stride = (int)(u_pixel * sizeof(U)), y_stride = (int)(routes * dim * sizeof(RouteT));
    const int row_stride = (int)(routes * ROW_WIDTH * sizeof(RowT)), step_stride = (int)(u_pixel * sizeof(PixelT));
    u += image * length * u_pixel + route * u_route + channel;
    if constexpr (RANK == 0) steps += image * length * u_pixel + route * u_route;
    rows += (image * length * routes + route) * ROW_WIDTH;
    if constexpr (MODE == FORWARD) {
        y += (image * length * routes + route) * dim + channel;
        if (chunk) borders += sequence * ((length + chunk - 1) / chunk - 1) * STATES * dim + channel;
    }

    Projection projection;
    projection.init(dt_weight, dt_bias, route * dim + first, route * dim + dim - 1, lane);
    float a_log[CHANNELS_A_LANE][STATES_A_LANE], h[CHANNELS_A_LANE][STATES_A_LANE], sum[CHANNELS_A_LANE];
#pragma unroll
    for (int c = 0; c < CHANNELS_A_LANE; ++c) {
        sum[c] = 0.f;
#pragma unroll
        for (int n = 0; n < STATES_A_LANE; ++n) {
            const int state = state_lane * STATES_A_LANE + n;
            a_log[c][n] = state < STATES ? A[(route * dim + channel + c) * STATES + state] : 0.f;
            h[c][n] = 0.f;
            if constexpr (MODE == FORWARD)
                if (segment > 0 && state < STATES) h[c][n] = entries[(walk * STATES + state) * dim + channel + c];
        }
    }

    // Loading runs a stage ahead of the scan.
    auto set_pixels = [&](int stage) {
        if (lane < STAGE) {
            const int step = min(stage * STAGE + lane, count - 1);
            pixel_all[warp][stage & 1][lane] =
                route_pixel(start + (MODE == ADJOINT ? count - 1 - step : step), kind, (int)height, (int)width, length,
                            division);
        }
    };
    Vec<U, CHANNELS_A_LANE> next[STAGE];
    PixelT next_steps[RANK ? 1 : OCTETS][TILES][2];
    auto load = [&](int stage) {
        const int *pixel = pixel_all[warp][stage & 1];
        load_rows<STAGE>(raw_all[warp][stage & 1], rows, pixel, row_stride, lane);
#pragma unroll
        for (int j = 0; j < STAGE; j += 4) {
            const int4 p = *reinterpret_cast<const int4 *>(pixel + j);
            next[j] = *reinterpret_cast<const Vec<U, CHANNELS_A_LANE> *>(at(u, p.x, u_stride));
            next[j + 1] = *reinterpret_cast<const Vec<U, CHANNELS_A_LANE> *>(at(u, p.y, u_stride));
            next[j + 2] = *reinterpret_cast<const Vec<U, CHANNELS_A_LANE> *>(at(u, p.z, u_stride));
            next[j + 3] = *reinterpret_cast<const Vec<U, CHANNELS_A_LANE> *>(at(u, p.w, u_stride));
        }
        if constexpr (RANK == 0)
#pragma unroll
            for (int o = 0; o < OCTETS; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        next_steps[o][t][e] = at(steps, pixel[o * 8 + lane / 4],
                                                 step_stride)[min(first + t * 8 + lane % 4 * 2 + e, (int)dim - 1)];
    };

    const int stages = (count + STAGE - 1) / STAGE;
    set_pixels(0);
    __syncwarp();
    load(0);
    for (int stage = 0; stage < stages; ++stage) {
        float now[CHANNELS_A_LANE][STAGE], w[OCTETS][TILES][2];
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
            for (int j = 0; j < STAGE; ++j) now[c][j] = next[j].get(c);
        if constexpr (RANK == 0)
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

        const RowT *raw = raw_all[warp][stage & 1];
        float *step_rows = steps_all[warp];
        convert_rows<STAGE>(rows_all[HALF_ROWS ? warp : 0], raw, lane);
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                float *to = step_rows + (o * 8 + lane / 4) * STEPS_WIDTH + t * 8 + lane % 4 * 2;
                *reinterpret_cast<float2 *>(to) = SOFTPLUS ? make_float2(softplus2(w[o][t][0]), softplus2(w[o][t][1]))
                                                           : make_float2(w[o][t][0], w[o][t][1]);
            }
        __syncwarp();
        const float *stage_rows = HALF_ROWS ? rows_all[warp] : reinterpret_cast<const float *>(raw);
        const int *pixel = pixel_all[warp][stage & 1];

        if constexpr (MODE == FORWARD) {
            const int step = start + stage * STAGE;
            if (chunk && step > 0 && step % (int)chunk == 0) {
#pragma unroll
                for (int n = 0; n < STATES_A_LANE; ++n)
                    if (state_lane * STATES_A_LANE + n < STATES)
#pragma unroll
                        for (int c = 0; c < CHANNELS_A_LANE; ++c)
                            borders[((step / (int)chunk - 1) * (i64)STATES + state_lane * STATES_A_LANE + n) * dim +
                                    c] = from_float<BorderT>(h[c][n]);
            }
        }

        auto one = [&](int j) {
            const float *row = stage_rows + j * FLOATS_WIDTH;
            float B_here[STATES_A_LANE], C_here[STATES_A_LANE], s[CHANNELS_A_LANE], out[CHANNELS_A_LANE];
            if constexpr (MODE != ADJOINT) read_states<B_AT>(B_here, row, state_lane);
            if constexpr (MODE != SUMMARY) read_states<C_AT>(C_here, row, state_lane);
            read_row<0, CHANNELS_A_LANE>(s, step_rows + j * STEPS_WIDTH + channel - first);
#pragma unroll
            for (int c = 0; c < CHANNELS_A_LANE; ++c) {
                if constexpr (MODE != FORWARD) sum[c] += s[c];
                const float su = s[c] * now[c][j];
#pragma unroll
                for (int n = 0; n < STATES_A_LANE; ++n) {
                    const float a = exp2_fast(s[c] * a_log[c][n]);
                    if constexpr (MODE == ADJOINT) {
                        h[c][n] = a * fmaf(C_here[n], now[c][j], h[c][n]);
                    } else {
                        h[c][n] = fmaf(a, h[c][n], su * B_here[n]);
                        if constexpr (MODE == FORWARD)
                            out[c] = n ? fmaf(C_here[n], h[c][n], out[c]) : C_here[n] * h[c][n];
                    }
                }
            }
            if constexpr (MODE == FORWARD) {
                using Outputs = Vec<RouteT, CHANNELS_A_LANE>;
                Outputs result;
#pragma unroll
                for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
                    for (int offset = CHANNEL_LANES; offset < 32; offset *= 2)
                        out[c] += __shfl_xor_sync(~0u, out[c], offset);
                result.set(out);
                if (STATE_LANES == 1 || state_lane == 0)
                    *reinterpret_cast<Outputs *>(at(y, pixel[j], y_stride)) = result;
            }
        };
        const int here = count - stage * STAGE;
        if (here >= STAGE) {
#pragma unroll
            for (int j = 0; j < STAGE; ++j) one(j);
        } else {   // the last stage: a step past the end must not happen
#pragma unroll
            for (int j = 0; j < STAGE; ++j)
                if (j < here) one(j);
        }
        __syncwarp();
    }
    copy_wait<0>();

    if constexpr (MODE != FORWARD) {
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c) {
            if (state_lane == 0) end_sum[walk * dim + channel + c] = sum[c];
#pragma unroll
            for (int n = 0; n < STATES_A_LANE; ++n)
                if (state_lane * STATES_A_LANE + n < STATES)
                    end_state[(walk * STATES + state_lane * STATES_A_LANE + n) * dim + channel + c] = h[c][n];
        }
    }
}

#define BOUNDS __launch_bounds__(32 * WARPS_A_BLOCK, MIN_BLOCKS)

extern "C" __global__ void BOUNDS scan_fwd_kernel(
    const PixelT *x, const PixelT *steps, const RowT *rows, const PixelT *dt_weight, const float *dt_bias,
    const float *A, const float *entries, RouteT *y, BorderT *borders, i64 height, i64 width, i64 dim, i64 routes,
    i64 route_kinds, i64 x_pixel, i64 x_route, i64 division, i64 chunk, i64 segment_length, i64 segments) {
    scan<FORWARD>(x, steps, rows, dt_weight, dt_bias, A, entries, y, borders, nullptr, nullptr, height, width, dim,
                  routes, route_kinds, x_pixel, x_route, division, chunk, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_summary_kernel(
    const PixelT *x, const PixelT *steps, const RowT *rows, const PixelT *dt_weight, const float *dt_bias,
    const float *A, float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds,
    i64 x_pixel, i64 x_route, i64 division, i64 segment_length, i64 segments) {
    scan<SUMMARY>(x, steps, rows, dt_weight, dt_bias, A, nullptr, (RouteT *)nullptr, nullptr, end_state, end_sum,
                  height, width, dim, routes, route_kinds, x_pixel, x_route, division, 0, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_adjoint_kernel(
    const OutT *dy, const PixelT *steps, const RowT *rows, const PixelT *dt_weight, const float *dt_bias,
    const float *A, float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds,
    i64 x_pixel, i64 x_route, i64 division, i64 segment_length, i64 segments) {
    scan<ADJOINT>(dy, steps, rows, dt_weight, dt_bias, A, nullptr, (RouteT *)nullptr, nullptr, end_state, end_sum,
                  height, width, dim, routes, route_kinds, x_pixel, x_route, division, 0, segment_length, segments);
}

// Passes the states over the segments: one thread a (image, route, state, channel). Forward, the states that enter the
// segments; in the adjoint direction, the gradients of those that leave them: (image, route, segment, STATES, dim).
extern "C" __global__ void scan_pass_kernel(const float *end_state, const float *end_sum, const float *A, float *to,
                                            i64 count, i64 dim, i64 routes, i64 segments, i64 adjoint) {
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= count) return;
    i64 ch = thread % dim, state = thread / dim % STATES;
    i64 sequence = thread / dim / STATES;   // (image, route)
    float a = A[((sequence % routes) * dim + ch) * STATES + state], h = 0.f;
    for (i64 i = 0; i < segments - 1; ++i) {
        i64 segment = adjoint ? segments - 1 - i : i, walk = sequence * segments + segment;
        h = fmaf(exp2_fast(end_sum[walk * dim + ch] * a), h, end_state[(walk * STATES + state) * dim + ch]);
        to[((walk + (adjoint ? -1 : 1)) * STATES + state) * dim + ch] = h;
    }
}
