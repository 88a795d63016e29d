// The gradient of one segment of one route of one image, for WARPS * CW channels a block: chunk by chunk from the end, each
// chunk's states recomputed from its border. C: channels a lane; SUB: steps whose states and decays are held in registers.
#include "common.cuh"

constexpr int CW = LANES * C;                          // channels a warp
constexpr int NSP = NS <= 1 ? 1 : NS <= 2 ? 2 : 4;     // states a lane, a power of two (NS <= 4)
constexpr int GROUP = LANES > 2 * NSP ? LANES / (2 * NSP) : 1;   // steps whose dB and dC are reduced together
constexpr int ITEM_STEPS = S / C > 1 ? S / C : 1;      // steps whose sums over states are reduced together
static_assert(NS <= 4 && CW <= 32 && SUB % GROUP == 0 && SUB % ITEM_STEPS == 0 && (C == 1 || C <= S), "layout");

// Sums of COUNT values over the lanes that differ in bits FIRST .. FIRST * LANES_ - 1 of their number, by exchanging halves:
// afterwards a lane holds COUNT / LANES_ of the sums, starting at (its index) * COUNT / LANES_.
template <int COUNT, int FIRST, int LANES_> __device__ __forceinline__ void reduce_scatter(float *v, int lane) {
    if constexpr (LANES_ > 1) {
        static_assert(COUNT % 2 == 0, "halves");
        constexpr int HALF = COUNT / 2, BIT = FIRST * LANES_ / 2;
        const bool upper = lane & BIT;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float give = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
            v[i] = keep + __shfl_xor_sync(~0u, give, BIT);
        }
        reduce_scatter<HALF, FIRST, LANES_ / 2>(v, lane);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_bwd_kernel(
    const X *__restrict__ x, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const G *__restrict__ dy,
    const float *__restrict__ borders, const float *__restrict__ exits, Y *__restrict__ dx, P *__restrict__ ddt,
    float *__restrict__ dbc, float *__restrict__ dA, float *__restrict__ dbias, float *__restrict__ dD, i64 pixels,
    i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel, i64 x_route, i64 chunk,
    i64 segment_length, i64 segments) {
    constexpr bool CONVERT = sizeof(P) == 2;
    constexpr int RAW = CONVERT ? SUB * ROW / 2 : 0;          // floats of a warp's copied rows
    constexpr int PAIRS = C * NS, CELLS = 2 * NP;
    extern __shared__ __align__(16) float shared[];
    __shared__ int pixel_all[WARPS][SUB];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cl = lane % LANES, q = lane / LANES;
    const int subs_max = (int)((chunk + SUB - 1) / SUB);

    // Shared memory: reduction cells [2][WARPS][SUB][CELLS], then a warp's rows, scalars and sub-chunk states.
    float *cells = shared;
    float *own = shared + 2 * WARPS * SUB * CELLS + warp * (SUB * ROW + RAW + SUB * CW * 4 + (subs_max - 1) * PAIRS * 32);
    float *row_buffer = own;
    P *raw = reinterpret_cast<P *>(CONVERT ? own + SUB * ROW : own);
    float4 *scalars = reinterpret_cast<float4 *>(own + SUB * ROW + RAW);   // [SUB][CW]: s, x, sigmoid, dy ln 2
    float *states = own + SUB * ROW + RAW + SUB * CW * 4;                    // [subs_max - 1][PAIRS][32]
    int *pixel = pixel_all[warp];

    const int tiles = (int)((dim + WARPS * CW - 1) / (WARPS * CW)), tile = blockIdx.x % tiles;
    const i64 slot = blockIdx.x / tiles;   // (image, route, segment)
    const int segment = (int)(slot % segments);
    const i64 sequence = slot / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;
    const int first = (tile * WARPS + warp) * CW;   // of the warp's channels
    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int end = min(start + (int)segment_length, length);
    const int x_stride = (int)x_pixel, y_stride = (int)(routes * dim), row_stride = (int)(routes * ROW);
    const i64 borders_per_route = (length + chunk - 1) / chunk - 1;

    // Loading is by item: one channel of the warp, every (32 / CW)-th step.
    const int item = lane % CW, item_step = lane / CW, item_channel = first + item;
    const bool item_exists = item_channel < dim;
    const i64 item_row = route * dim + item_channel;
    x += image * length * x_pixel + route * x_route + item_channel;
    if constexpr (R == 0) steps += image * length * x_pixel + route * x_route + item_channel;
    dy += image * length * x_pixel + route * x_route + item_channel;
    rows += (image * length * routes + route) * ROW;
    dx += image * length * y_stride + route * dim;
    ddt += image * length * y_stride + route * dim;
    dbc += ((tile * pixels + image * length) * routes + route) * CELLS;
    const float item_bias = item_exists && dt_bias ? dt_bias[item_row] * LOG2E : 0.f;

    float a_log[C][NS], carry[C][NS], da[C][NS], h[C][NS];
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int ch = first + c * LANES + cl, state = q * NS + n;
            const bool real = ch < dim && state < N;
            a_log[c][n] = real ? A[(route * dim + ch) * N + state] : 0.f;
            carry[c][n] = real && segment < segments - 1 ? exits[(slot * N + state) * dim + ch] : 0.f;
            da[c][n] = 0.f;
        }
    float bias_sum = 0.f, d_sum = 0.f;

    // Rows and scalars of the SUB steps from l0; steps past the end get s = x = dy = 0: they change nothing.
    auto prepare = [&](int l0, bool gradient) {
        __syncwarp();
        if (lane < SUB) pixel[lane] = route_pixel(min(l0 + lane, end - 1), kind, (int)height, (int)width);
        __syncwarp();
        load_rows<SUB>(raw, rows, pixel, row_stride, lane);
        constexpr int EACH = SUB * CW / 32;
        float u[EACH], g[EACH], v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int j = i * (32 / CW) + item_step;
            const bool real = item_exists && l0 + j < end;
            const i64 offset = (i64)pixel[j] * x_stride;
            u[i] = real ? to_float(x[offset]) : 0.f;
            v[i] = item_bias;
            if constexpr (R == 0) v[i] = real ? fmaf(to_float(steps[offset]), LOG2E, v[i]) : 0.f;
            g[i] = gradient && real ? to_float(dy[offset]) * LN2 : 0.f;
        }
        copy_wait<0>();
        __syncwarp();
        convert_rows<SUB>(row_buffer, raw, lane);
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r += 4) {
            float weight[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                weight[k] = r + k < R && item_exists ? to_float(dt_weight[item_row * R + r + k]) * LOG2E : 0.f;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const float *row = row_buffer + (i * (32 / CW) + item_step) * ROW + r;
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (r + k < R) v[i] = fmaf(row[k], weight[k], v[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int j = i * (32 / CW) + item_step;
            const float s = l0 + j >= end ? 0.f : SOFTPLUS ? softplus2(v[i]) : v[i];
            const float sigmoid = SOFTPLUS && gradient ? sigmoid2(v[i]) : 1.f;
            scalars[j * CW + item] = make_float4(s, u[i], sigmoid, g[i]);
        }
        __syncwarp();
    };
    // One step of the recurrence for the lane's states; decay gets 2^(s A).
    auto advance = [&](int j, float (*decay)[NS]) {
        float b[NS];
        read_states<B0>(b, row_buffer + j * ROW, q);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const float4 k = scalars[j * CW + c * LANES + cl];
            const float su = k.x * k.y;
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                decay[c][n] = exp2_fast(k.x * a_log[c][n]);
                h[c][n] = fmaf(decay[c][n], h[c][n], su * b[n]);
            }
        }
    };

    int buffer = 0;
    for (int c0 = start + (end - 1 - start) / (int)chunk * (int)chunk; c0 >= start; c0 -= (int)chunk) {
        const int subs = (min((int)chunk, end - c0) + SUB - 1) / SUB;
        float entry[C][NS];
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                const int ch = first + c * LANES + cl, state = q * NS + n;
                entry[c][n] = c0 > 0 && ch < dim && state < N
                    ? borders[((sequence * borders_per_route + c0 / chunk - 1) * N + state) * dim + ch] : 0.f;
                h[c][n] = entry[c][n];
            }
        for (int sub = 0; sub < subs - 1; ++sub) {
            prepare(c0 + sub * SUB, false);
#pragma unroll
            for (int j = 0; j < SUB; ++j) {
                float decay[C][NS];
                advance(j, decay);
            }
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int n = 0; n < NS; ++n) states[(sub * PAIRS + c * NS + n) * 32 + lane] = h[c][n];
        }

        for (int sub = subs - 1; sub >= 0; --sub) {
            const int l0 = c0 + sub * SUB;
            prepare(l0, true);
            float before[SUB][C][NS], decay[SUB][C][NS];
#pragma unroll
            for (int c = 0; c < C; ++c)
#pragma unroll
                for (int n = 0; n < NS; ++n)
                    h[c][n] = sub ? states[((sub - 1) * PAIRS + c * NS + n) * 32 + lane] : entry[c][n];
#pragma unroll
            for (int j = 0; j < SUB; ++j) {
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int n = 0; n < NS; ++n) before[j][c][n] = h[c][n];
                advance(j, decay[j]);
            }

            float sums[GROUP * 2 * NSP], items[ITEM_STEPS * C * 2];
            float *cell = cells + (buffer * WARPS + warp) * SUB * CELLS;
#pragma unroll
            for (int j = SUB - 1; j >= 0; --j) {
                float b[NS], cc[NS];
                read_states<B0>(b, row_buffer + j * ROW, q);
                read_states<C0>(cc, row_buffer + j * ROW, q);
                float *sum = sums + j % GROUP * 2 * NSP;
#pragma unroll
                for (int i = 0; i < 2 * NSP; ++i) sum[i] = 0.f;
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    const float4 k = scalars[j * CW + c * LANES + cl];
                    const float su = k.x * k.y;
                    float by_b = 0.f, by_a = 0.f;
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        const float after = j + 1 < SUB ? before[j + 1 < SUB ? j + 1 : 0][c][n] : h[c][n];
                        const float g = fmaf(cc[n], k.w, carry[c][n]);
                        sum[n] = fmaf(g, su, sum[n]);
                        sum[NSP + n] = fmaf(after, k.w, sum[NSP + n]);
                        by_b = fmaf(g, b[n], by_b);
                        carry[c][n] = decay[j][c][n] * g;
                        const float ga = carry[c][n] * before[j][c][n];
                        by_a = fmaf(ga, a_log[c][n], by_a);
                        da[c][n] = fmaf(ga, k.x, da[c][n]);
                    }
                    float *slot_item = items + (j % ITEM_STEPS * C + c) * 2;
                    slot_item[0] = by_b;
                    slot_item[1] = by_a;
                }
                if (j % GROUP == 0) {
                    reduce_scatter<GROUP * 2 * NSP, 1, LANES>(sums, lane);
                    constexpr int HELD = GROUP * 2 * NSP / LANES;
#pragma unroll
                    for (int i = 0; i < HELD; ++i) {
                        const int index = cl * HELD + i, n = index % NSP, which = index / NSP % 2, step = index / NSP / 2;
                        if (n < NS) cell[(j + step) * CELLS + which * NP + q * NS + n] = sums[i];
                    }
                }
                if (j % ITEM_STEPS == 0) {
                    reduce_scatter<ITEM_STEPS * C * 2, LANES, S>(items, lane);
                    const int step = j + q / C, within = q % C * LANES + cl, ch = first + within;
                    const float4 k = scalars[step * CW + within];
                    const float d_step = k.z * fmaf(LOG2E * k.y, items[0], items[1]);
                    if (ch < dim && l0 + step < end) {
                        const i64 offset = (i64)pixel[step] * y_stride + ch;
                        dx[offset] = from_float<Y>(k.x * items[0]);
                        ddt[offset] = from_float<P>(d_step);
                        bias_sum += d_step;
                        d_sum = fmaf(k.y, k.w, d_sum);
                    }
                }
            }

            __syncthreads();
            for (int i = threadIdx.x; i < SUB * CELLS; i += 32 * WARPS) {
                const int j = i / CELLS;
                if (l0 + j < end) {
                    float sum = 0.f;
#pragma unroll
                    for (int other = 0; other < WARPS; ++other)
                        sum += cells[(buffer * WARPS + other) * SUB * CELLS + i];
                    dbc[(i64)pixel[j] * routes * CELLS + i % CELLS] = sum;
                }
            }
            buffer ^= 1;
        }
    }

#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int ch = first + c * LANES + cl, state = q * NS + n;
            if (ch < dim && state < N) dA[(slot * N + state) * dim + ch] = da[c][n] * LN2;
        }
#pragma unroll
    for (int offset = LANES * C; offset < 32; offset *= 2) {
        bias_sum += __shfl_xor_sync(~0u, bias_sum, offset);
        d_sum += __shfl_xor_sync(~0u, d_sum, offset);
    }
    const int ch = first + q % C * LANES + cl;
    if (q < C && ch < dim) {
        dbias[slot * dim + ch] = bias_sum;
        dD[slot * dim + ch] = d_sum * LOG2E;
    }
}
