// The gradient of one segment of one route of one image, for WARPS * CW channels a block: chunk by chunk from the end, each
// chunk's states recomputed from its border. C: channels a lane; SUB: steps whose states and
// decays are held in registers; CHUNK: steps between borders, a multiple of SUB; EVEN: whether dim is.
#include "common.cuh"

constexpr int CW = LANES * C;                          // channels a warp
constexpr int SUBS = CHUNK / SUB;                      // sub-chunks a chunk
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

// Two neighbouring channels of a pixel, zero where they or the step do not exist. EVEN: dim is, so both or none exist.
template <class T> __device__ __forceinline__ Vec<T, 2> load_pair(const T *pixel, int channel, int dim, bool inside) {
    Vec<T, 2> v = {};
    if constexpr (EVEN) {
        if (inside && channel < dim) v = *reinterpret_cast<const Vec<T, 2> *>(pixel + channel);
    } else {
        float two[2] = {0.f, 0.f};
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (inside && channel + e < dim) two[e] = to_float(pixel[channel + e]);
        v.set(two);
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_bwd_kernel(
    const X *__restrict__ x, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const G *__restrict__ dy,
    const float *__restrict__ borders, const float *__restrict__ exits, Y *__restrict__ dx, P *__restrict__ ddt,
    float *__restrict__ dbc, float *__restrict__ dA, float *__restrict__ dbias, float *__restrict__ dD, i64 pixels,
    i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel, i64 x_route,
    i64 segment_length, i64 segments) {
    using Projection = StepProjection<SUB, CW>;
    constexpr int TILES = Projection::TILES, OCTETS = Projection::OCTETS;
    constexpr int PAIRS = C * NS, CELLS = 2 * NP;
    constexpr int RAW = 2 * SUB * ROW * sizeof(P) / 4, ROWS = CONVERT ? SUB * RS : 0;   // floats of a warp's rows: the
    // copies of this sub-chunk and the next, and B and C as float32
    extern __shared__ __align__(16) float shared[];
    __shared__ int pixel_all[WARPS][2][SUB];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cl = lane % LANES, q = lane / LANES;

    // Shared memory: reduction cells [2][WARPS][SUB][CELLS], then a warp's rows, scalars and sub-chunk states.
    float *cells = shared;
    float *own = shared + 2 * WARPS * SUB * CELLS + warp * (RAW + ROWS + SUB * CW * 4 + (SUBS - 1) * PAIRS * 32);
    P *raw_both = reinterpret_cast<P *>(own);
    float4 *scalars = reinterpret_cast<float4 *>(own + RAW + ROWS);   // [SUB][CW]: s, x, sigmoid, dy ln 2
    float *states = own + RAW + ROWS + SUB * CW * 4;                  // [SUBS - 1][PAIRS][32]

    const int tiles = (int)((dim + WARPS * CW - 1) / (WARPS * CW)), tile = blockIdx.x % tiles;
    const i64 slot = blockIdx.x / tiles;   // (image, route, segment)
    const int segment = (int)(slot % segments);
    const i64 sequence = slot / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;
    const int first = (tile * WARPS + warp) * CW;   // of the warp's channels
    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int end = min(start + (int)segment_length, length);
    const int x_stride = (int)(x_pixel * sizeof(X)), dy_stride = (int)(x_pixel * sizeof(G));
    const int row_stride = (int)(routes * ROW * sizeof(P));
    const int dx_stride = (int)(routes * dim * sizeof(Y)), ddt_stride = (int)(routes * dim * sizeof(P));
    const i64 borders_per_route = (length + CHUNK - 1) / CHUNK - 1;

    x += image * length * x_pixel + route * x_route;
    if constexpr (R == 0) steps += image * length * x_pixel + route * x_route;
    dy += image * length * x_pixel + route * x_route;
    rows += (image * length * routes + route) * ROW;
    dx += (image * length * routes + route) * dim;
    ddt += (image * length * routes + route) * dim;
    dbc += ((tile * pixels + image * length) * routes + route) * CELLS;

    Projection projection;
    projection.init(dt_weight, dt_bias, route * dim + first, route * dim + dim - 1, lane);
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

    // Sub-chunks are read one ahead of their use: fetch starts the reads of one, prepare takes what was fetched last into
    // rows and scalars and fetches the next. Steps past the end get s = x = dy = 0, channels past the last x = dy = 0: they
    // change nothing.
    int fetched = 1;   // which of the two buffers
    Vec<X, 2> next_x[OCTETS][TILES], next_steps[R ? 1 : OCTETS][R ? 1 : TILES];
    Vec<G, 2> next_dy[OCTETS][TILES];
    auto fetch = [&](int l0) {
        fetched ^= 1;
        int *pixel = pixel_all[warp][fetched];
        if (lane < SUB) pixel[lane] = route_pixel(max(min(l0 + lane, end - 1), 0), kind, (int)height, (int)width);
        __syncwarp();
        load_rows<SUB>(raw_both + fetched * SUB * ROW, rows, pixel, row_stride, lane);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o) {
            const int step = o * 8 + lane / 4, at_pixel = pixel[step];
            const bool inside = l0 + step < end;
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int ch = first + t * 8 + lane % 4 * 2;
                next_x[o][t] = load_pair(at(x, at_pixel, x_stride), ch, (int)dim, inside);
                next_dy[o][t] = load_pair(at(dy, at_pixel, dy_stride), ch, (int)dim, inside);
                if constexpr (R == 0) next_steps[o][t] = load_pair(at(steps, at_pixel, x_stride), ch, (int)dim, inside);
            }
        }
    };
    const int *pixel;
    const float *row_buffer;
    auto prepare = [&](int l0, int next_l0) {
        float w[OCTETS][TILES][2], u[OCTETS][TILES][2], g[OCTETS][TILES][2];
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    u[o][t][e] = next_x[o][t].get(e);
                    g[o][t][e] = next_dy[o][t].get(e);
                    if constexpr (R == 0) w[o][t][e] = next_steps[o][t].get(e);
                }
        const P *raw = raw_both + fetched * SUB * ROW;
        pixel = pixel_all[warp][fetched];
        copy_wait<0>();
        __syncwarp();   // also: nobody still reads what is overwritten now
        fetch(next_l0);
        if constexpr (CONVERT) {
            convert_rows<SUB>(own + RAW, raw, lane);
            row_buffer = own + RAW;
        } else {
            row_buffer = reinterpret_cast<const float *>(raw);
        }
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int step = o * 8 + lane / 4, within = t * 8 + lane % 4 * 2 + e;
                    const float v = w[o][t][e];
                    const float s = l0 + step >= end ? 0.f : SOFTPLUS ? softplus2(v) : v;
                    if (CW % 8 == 0 || within < CW)
                        scalars[step * CW + within] =
                            make_float4(s, u[o][t][e], SOFTPLUS ? sigmoid2(v) : 1.f, g[o][t][e] * LN2);
                }
        __syncwarp();
    };
    // One step of the recurrence for the lane's states; decay gets 2^(s A).
    auto advance = [&](int j, float (*decay)[NS]) {
        float b[NS];
        read_states<RB>(b, row_buffer + j * RS, q);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const float2 k = *reinterpret_cast<const float2 *>(scalars + j * CW + c * LANES + cl);
            const float su = k.x * k.y;
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                decay[c][n] = exp2_fast(k.x * a_log[c][n]);
                h[c][n] = fmaf(decay[c][n], h[c][n], su * b[n]);
            }
        }
    };

    int buffer = 0;
    const int last_chunk = start + (end - 1 - start) / CHUNK * CHUNK;
    fetch(last_chunk);
    for (int c0 = last_chunk; c0 >= start; c0 -= CHUNK) {
        const int subs = SUBS == 1 ? 1 : (min(CHUNK, end - c0) + SUB - 1) / SUB;
        float entry[C][NS];
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                const int ch = first + c * LANES + cl, state = q * NS + n;
                entry[c][n] = c0 > 0 && ch < dim && state < N
                    ? borders[((sequence * borders_per_route + c0 / CHUNK - 1) * N + state) * dim + ch] : 0.f;
                h[c][n] = entry[c][n];
            }
        for (int sub = 0; sub < subs - 1; ++sub) {
            prepare(c0 + sub * SUB, c0 + (sub + 1) * SUB);
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
            prepare(l0, sub ? l0 - SUB : c0 - CHUNK);
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
                read_states<RB>(b, row_buffer + j * RS, q);
                read_states<RC>(cc, row_buffer + j * RS, q);
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
                        at(dx, pixel[step], dx_stride)[ch] = from_float<Y>(k.x * items[0]);
                        at(ddt, pixel[step], ddt_stride)[ch] = from_float<P>(d_step);
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

    copy_wait<0>();
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
