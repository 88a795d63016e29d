// The gradient of one segment of one route of one image, for WARPS * CW channels a block: chunk by chunk from the end,
// each chunk's states recomputed from its border, first in passing (keeping those at sub-chunk starts), then sub-chunk
// by sub-chunk from the end with all states at hand. C: channels a lane; SUB: steps of a sub-chunk; CHUNK: steps
// between borders, a multiple of SUB; EVEN: whether dim is; TILED: whether several blocks share the channels, so that
// sums over channels are partial.
#include "scan_bwd.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_bwd_kernel(
    const X *__restrict__ x, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const G *__restrict__ dy,
    const float *__restrict__ borders, const float *__restrict__ exits, Y *__restrict__ dx, P *__restrict__ ddt,
    Cell *__restrict__ d_rows, float *__restrict__ d_dt_weight, float *__restrict__ dA, float *__restrict__ dbias,
    float *__restrict__ dD, i64 pixels, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 division, i64 segment_length, i64 segments) {
    using Projection = StepProjection<SUB, CW>;
    constexpr int TILES = Projection::TILES, OCTETS = Projection::OCTETS;
    extern __shared__ __align__(16) float shared[];
    __shared__ __align__(16) int pixel_all[WARPS][2][SUB];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cl = lane % LANES, q = lane / LANES;
    float *own = shared + warp * OWN;
    Item *items = reinterpret_cast<Item *>(own + STEPS_AT);
    float *sigmoids = own + SIGMOIDS_AT;
    float *states = own + STATES_AT;

    const int tiles = (int)((dim + WARPS * CW - 1) / (WARPS * CW)), tile = blockIdx.x % tiles;
    const i64 slot = blockIdx.x / tiles;   // (image, route, segment)
    const int segment = (int)(slot % segments);
    const i64 sequence = slot / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;
    const int first = (tile * WARPS + warp) * CW;   // of the warp's channels
    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int end = min(start + (int)segment_length, length);
    const int x_stride = (int)(x_pixel * sizeof(X)), dy_stride = (int)(x_pixel * sizeof(G));
    const int row_stride = (int)(routes * ROW * sizeof(P)), d_row_stride = (int)(routes * ROW * sizeof(Cell));
    const int dx_stride = (int)(routes * dim * sizeof(Y)), ddt_stride = (int)(routes * dim * sizeof(P));

    x += image * length * x_pixel + route * x_route;
    if constexpr (R == 0) steps += image * length * x_pixel + route * x_route;
    dy += image * length * x_pixel + route * x_route;
    rows += (image * length * routes + route) * ROW;
    borders += (sequence * ((length + CHUNK - 1) / CHUNK - 1) * N + q * NS) * dim + first + cl;
    // What the lane writes: one channel of every C-th state group's step.
    const int within = q % C * LANES + cl, existing = (int)dim - first;
    dx += (image * length * routes + route) * dim + first + within;
    ddt += (image * length * routes + route) * dim + first + within;
    d_rows += ((tile * pixels + image * length) * routes + route) * ROW;

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
    for (int i = lane; i < SUB * ROW; i += 32) own[CELLS_AT + i] = 0.f;   // some columns are never written
    if constexpr (FUSED) {
        for (int i = lane; i < SUB * TILE_WIDTH / 2; i += 32) own[TILE_AT + i] = 0.f;
        for (int i = lane; i < WEIGHT_TILES * DEPTH * 128; i += 32) own[WEIGHT_SUM_AT + i] = 0.f;
#pragma unroll
        for (int t = 0; t < TILE_ROWS / 8; ++t)
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) {   // dt_weight of two channels for one column
                const int ch = first + t * 8 + lane % 4 * 2, r = k * 8 + lane / 4;
                const X *at_weight = dt_weight + (route * dim + ch) * R + r;
                const unsigned low = ch < dim && r < R ? bits(at_weight[0]) : 0;
                const unsigned high = ch + 1 < dim && r < R ? bits(at_weight[R]) : 0;
                reinterpret_cast<unsigned *>(own + WEIGHT_AT)[(t * DEPTH + k) * 32 + lane] = low | high << 16;
            }
    }

    // Sub-chunks are read one ahead of their use: fetch starts the reads of one, prepare takes what was fetched last
    // into rows and scalars and fetches the next. Steps past the end get s = x = dy = 0, channels past the last x = dy
    // = 0: they change nothing.
    int fetched = 1;   // which of the two buffers
    Vec<X, 2> next_x[OCTETS][TILES], next_steps[R ? 1 : OCTETS][R ? 1 : TILES];
    Vec<G, 2> next_dy[OCTETS][TILES];
    float border[C][NS];   // fetched too where every sub-chunk is a chunk
    auto read_border = [&](float (*to)[NS], int chunk) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n)
                to[c][n] = chunk > 0 && first + c * LANES + cl < dim && q * NS + n < N
                    ? borders[((chunk - 1) * (i64)N + n) * dim + c * LANES] : 0.f;
    };
    auto fetch = [&](int l0) {
        if constexpr (SUBS == 1) read_border(border, l0 / CHUNK);
        fetched ^= 1;
        int *pixel = pixel_all[warp][fetched];
        if (lane < SUB)
            pixel[lane] =
                route_pixel(max(min(l0 + lane, end - 1), 0), kind, (int)height, (int)width, length, division);
        __syncwarp();
        load_rows<SUB>(reinterpret_cast<P *>(own + RAW_AT + fetched * RAW), rows, pixel, row_stride, lane);
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
    const P *raw;
    const float *row_buffer;
    auto prepare = [&](int l0, int next_l0, bool gradient) {
        float w[OCTETS][TILES][2];
        Vec<X, 2> now_x[OCTETS][TILES];
        Vec<G, 2> now_dy[OCTETS][TILES];
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                now_x[o][t] = next_x[o][t], now_dy[o][t] = next_dy[o][t];
                if constexpr (R == 0) w[o][t][0] = next_steps[o][t].get(0), w[o][t][1] = next_steps[o][t].get(1);
            }
        raw = reinterpret_cast<const P *>(own + RAW_AT + fetched * RAW);
        pixel = pixel_all[warp][fetched];
        copy_wait<0>();
        __syncwarp();   // also: nobody still reads what is overwritten now
        fetch(next_l0);
        convert_rows<SUB>(own + ROWS_AT, raw, lane);
        row_buffer = CONVERT ? own + ROWS_AT : reinterpret_cast<const float *>(raw);
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < OCTETS; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int step = o * 8 + lane / 4, within = t * 8 + lane % 4 * 2;
                const bool inside = l0 + step < end;
                Pair<Item> both;
                Pair<float> sigmoid;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float v = w[o][t][e];
                    both.v[e].set(inside ? SOFTPLUS ? softplus2(v) : v : 0.f, now_x[o][t], now_dy[o][t], e);
                    sigmoid.v[e] = SOFTPLUS && gradient ? sigmoid2(v) : 1.f;
                }
                if (CW % 8 == 0 || within < CW) {
                    *reinterpret_cast<Pair<Item> *>(items + step * IW + within) = both;
                    if (gradient) *reinterpret_cast<Pair<float> *>(sigmoids + step * IW + within) = sigmoid;
                }
            }
        __syncwarp();
    };
    // One step of the recurrence for the lane's states.
    auto advance = [&](int j) {
        float b[NS];
        read_states<RB>(b, row_buffer + j * RS, q);
#pragma unroll
        for (int c = 0; c < C; ++c) {
            const Item item = items[j * IW + c * LANES + cl];
            const float su = item.s * item.x();
#pragma unroll
            for (int n = 0; n < NS; ++n)
                h[c][n] = fmaf(exp2_fast(item.s * a_log[c][n]), h[c][n], su * b[n]);
        }
    };
    uint4 select[4];
    const unsigned zero = (unsigned)dim >> 31;   // unknown to the compiler, which would make it anew before each use
#pragma unroll
    for (int i = 0; i < 4; ++i)
        select[i] = make_uint4(lane / 4 == 2 * i ? __float_as_uint(1.f) : zero, zero,
                               lane / 4 == 2 * i + 1 ? __float_as_uint(1.f) : zero, zero);

    // Where the lane puts sums over channels: of step lane / 4 / (2 NSP), B's or C's.
    float *cell = own + CELLS_AT;
    float *lane_cell = cell + lane / 4 / (2 * NSP) * ROW + B0 + lane / 4 / NSP % 2 * NP + lane % 4 * S / 4 * NS +
                       lane / 4 % NSP;

    const int last_chunk = start + (end - 1 - start) / CHUNK * CHUNK;
    fetch(last_chunk);
    for (int c0 = last_chunk; c0 >= start; c0 -= CHUNK) {
        const int subs = SUBS == 1 ? 1 : (min(CHUNK, end - c0) + SUB - 1) / SUB;
        if constexpr (SUBS > 1) read_border(h, c0 / CHUNK);
        for (int sub = 0; sub < subs - 1; ++sub) {
            prepare(c0 + sub * SUB, c0 + (sub + 1) * SUB, false);
#pragma unroll
            for (int j = 0; j < SUB; ++j) advance(j);
#pragma unroll
            for (int i = 0; i < PAIRS; ++i) states[(sub * PAIRS + i) * 32 + lane] = h[i / NS][i % NS];
        }

        for (int sub = subs - 1; sub >= 0; --sub) {
            const int l0 = c0 + sub * SUB;
            if constexpr (SUBS == 1) {
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) h[i / NS][i % NS] = border[i / NS][i % NS];
            }
            prepare(l0, sub ? l0 - SUB : c0 - CHUNK, true);
            float before[SUB][C][NS];
            if constexpr (SUBS > 1) {
                if (sub == 0) {
                    read_border(h, c0 / CHUNK);
                } else {
#pragma unroll
                    for (int i = 0; i < PAIRS; ++i) h[i / NS][i % NS] = states[((sub - 1) * PAIRS + i) * 32 + lane];
                }
            }
#pragma unroll
            for (int j = 0; j < SUB; ++j) {
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) before[j][i / NS][i % NS] = h[i / NS][i % NS];
                advance(j);
            }

            int4 pixels_here;
            float sums[GROUP * 2 * NSP], by_states[ITEM_STEPS * C * 2];
            __syncthreads();   // nobody still reads cells
            bf16 *tile_rows = reinterpret_cast<bf16 *>(own + TILE_AT);
#pragma unroll
            for (int j = SUB - 1; j >= 0; --j) {
                float bc[2 * NS], *b = bc, *cc = bc + NS;
                if constexpr (S == 1) {
                    read_row<RB, 2 * NS>(bc, row_buffer + j * RS);
                } else {
                    read_states<RB>(b, row_buffer + j * RS, q);
                    read_states<RC>(cc, row_buffer + j * RS, q);
                }
                Item item;
                if (S == 1 && j % 4 == 3) pixels_here = *reinterpret_cast<const int4 *>(pixel + j - 3);
                float *sum = sums + j % GROUP * 2 * NSP;
#pragma unroll
                for (int i = 0; i < 2 * NSP; ++i) sum[i] = 0.f;
#pragma unroll
                for (int c = 0; c < C; ++c) {
                    item = items[j * IW + c * LANES + cl];
                    const float su = item.s * item.x(), dy_here = item.dy();
                    float by_b = 0.f, by_a = 0.f;
#pragma unroll
                    for (int n = 0; n < NS; ++n) {
                        const float after = j + 1 < SUB ? before[j + 1 < SUB ? j + 1 : 0][c][n] : h[c][n];
                        const float g = fmaf(cc[n], dy_here, carry[c][n]);
                        const float a = exp2_fast(item.s * a_log[c][n]);
                        sum[n] = fmaf(g, su, sum[n]);
                        sum[NSP + n] = fmaf(after, dy_here, sum[NSP + n]);
                        by_b = fmaf(g, b[n], by_b);
                        carry[c][n] = a * g;
                        const float ga = carry[c][n] * before[j][c][n];
                        by_a = fmaf(ga, a_log[c][n], by_a);
                        da[c][n] = fmaf(ga, item.s, da[c][n]);
                    }
                    by_states[(j % ITEM_STEPS * C + c) * 2] = by_b;
                    by_states[(j % ITEM_STEPS * C + c) * 2 + 1] = by_a;
                }
                if (j % GROUP == 0) {   // over channels
                    if constexpr (BY_MATRIX) {
                        reduce_by_matrix(sums, select);
                        constexpr int SAME = LANES < 8 ? 1 : LANES / 8;   // lanes with the same sums
                        constexpr int NEXT = GROUP / 2 * ROW;
                        if (lane % SAME == 0 && lane / 4 % NSP < NS) {
                            lane_cell[j * ROW] = sums[0] * LN2;
                            lane_cell[j * ROW + NEXT] = sums[2] * LN2;
                            if constexpr (LANES == 4) {
                                lane_cell[j * ROW + NS] = sums[1] * LN2;
                                lane_cell[j * ROW + NEXT + NS] = sums[3] * LN2;
                            }
                        }
                    } else {
                        reduce_scatter<GROUP * 2 * NSP, 1, LANES>(sums, lane);
                        constexpr int HELD = GROUP * 2 * NSP / LANES;
#pragma unroll
                        for (int i = 0; i < HELD; ++i) {
                            const int index = cl * HELD + i, n = index % NSP, which = index / NSP % 2;
                            const int step = j + index / NSP / 2;
                            if (n < NS) cell[step * ROW + B0 + which * NP + q * NS + n] = sums[i] * LN2;
                        }
                    }
                }
                if (j % ITEM_STEPS == 0) {   // over states; then the lane has one channel of one step
                    reduce_scatter<ITEM_STEPS * C * 2, LANES, S>(by_states, lane);
                    const int step = j + q / C;
                    if constexpr (S > 1) item = items[step * IW + within];   // it is another one
                    const bool real = within < existing && l0 + step < end;
                    const int at_pixel = S == 1 ? reinterpret_cast<const int *>(&pixels_here)[j % 4] : pixel[step];
                    float d_step = sigmoids[step * IW + within] * fmaf(item.x(), by_states[0], LN2 * by_states[1]);
                    if (!real) d_step = 0.f;
                    if constexpr (FUSED) tile_rows[step * TILE_WIDTH + within] = from_float<bf16>(d_step);
                    bias_sum += d_step;
                    d_sum = fmaf(item.x(), item.dy(), d_sum);
                    Y *to = at(dx, at_pixel, dx_stride);
                    const Y value = from_float<Y>(item.s * by_states[0]);   // the merge multiplies by ln 2
                    if (real) *to = value;
                    if constexpr (!FUSED)
                        if (real) *at(ddt, at_pixel, ddt_stride) = from_float<P>(d_step);
                }
            }

            if constexpr (FUSED) {
                __syncwarp();
#pragma unroll
                for (int k = 0; k < DEPTH; ++k) {   // rows' gradient: (steps, channels) by (channels, ranks)
                    float d[4] = {0.f, 0.f, 0.f, 0.f};
                    const bf16 *from = tile_rows + lane / 4 * TILE_WIDTH + lane % 4 * 2;
#pragma unroll
                    for (int t = 0; t < TILE_ROWS / 8; ++t)
                        matrix_multiply_add(
                            d, *reinterpret_cast<const unsigned *>(from + t * 8),
                            OCTETS > 1 ? *reinterpret_cast<const unsigned *>(from + t * 8 + 8 * TILE_WIDTH) : 0,
                            reinterpret_cast<const unsigned *>(own + WEIGHT_AT)[(t * DEPTH + k) * 32 + lane]);
#pragma unroll
                    for (int i = 0; i < 2 * OCTETS; ++i)
                        if (k * 8 + 8 <= R || k * 8 + lane % 4 * 2 + i % 2 < R)
                            cell[(i / 2 * 8 + lane / 4) * ROW + k * 8 + lane % 4 * 2 + i % 2] = d[i];
                }
#pragma unroll
                for (int k = 0; k < DEPTH; ++k)   // dt_weight's: (channels, steps) by (steps, ranks)
#pragma unroll
                    for (int t = 0; t < WEIGHT_TILES; ++t) {
                        float4 *sum = reinterpret_cast<float4 *>(own + WEIGHT_SUM_AT) + (t * DEPTH + k) * 32 + lane;
                        float4 old = *sum;
                        float d[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
                        for (int o = 0; o < OCTETS; ++o) {
                            const int row = o * 8 + lane % 8;
                            const bf16 *from = tile_rows + row * TILE_WIDTH + t * 16;
                            matrix_multiply_add(d, read_transposed(from),
                                                t * 16 + 8 < TILE_ROWS ? read_transposed(from + 8) : 0,
                                                read_transposed(raw + row * ROW + k * 8));
                        }
                        *sum = make_float4(d[0], d[1], d[2], d[3]);
                    }
            }

            __syncthreads();
            for (int i = threadIdx.x; i < SUB * ROW / 4; i += 32 * WARPS) {
                const int j = i / (ROW / 4);
                if (l0 + j < end) {
                    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int other = 0; other < WARPS; ++other) {
                        const float4 v = reinterpret_cast<const float4 *>(shared + other * OWN + CELLS_AT)[i];
                        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
                    }
                    Vec<Cell, 4> result;
                    result.set(sum);
                    reinterpret_cast<Vec<Cell, 4> *>(at(d_rows, pixel[j], d_row_stride))[i % (ROW / 4)] = result;
                }
            }
        }
    }

    copy_wait<0>();
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int ch = first + c * LANES + cl, state = q * NS + n;
            if (ch < dim && state < N) dA[(slot * N + state) * dim + ch] = da[c][n] * (LN2 * LN2);
        }
    if constexpr (FUSED)
#pragma unroll
        for (int k = 0; k < DEPTH; ++k)
#pragma unroll
            for (int t = 0; t < WEIGHT_TILES; ++t) {
                const float4 sum = reinterpret_cast<const float4 *>(own + WEIGHT_SUM_AT)[(t * DEPTH + k) * 32 + lane];
                const float d[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int within = t * 16 + i / 2 * 8 + lane / 4, r = k * 8 + lane % 4 * 2 + i % 2;
                    if (within < CW && first + within < dim && r < R)
                        d_dt_weight[(slot * dim + first + within) * R + r] = d[i];
                }
            }
#pragma unroll
    for (int offset = LANES * C; offset < 32; offset *= 2) {
        bias_sum += __shfl_xor_sync(~0u, bias_sum, offset);
        d_sum += __shfl_xor_sync(~0u, d_sum, offset);
    }
    if (q < C && within < existing) {
        dbias[slot * dim + first + within] = bias_sum;
        dD[slot * dim + first + within] = d_sum;
    }
}
