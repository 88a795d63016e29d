// The gradient of one segment of one route of one image, for WARPS * CW channels a block: chunk by chunk from the end,
// each chunk's states recomputed from its border, first in passing (keeping those at the starts of its parts), then
// part by part from the end with all states at hand. C: neighbouring channels of a lane; PART: steps of a part; SUB:
// steps of a sub-chunk, of whose parts sums are made together; CHUNK: steps between borders, a multiple of SUB; PIECE:
// bytes that pixels can be read at once.
#include "scan_bwd.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_bwd_kernel(
    const X *__restrict__ x, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const G *__restrict__ dy,
    const float *__restrict__ borders, const float *__restrict__ exits, Y *__restrict__ dx, P *__restrict__ ddt,
    P *__restrict__ d_rows, float *__restrict__ d_dt_weight, float *__restrict__ dA, float *__restrict__ dbias,
    float *__restrict__ dD, i64 pixels, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 division, i64 segment_length, i64 segments) {
    using Projection = StepProjection<STAGE, CW>;
    constexpr int TILES = Projection::TILES;
    extern __shared__ __align__(16) float shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cl = lane % LANES, q = lane / LANES;
    float *own = shared + BLOCK + warp * OWN, *bc = shared + BC_AT;
    Step *step_rows = reinterpret_cast<Step *>(own + STEPS_AT);
    Value *values = reinterpret_cast<Value *>(own + VALUES_AT);
    float *gradients = own + GRADIENTS_AT;
    P *cells = reinterpret_cast<P *>(own + CELLS_AT);
    bf16 *tile_rows = reinterpret_cast<bf16 *>(own + TILE_AT);
    using WeightSum = Several<float, WEIGHT_KEPT>;
    WeightSum *weight_sums = reinterpret_cast<WeightSum *>(own + WEIGHT_SUM_AT);

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

    x += image * length * x_pixel + route * x_route + first;
    if constexpr (R == 0) steps += image * length * x_pixel + route * x_route + first;
    dy += image * length * x_pixel + route * x_route + first;
    rows += (image * length * routes + route) * ROW;
    borders += (sequence * ((length + CHUNK - 1) / CHUNK - 1) * N + q * NS) * dim + first + cl * C;
    // The channel whose steps the lane finishes: after the sums over states a lane has one of its own, or, where
    // matrices made them, the one of its row.
    const int within = DIRECT ? q * C / 2 : cl * C + q % C, existing = (int)dim - first;
    const bool finishes = !DIRECT || C == 2 || q % 2 == 0;
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
            const int ch = first + cl * C + c, state = q * NS + n;
            const bool real = ch < dim && state < N;
            a_log[c][n] = real ? A[(route * dim + ch) * N + state] : 0.f;
            carry[c][n] = real && segment < segments - 1 ? exits[(slot * N + state) * dim + ch] : 0.f;
            da[c][n] = 0.f;
        }
    float bias_sum = 0.f, d_sum = 0.f;
    for (int i = lane; i < STAGE * ROW; i += 32) cells[i] = from_float<P>(0.f);   // some columns are never written
    if constexpr (FUSED) {
        for (int i = lane; i < STAGE * TILE_WIDTH / 2; i += 32) own[TILE_AT + i] = 0.f;
        for (int i = lane; i < WEIGHT_TILES * DEPTH * 32 * WEIGHT_KEPT; i += 32) own[WEIGHT_SUM_AT + i] = 0.f;
    }

    X *own_x = reinterpret_cast<X *>(own + X_AT), *own_given = reinterpret_cast<X *>(own + GIVEN_AT);
    G *own_dy = reinterpret_cast<G *>(own + DY_AT);
    int buffer = 0, pixel = 0, next_pixel;   // the number of the pixel at step lane % STAGE of the stage
    float border[C][NS];   // fetched too where every sub-chunk is a chunk
    auto read_border = [&](float (*to)[NS], int chunk) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n)
                to[c][n] = chunk > 0 && first + cl * C + c < dim && q * NS + n < N
                    ? borders[((chunk - 1) * (i64)N + n) * dim + c] : 0.f;
    };
    // Start reading a stage: the block's rows, the warp's pixels; the output's gradient only where it is needed.
    auto fetch = [&](int l0, bool gradient) {
        if constexpr (SUBS == 1) read_border(border, l0 / CHUNK);
        const int step = max(min(l0 + lane % STAGE, end - 1), 0);
        next_pixel = route_pixel(step, kind, (int)height, (int)width, length, division);
        buffer ^= 1;
        constexpr int EACH = 16 / sizeof(P), PER_ROW = ROW / EACH, TOTAL = STAGE * PER_ROW;
#pragma unroll
        for (int turn = 0; turn < TOTAL; turn += 32 * WARPS) {
            const int i = turn + threadIdx.x, at_pixel = __shfl_sync(~0u, next_pixel, i / PER_ROW % STAGE);
            if (i < TOTAL)
                copy_async<16>(reinterpret_cast<P *>(shared + buffer * RAW) + i * EACH,
                               at(rows, at_pixel, row_stride) + i % PER_ROW * EACH, true);
        }
        load_pixels(own_x, x, next_pixel, x_stride, existing, lane);
        if (gradient) load_pixels(own_dy, dy, next_pixel, dy_stride, existing, lane);
        if constexpr (R == 0) load_pixels(own_given, steps, next_pixel, x_stride, existing, lane);
        copy_commit();
    };
    // Add the warps' cells of the last stage, if it had any: steps l0 to limit.
    auto write_rows = [&](int l0, int limit, int pixel) {
#pragma unroll
        for (int turn = 0; turn < STAGE * ROW / 4; turn += 32 * WARPS) {
            const int i = turn + threadIdx.x, j = i / (ROW / 4), at_pixel = __shfl_sync(~0u, pixel, j % STAGE);
            if (i < STAGE * ROW / 4 && l0 + j < limit) {
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int other = 0; other < WARPS; ++other) {
                    const auto v = reinterpret_cast<const Vec<P, 4> *>(shared + BLOCK + other * OWN + CELLS_AT)[i];
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[k] += v.get(k);
                }
                Vec<P, 4> result;
                result.set(sum);
                reinterpret_cast<Vec<P, 4> *>(at(d_rows, at_pixel, row_stride))[i % (ROW / 4)] = result;
            }
        }
    };
    int last_l0 = 0, last_limit = 0;   // of the stage whose cells are to be added
    const P *raw;
    // Steps l0 to limit, made ready for the warps, while the next stage is fetched.
    auto prepare = [&](int l0, int limit, bool gradient, int next_l0, bool next_gradient) {
        raw = reinterpret_cast<const P *>(shared + buffer * RAW);
        const int last_pixel = pixel;
        pixel = next_pixel;
        copy_wait<0>();
        __syncthreads();   // the rows are there, the last stage's cells too; nobody still reads what is overwritten now
        float w[2][TILES][2];
        Vec<X, 2> now_x[2][TILES];
        Vec<G, 2> now_dy[2][TILES];
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int step = o * 8 + lane / 4, ch = CW % 8 ? lane % 4 * 2 % CW : t * 8 + lane % 4 * 2;
                now_x[o][t] = *reinterpret_cast<const Vec<X, 2> *>(own_x + step * WIDTH<X> + ch);
                now_dy[o][t] = *reinterpret_cast<const Vec<G, 2> *>(own_dy + step * WIDTH<G> + ch);
                if constexpr (R == 0) {
                    const auto given = *reinterpret_cast<const Vec<X, 2> *>(own_given + step * WIDTH<X> + ch);
                    w[o][t][0] = given.get(0), w[o][t][1] = given.get(1);
                }
            }
        __syncwarp();
        fetch(next_l0, next_gradient);
        write_rows(last_l0, last_limit, last_pixel);
        last_l0 = l0, last_limit = gradient ? limit : 0;
#pragma unroll
        for (int turn = 0; turn < STAGE * S; turn += 32 * WARPS) {   // B and C
            const int i = turn + threadIdx.x;
            const P *from = raw + i / S * ROW + B0 + i % S * NS;
            if (i < STAGE * S)
#pragma unroll
                for (int n = 0; n < NS; n += FEW) {
                    const auto b = *reinterpret_cast<const Vec<P, FEW> *>(from + n);
                    const auto c = *reinterpret_cast<const Vec<P, FEW> *>(from + NP + n);
                    Several<float, FEW> b_floats, c_floats;
#pragma unroll
                    for (int k = 0; k < FEW; ++k) b_floats.v[k] = b.get(k), c_floats.v[k] = c.get(k);
                    *reinterpret_cast<Several<float, FEW> *>(bc + i * BC + n) = b_floats;
                    *reinterpret_cast<Several<float, FEW> *>(bc + i * BC + NS + n) = c_floats;
                }
        }
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int step = o * 8 + lane / 4, ch = t * 8 + lane % 4 * 2;
                const bool inside = l0 + step < limit;
                Several<Step, 2> both;
                float sigmoid[2], given_dy[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float v = w[o][t][e];
                    both.v[e].s = inside ? SOFTPLUS ? softplus2(v) : v : 0.f;
                    both.v[e].sx = both.v[e].s * now_x[o][t].get(e);
                    sigmoid[e] = SOFTPLUS && gradient ? sigmoid2(v) : 1.f;
                    given_dy[e] = inside ? now_dy[o][t].get(e) : 0.f;
                }
                if (CW % 8 == 0 || ch < CW) {
                    *reinterpret_cast<Several<Step, 2> *>(step_rows + step * IW + ch) = both;
                    if (gradient) {
                        const int item = step * IW + ch;
                        *reinterpret_cast<Several<Value, 2> *>(values + item) = Value::two(now_x[o][t], sigmoid);
                        *reinterpret_cast<float2 *>(gradients + item) = make_float2(given_dy[0], given_dy[1]);
                    }
                }
            }
        __syncthreads();   // B and C are there, and the cells are free
    };
    // The recurrence over one step of the stage.
    auto advance = [&](int step, float (*decay)[NS]) {
        float b[NS];
        read_row<0, NS>(b, bc + (step * S + q) * BC);
        const auto own_steps = *reinterpret_cast<const Several<Step, C> *>(step_rows + step * IW + cl * C);
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                decay[c][n] = exp2_fast(own_steps.v[c].s * a_log[c][n]);
                h[c][n] = fmaf(decay[c][n], h[c][n], own_steps.v[c].sx * b[n]);
            }
    };
    // The lane's states at the start of a part of the chunk, kept in shared memory.
    using Words = Several<unsigned, KEPT % 4 == 0 ? 4 : KEPT % 2 == 0 ? 2 : 1>;
    constexpr int EACH = sizeof(Words) / 4;
    auto kept = [&](int part) { return reinterpret_cast<Words *>(own + STATES_AT) + part * (KEPT / EACH * 32) + lane; };
    float *states = &h[0][0];   // in one row; of an odd number the last fills two halves of a word
    auto keep_states = [&](int part) {
#pragma unroll
        for (int i = 0; i < KEPT; i += EACH) {
            Words some;
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                if constexpr (DIRECT)
                    some.v[k] = two_halves(states[2 * (i + k)], states[min(2 * (i + k) + 1, PAIRS - 1)]);
                else
                    some.v[k] = __float_as_uint(states[i + k]);
            kept(part)[i / EACH * 32] = some;
        }
    };
    auto restore_states = [&](int part) {
#pragma unroll
        for (int i = 0; i < KEPT; i += EACH) {
            const Words some = kept(part)[i / EACH * 32];
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                if constexpr (DIRECT) {
                    states[2 * (i + k)] = lower_half(some.v[k]);
                    states[min(2 * (i + k) + 1, PAIRS - 1)] = upper_half(some.v[k]);
                } else {
                    states[i + k] = __uint_as_float(some.v[k]);
                }
        }
    };
    // A channel's gradients at one step, from sums over states: of g B, and of A times g, the decay and the state.
    auto finish = [&](int step, int limit_step, float by_b, float by_a) {
        const bool real = finishes && within < existing && step < limit_step;
        const int at_pixel = __shfl_sync(~0u, pixel, step), item = step * IW + (finishes ? within : 0);
        const Value value = values[item];
        float d_step = value.sigmoid() * fmaf(value.x(), by_b, LN2 * by_a);
        if (!real) d_step = 0.f;
        if constexpr (FUSED)
            if (finishes) tile_rows[step * TILE_WIDTH + within] = from_float<bf16>(d_step);
        bias_sum += d_step;
        d_sum = fmaf(value.x(), gradients[item], d_sum);
        const Y dx_here = from_float<Y>(step_rows[item].s * by_b);   // the merge multiplies by ln 2
        if (real) *at(dx, at_pixel, dx_stride) = dx_here;
        if constexpr (!FUSED)
            if (real) *at(ddt, at_pixel, ddt_stride) = from_float<P>(d_step);
    };
    float4 select[BY_MATRIX ? 4 : 1];   // matrices of reduce_by_matrix
    if constexpr (BY_MATRIX) {
        const float zero = __uint_as_float((unsigned)dim >> 31);   // unknown to the compiler, which would make it anew
#pragma unroll
        for (int i = 0; i < 4; ++i)
            select[i] = make_float4(lane / 4 == 2 * i ? 1.f : zero, zero, lane / 4 == 2 * i + 1 ? 1.f : zero, zero);
    }

    const int last_chunk = start + (end - 1 - start) / CHUNK * CHUNK;
    fetch(last_chunk, SUBS == 1 || end - last_chunk <= SUB);
    for (int c0 = last_chunk; c0 >= start; c0 -= CHUNK) {
        const int limit = min(c0 + CHUNK, end), subs = SUBS == 1 ? 1 : (limit - c0 + SUB - 1) / SUB;
        const int last_stage = (subs - 1) / HALVES * HALVES;   // by its first sub-chunk
        if constexpr (SUBS > 1) {
            const int last_part = subs * PARTS - 1;
            read_border(h, c0 / CHUNK);
            keep_states(0);
            for (int part = 0; part < last_part; part += HALVES * PARTS) {
                const bool more = part + HALVES * PARTS < last_part;
                prepare(c0 + part * PART, limit, false, c0 + (more ? part * PART + STAGE : last_stage * SUB), !more);
#pragma unroll
                for (int i = 0; i < HALVES * PARTS; ++i)
                    if (part + i < last_part) {
                        float decay[C][NS];
#pragma unroll
                        for (int j = 0; j < PART; ++j) advance(i * PART + j, decay);
                        keep_states(part + i + 1);
                    }
            }
        }

        for (int stage = last_stage; stage >= 0; stage -= HALVES) {
            const int l0 = c0 + stage * SUB;
            if constexpr (SUBS == 1) {
#pragma unroll
                for (int i = 0; i < PAIRS; ++i) h[i / NS][i % NS] = border[i / NS][i % NS];
            }
            prepare(l0, limit, true, stage ? l0 - STAGE : c0 - CHUNK, SUBS == 1 || stage);
            if constexpr (FUSED && HALVES > 1)
                if (stage + 1 == subs)   // without a second half
                    for (int i = lane; i < SUB * TILE_WIDTH / 2; i += 32) own[TILE_AT + SUB * TILE_WIDTH / 2 + i] = 0.f;

            for (int half = min(HALVES, subs - stage) - 1; half >= 0; --half) {
                const int j0 = half * SUB;
                float sums[DIRECT ? 1 : GROUP * 2 * NSP], by_states[DIRECT ? 1 : ITEM_STEPS * C * 2];
                float by_b_matrix[(NS + 1) / 2][4] = {}, by_c_matrix[(NS + 1) / 2][4] = {}, by_states_matrix[4] = {};
                float before[PART][C][NS], decays[PART][C][NS];
#pragma unroll
                for (int j = SUB - 1; j >= 0; --j) {
                    const int p = j % PART;
                    if (p == PART - 1) {
                        if constexpr (SUBS > 1) restore_states((stage + half) * PARTS + j / PART);
#pragma unroll
                        for (int i = 0; i < PART; ++i) {
#pragma unroll
                            for (int k = 0; k < PAIRS; ++k) before[i][k / NS][k % NS] = h[k / NS][k % NS];
                            advance(j0 + j - p + i, decays[i]);
                        }
                        if constexpr (!DIRECT) __syncwarp();   // so that no decays are kept, which would spill
                    }
                    float row[2 * NS], *b = row, *cc = row + NS;
                    read_row<0, 2 * NS>(row, bc + ((j0 + j) * S + q) * BC);
                    const int item = (j0 + j) * IW + cl * C;
                    const auto own_steps = *reinterpret_cast<const Several<Step, C> *>(step_rows + item);
                    const auto own_dy = *reinterpret_cast<const Several<float, C> *>(gradients + item);
                    float by_b[2] = {0.f, 0.f}, by_a[2] = {0.f, 0.f}, sx[2] = {0.f, 0.f}, dy_here[2] = {0.f, 0.f};
                    float g[2][NS + 1] = {}, after[2][NS + 1] = {};
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        const float s = own_steps.v[c].s;
                        sx[c] = own_steps.v[c].sx, dy_here[c] = own_dy.v[c];
#pragma unroll
                        for (int n = 0; n < NS; ++n) {
                            after[c][n] = p + 1 < PART ? before[p + 1 < PART ? p + 1 : 0][c][n] : h[c][n];
                            g[c][n] = fmaf(cc[n], dy_here[c], carry[c][n]);
                            by_b[c] = fmaf(g[c][n], b[n], by_b[c]);
                            carry[c][n] = (DIRECT ? decays[p][c][n] : exp2_fast(s * a_log[c][n])) * g[c][n];
                            const float ga = carry[c][n] * before[p][c][n];
                            by_a[c] = fmaf(ga, a_log[c][n], by_a[c]);
                            da[c][n] = fmaf(ga, s, da[c][n]);
                        }
                    }
                    if constexpr (DIRECT) {
                        // dB and dC: states by channels times channels by steps, of which this step has column j.
                        const bool mine = lane / 4 == j;
                        const float sx0 = mine ? sx[0] : 0.f, sx1 = mine ? sx[1] : 0.f;
                        const float dy0 = mine ? dy_here[0] : 0.f, dy1 = mine ? dy_here[1] : 0.f;
#pragma unroll
                        for (int n = 0; n < NS; n += 2) {
                            multiply_add_tf32(by_b_matrix[n / 2], g[0][n], g[0][n + 1], g[1][n], g[1][n + 1], sx0, sx1);
                            multiply_add_tf32(by_c_matrix[n / 2], after[0][n], after[0][n + 1], after[1][n],
                                              after[1][n + 1], dy0, dy1);
                        }
                        // Sums over states: of (states, channels), transposed, the columns are added into column j;
                        // by_b's rows first, then by_a's.
                        matrix_multiply_add(by_states_matrix, transpose(two_halves(by_b[0], by_b[1])),
                                            transpose(two_halves(by_a[0], by_a[1])), mine ? 0x3f803f80 : 0);
                    } else {
                        float *sum = sums + j % GROUP * 2 * NSP;
#pragma unroll
                        for (int n = 0; n < NSP; ++n) {
                            sum[n] = sum[NSP + n] = 0.f;
#pragma unroll
                            for (int c = 0; c < C; ++c)
                                if (n < NS) {
                                    sum[n] = fmaf(g[c][n], sx[c], sum[n]);
                                    sum[NSP + n] = fmaf(after[c][n], dy_here[c], sum[NSP + n]);
                                }
                        }
                        if (j % GROUP == 0) {   // over channels
                            if constexpr (BY_MATRIX) {
                                reduce_by_matrix(sums, select);
                                if (lane % 4 == 0 && lane / 4 % NSP < NS) {
                                    P *to = cells + (j0 + j + lane / 4 / (2 * NSP)) * ROW + B0 +
                                                lane / 4 / NSP % 2 * NP + lane / 4 % NSP;
                                    to[0] = from_float<P>(sums[0] * LN2);
                                    to[GROUP / 2 * ROW] = from_float<P>(sums[2] * LN2);
                                }
                            } else {
                                reduce_scatter<GROUP * 2 * NSP, 1, LANES>(sums, lane);
                                constexpr int HELD = GROUP * 2 * NSP / LANES;
#pragma unroll
                                for (int i = 0; i < HELD; ++i) {
                                    const int index = cl * HELD + i, n = index % NSP, which = index / NSP % 2;
                                    const int step = j0 + j + index / NSP / 2;
                                    if (n < NS)
                                        cells[step * ROW + B0 + which * NP + q * NS + n] = from_float<P>(sums[i] * LN2);
                                }
                            }
                        }
#pragma unroll
                        for (int c = 0; c < C; ++c) {
                            by_states[(j % ITEM_STEPS * C + c) * 2] = by_b[c];
                            by_states[(j % ITEM_STEPS * C + c) * 2 + 1] = by_a[c];
                        }
                        if (j % ITEM_STEPS == 0) {   // over states
                            reduce_scatter<ITEM_STEPS * C * 2, LANES, S>(by_states, lane);
                            finish(j0 + j + q / C, limit - l0, by_states[0], by_states[1]);
                        }
                    }
                }
                if constexpr (DIRECT)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        finish(j0 + lane % 4 * 2 + e, limit - l0, by_states_matrix[e], by_states_matrix[2 + e]);
                        P *to = cells + (j0 + lane % 4 * 2 + e) * ROW + B0 + q * NS;
#pragma unroll
                        for (int n = 0; n < NS; n += FEW) {
                            float b[FEW], c[FEW];
#pragma unroll
                            for (int k = 0; k < FEW; ++k) {
                                b[k] = by_b_matrix[n / 2][(n + k) % 2 * 2 + e] * LN2;
                                c[k] = by_c_matrix[n / 2][(n + k) % 2 * 2 + e] * LN2;
                            }
                            Vec<P, FEW> rounded;
                            rounded.set(b);
                            *reinterpret_cast<Vec<P, FEW> *>(to + n) = rounded;
                            rounded.set(c);
                            *reinterpret_cast<Vec<P, FEW> *>(to + NP + n) = rounded;
                        }
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
                        matrix_multiply_add(d, *reinterpret_cast<const unsigned *>(from + t * 8),
                                            *reinterpret_cast<const unsigned *>(from + t * 8 + 8 * TILE_WIDTH),
                                            transpose(projection.weight[t][k]));
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        P *to = cells + (i * 8 + lane / 4) * ROW + k * 8 + lane % 4 * 2;
                        if (k * 8 + 8 <= R) {
                            Vec<P, 2> rounded;
                            rounded.set(d + 2 * i);
                            *reinterpret_cast<Vec<P, 2> *>(to) = rounded;
                        } else {
#pragma unroll
                            for (int e = 0; e < 2; ++e)
                                if (k * 8 + lane % 4 * 2 + e < R) to[e] = from_float<P>(d[2 * i + e]);
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < DEPTH; ++k)   // dt_weight's: (channels, steps) by (steps, ranks)
#pragma unroll
                    for (int t = 0; t < WEIGHT_TILES; ++t) {
                        WeightSum *sum = weight_sums + (t * DEPTH + k) * 32 + lane;
                        WeightSum old = *sum;
                        float d[4] = {old.v[0], old.v[1], WEIGHT_KEPT > 2 ? old.v[WEIGHT_KEPT - 2] : 0.f,
                                      WEIGHT_KEPT > 2 ? old.v[WEIGHT_KEPT - 1] : 0.f};
#pragma unroll
                        for (int o = 0; o < 2; ++o) {
                            const int row = o * 8 + lane % 8;
                            const bf16 *from = tile_rows + row * TILE_WIDTH + t * 16;
                            matrix_multiply_add(d, read_transposed(from),
                                                t * 16 + 8 < TILE_ROWS ? read_transposed(from + 8) : 0,
                                                read_transposed(raw + row * ROW + k * 8));
                        }
#pragma unroll
                        for (int i = 0; i < WEIGHT_KEPT; ++i) old.v[i] = d[i];
                        *sum = old;
                    }
            }
        }
    }

    copy_wait<0>();
    __syncthreads();
    write_rows(last_l0, last_limit, pixel);
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int n = 0; n < NS; ++n) {
            const int ch = first + cl * C + c, state = q * NS + n;
            if (ch < dim && state < N) dA[(slot * N + state) * dim + ch] = da[c][n] * (LN2 * LN2);
        }
    if constexpr (FUSED)
#pragma unroll
        for (int k = 0; k < DEPTH; ++k)
#pragma unroll
            for (int t = 0; t < WEIGHT_TILES; ++t) {
                const WeightSum sum = weight_sums[(t * DEPTH + k) * 32 + lane];
#pragma unroll
                for (int i = 0; i < WEIGHT_KEPT; ++i) {
                    const int ch = t * 16 + i / 2 * 8 + lane / 4, r = k * 8 + lane % 4 * 2 + i % 2;
                    if (ch < CW && first + ch < dim && r < R) d_dt_weight[(slot * dim + first + ch) * R + r] = sum.v[i];
                }
            }
    // The lanes that finished other steps of the same channel.
    constexpr int FROM = DIRECT ? 1 : LANES * C, TO = DIRECT ? 4 : 32;
#pragma unroll
    for (int offset = FROM; offset < TO; offset *= 2) {
        bias_sum += __shfl_xor_sync(~0u, bias_sum, offset);
        d_sum += __shfl_xor_sync(~0u, d_sum, offset);
    }
    if ((DIRECT ? finishes && lane % 4 == 0 : q < C) && within < existing) {
        dbias[slot * dim + first + within] = bias_sum;
        dD[slot * dim + first + within] = d_sum;
    }
}
