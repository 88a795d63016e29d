// A warp walks one segment of one route of one image for LANES * C channels. C: channels a lane; K: steps a stage;
// WARPS: warps a block.
#include "common.cuh"

struct Place {   // what a warp works on
    i64 image;       // batch index
    int route, kind, segment, channel, lane, q;
    i64 slot;        // (image, route, segment)
};

__device__ __forceinline__ Place place(i64 routes, i64 route_kinds, i64 segments, i64 dim) {
    Place w;
    int groups = (int)((dim + LANES * C - 1) / (LANES * C));
    int blocks = (groups + WARPS - 1) / WARPS;
    w.lane = threadIdx.x % 32;
    w.q = w.lane / LANES;
    int group = blockIdx.x % blocks * WARPS + threadIdx.x / 32;
    w.channel = (group * LANES + w.lane % LANES) * C;
    w.slot = blockIdx.x / blocks;
    w.segment = (int)(w.slot % segments);
    i64 rest = w.slot / segments;
    w.route = (int)(rest % routes);
    w.kind = (int)(route_kinds >> (2 * w.route)) & 3;
    w.image = rest / routes;
    return w;
}

// C values of a pixel, zero where the channel does not exist.
template <class T> __device__ __forceinline__ Vec<T, C> load_channels(const T *src, bool exists) {
    Vec<T, C> v;
    if (exists) {
        v = *reinterpret_cast<const Vec<T, C> *>(src);
    } else {
#pragma unroll
        for (int c = 0; c < C; ++c) v.v[c] = from_float<T>(0.f);
    }
    return v;
}

// FORWARD: the scan itself. SUMMARY: a segment's end state from a zero start, and the sum of its steps. ADJOINT: the same
// for the gradient's recurrence, walked backwards: g = C dy + carry, carry = a g.
enum Mode { FORWARD, SUMMARY, ADJOINT };

template <Mode MODE, class U>
__device__ __forceinline__ void scan(
    const U *__restrict__ u, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, Y *__restrict__ y, float *__restrict__ borders,
    float *__restrict__ end_state, float *__restrict__ end_sum, i64 height, i64 width, i64 dim, i64 routes,
    i64 route_kinds, i64 u_pixel, i64 u_route, i64 chunk, i64 segment_length, i64 segments) {
    constexpr bool CONVERT = sizeof(P) == 2;
    __shared__ __align__(16) P raw_all[WARPS][2][K * ROW];
    __shared__ __align__(16) float rows_all[CONVERT ? WARPS : 1][CONVERT ? K * ROW : 1];
    __shared__ int pixel_all[WARPS][2][K];

    Place w = place(routes, route_kinds, segments, dim);
    const int warp = threadIdx.x / 32, lane = w.lane;
    const bool exists = w.channel < dim;
    const int length = (int)(height * width);
    const int start = (int)(w.segment * segment_length);
    const int count = min((int)segment_length, length - start);
    const int u_stride = (int)u_pixel, y_stride = (int)(routes * dim), row_stride = (int)(routes * ROW);
    u += w.image * length * u_pixel + w.route * u_route + w.channel;
    if constexpr (R == 0) steps += w.image * length * u_pixel + w.route * u_route + w.channel;
    rows += (w.image * length * routes + w.route) * ROW;
    if constexpr (MODE == FORWARD) y += w.image * length * y_stride + w.route * dim + w.channel;
    const i64 chunks = chunk ? (length + chunk - 1) / chunk : 1;
    if constexpr (MODE == FORWARD)
        borders += (w.image * routes + w.route) * (chunks - 1) * N * dim + w.channel;

    float a_log[C][NS], h[C][NS], bias[C], weight[C][R ? R : 1], sum[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const i64 ch = w.route * dim + w.channel + c;
        bias[c] = exists && dt_bias ? dt_bias[ch] * LOG2E : 0.f;
        sum[c] = 0.f;
#pragma unroll
        for (int r = 0; r < R; ++r) weight[c][r] = exists ? to_float(dt_weight[ch * R + r]) * LOG2E : 0.f;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int state = w.q * NS + n;
            a_log[c][n] = exists && state < N ? A[ch * N + state] : 0.f;
            h[c][n] = 0.f;
            if constexpr (MODE == FORWARD)
                if (w.segment > 0 && exists && state < N)
                    h[c][n] = borders[((start / chunk - 1) * N + state) * dim + c];
        }
    }

    auto set_pixels = [&](int stage) {
        if (lane < K) {
            int step = min(stage * K + lane, count - 1);
            step = MODE == ADJOINT ? start + count - 1 - step : start + step;
            pixel_all[warp][stage & 1][lane] = route_pixel(step, w.kind, (int)height, (int)width);
        }
    };
    Vec<U, C> next[K];
    Vec<X, C> next_step[R ? 1 : K];
    auto load = [&](int stage) {
        const int *pixel = pixel_all[warp][stage & 1];
        load_rows<K>(raw_all[warp][stage & 1], rows, pixel, row_stride, lane);
#pragma unroll
        for (int j = 0; j < K; ++j) {
            next[j] = load_channels(u + (i64)pixel[j] * u_stride, exists);
            if constexpr (R == 0) next_step[j] = load_channels(steps + (i64)pixel[j] * u_stride, exists);
        }
    };

    const int stages = (count + K - 1) / K;
    set_pixels(0);
    __syncwarp();
    load(0);
    for (int stage = 0; stage < stages; ++stage) {
        float now[C][K], step_now[C][R ? 1 : K];
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int j = 0; j < K; ++j) {
                now[c][j] = to_float(next[j].v[c]);
                if constexpr (R == 0) step_now[c][j] = to_float(next_step[j].v[c]);
            }
        set_pixels(stage + 1);
        __syncwarp();
        load(stage + 1);
        copy_wait<1>();
        __syncwarp();
        convert_rows<K>(rows_all[CONVERT ? warp : 0], raw_all[warp][stage & 1], lane);
        if constexpr (CONVERT) __syncwarp();
        const float *stage_rows = CONVERT ? rows_all[warp] : reinterpret_cast<const float *>(raw_all[warp][stage & 1]);
        const int *pixel = pixel_all[warp][stage & 1];

        if constexpr (MODE == FORWARD) {
            const int step = start + stage * K;
            if (chunk && stage > 0 && step % (int)chunk == 0 && exists) {
#pragma unroll
                for (int n = 0; n < NS; ++n)
                    if (w.q * NS + n < N)
#pragma unroll
                        for (int c = 0; c < C; ++c)
                            borders[((step / (int)chunk - 1) * (i64)N + w.q * NS + n) * dim + c] = h[c][n];
            }
        }

        auto one = [&](int j) {
            const float *row = stage_rows + j * ROW;
            float dt[R ? R : 1], b[NS], cc[NS], out[C];
            read_row<0, R>(dt, row);
            if constexpr (MODE != ADJOINT) read_states<B0>(b, row, w.q);
            if constexpr (MODE != SUMMARY) read_states<C0>(cc, row, w.q);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                float v = bias[c];
                if constexpr (R == 0) v = fmaf(step_now[c][j], LOG2E, v);
#pragma unroll
                for (int r = 0; r < R; ++r) v = fmaf(dt[r], weight[c][r], v);
                const float s = SOFTPLUS ? softplus2(v) : v;
                if constexpr (MODE != FORWARD) sum[c] += s;
                const float su = s * now[c][j];
                out[c] = 0.f;
#pragma unroll
                for (int n = 0; n < NS; ++n) {
                    const float a = exp2_fast(s * a_log[c][n]);
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
                for (int c = 0; c < C; ++c) {
#pragma unroll
                    for (int offset = LANES; offset < 32; offset *= 2) out[c] += __shfl_xor_sync(~0u, out[c], offset);
                    result.v[c] = from_float<Y>(out[c]);
                }
                if (exists && w.q == 0) *reinterpret_cast<Vec<Y, C> *>(y + (i64)pixel[j] * y_stride) = result;
            }
        };
        const int steps_here = count - stage * K;
        if (steps_here >= K) {
#pragma unroll
            for (int j = 0; j < K; ++j) one(j);
        } else {
#pragma unroll
            for (int j = 0; j < K; ++j)
                if (j < steps_here) one(j);
        }
        __syncwarp();
    }
    copy_wait<0>();

    if constexpr (MODE != FORWARD) {
        if (exists) {
#pragma unroll
            for (int c = 0; c < C; ++c) {
                if (w.q == 0) end_sum[w.slot * dim + w.channel + c] = sum[c];
#pragma unroll
                for (int n = 0; n < NS; ++n)
                    if (w.q * NS + n < N)
                        end_state[(w.slot * N + w.q * NS + n) * dim + w.channel + c] =
                            MODE == ADJOINT ? h[c][n] * LN2 : h[c][n];
            }
        }
    }
}

#define BOUNDS __launch_bounds__(32 * WARPS, MIN_BLOCKS)

extern "C" __global__ void BOUNDS scan_fwd_kernel(
    const X *x, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A, Y *y,
    float *borders, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel, i64 x_route, i64 chunk,
    i64 segment_length, i64 segments) {
    scan<FORWARD>(x, steps, rows, dt_weight, dt_bias, A, y, borders, nullptr, nullptr, height, width, dim, routes,
                  route_kinds, x_pixel, x_route, chunk, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_summary_kernel(
    const X *x, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A,
    float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 segment_length, i64 segments) {
    scan<SUMMARY>(x, steps, rows, dt_weight, dt_bias, A, (Y *)nullptr, nullptr, end_state, end_sum, height, width, dim,
                  routes, route_kinds, x_pixel, x_route, 0, segment_length, segments);
}

extern "C" __global__ void BOUNDS scan_adjoint_kernel(
    const G *dy, const X *steps, const P *rows, const X *dt_weight, const float *dt_bias, const float *A,
    float *end_state, float *end_sum, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 segment_length, i64 segments) {
    scan<ADJOINT>(dy, steps, rows, dt_weight, dt_bias, A, (Y *)nullptr, nullptr, end_state, end_sum, height, width, dim,
                  routes, route_kinds, x_pixel, x_route, 0, segment_length, segments);
}

// Passes the states over the segments: one thread a (image, route, state, channel). Forward, segment i's entry goes to the
// border at its start; in the adjoint direction to exits[image, route, segment].
extern "C" __global__ void scan_borders_kernel(const float *end_state, const float *end_sum, const float *A,
                                               float *borders, i64 count, i64 dim, i64 routes, i64 segments,
                                               i64 chunks_per_segment, i64 borders_per_route, i64 adjoint) {
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= count) return;
    i64 ch = thread % dim, state = thread / dim % N, sequence = thread / dim / N;   // sequence: (image, route)
    float a = A[((sequence % routes) * dim + ch) * N + state], h = 0.f;
    for (i64 i = 0; i < segments - 1; ++i) {
        i64 segment = adjoint ? segments - 1 - i : i, slot = sequence * segments + segment;
        h = fmaf(exp2_fast(end_sum[slot * dim + ch] * a), h, end_state[(slot * N + state) * dim + ch]);
        i64 border = adjoint ? segment - 1 : (i + 1) * chunks_per_segment - 1;
        borders[((sequence * borders_per_route + border) * N + state) * dim + ch] = h;
    }
}
