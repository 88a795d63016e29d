// The gradient of one segment of one route of one image, for WARPS * CW channels a block: chunk by chunk from the end,
// each chunk's states recomputed from its border, first in passing (keeping those at the starts of its parts), then
// part by part from the end with all states at hand. C: neighbouring channels of a lane; PART: steps of a part; SUB:
// steps of a sub-chunk, of whose parts sums are made together; CHUNK: steps between borders, whole stages; PIECE: bytes
// that pixels can be read at once.
#include "scan_bwd.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_bwd_kernel(
    const X *__restrict__ x, const X *__restrict__ steps, const P *__restrict__ rows, const X *__restrict__ dt_weight,
    const float *__restrict__ dt_bias, const float *__restrict__ A, const G *__restrict__ dy,
    const BORDER *__restrict__ borders, const float *__restrict__ exits, Y *__restrict__ dx, P *__restrict__ ddt,
    P *__restrict__ d_rows, P *__restrict__ d_dt_weight, float *__restrict__ dA, float *__restrict__ dbias,
    float *__restrict__ dD, i64 pixels, i64 height, i64 width, i64 dim, i64 routes, i64 route_kinds, i64 x_pixel,
    i64 x_route, i64 division, i64 segment_length, i64 segments) {
    using Projection = StepProjection<STAGE, CW>;
    constexpr int TILES = Projection::TILES;
    extern __shared__ __align__(16) float shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, cl = lane % LANES, q = lane / LANES;
    float *own = shared + BLOCK + warp * OWN;
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
    dx += (image * length * routes + route) * dim + first + (PAIRED ? lane % 4 * 2 : within);
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

    // A stage of a chunk: its slot, and what is read from it while it is worked on. The chunks take turns in the order
    // of their slots, so that the next chunk's first stage is fetched to where this chunk's last one was.
    int parity = 0;   // of the chunk that `enter` and `fetch` mean
    int pixel;   // the number of the pixel at step lane % STAGE
    const P *raw;
    const X *pixels_x, *given;
    const G *pixels_dy;
    Step *step_rows;
    float *bc;
    auto enter = [&](int stage) {
        const int slot = STAGES == 1 ? stage + parity : parity ? STAGES - 1 - stage : stage;
        const int place = STAGES == 1 ? 0 : slot;
        raw = reinterpret_cast<const P *>(shared) + slot * STAGE * ROW;
        pixels_x = reinterpret_cast<const X *>(own + X_AT) + slot * STAGE * WIDTH<X>;
        pixels_dy = reinterpret_cast<const G *>(own + DY_AT) + slot * STAGE * WIDTH<G>;
        given = reinterpret_cast<const X *>(own + GIVEN_AT) + slot * STAGE * WIDTH<X>;
        step_rows = reinterpret_cast<Step *>(own + STEPS_AT) + place * STAGE * IW;
        bc = shared + BC_AT + place * STAGE * S * BC;
    };
    auto set_pixel = [&](int l0) {
        pixel = route_pixel(min(l0 + lane % STAGE, end - 1), kind, (int)height, (int)width, length, division);
    };
    BORDER border[C][NS];   // the states at the start of a chunk: of the next one where every sub-chunk is a chunk
    auto read_border = [&](int chunk) {
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int n = 0; n < NS; ++n)
                border[c][n] = chunk > 0 && first + cl * C + c < dim && q * NS + n < N
                    ? borders[((chunk - 1) * (i64)N + n) * dim + c] : from_float<BORDER>(0.f);
    };
    auto start_from_border = [&] {
#pragma unroll
        for (int i = 0; i < PAIRS; ++i) h[i / NS][i % NS] = to_float(border[i / NS][i % NS]);
    };
    // Start copying stage `stage`, of the chunk whose turn it is, from step l0: the block's rows, the warp's pixels.
    auto fetch = [&](int stage, int l0) {
        if constexpr (SUBS == 1) read_border(l0 / CHUNK);
        enter(stage);
        set_pixel(l0);
        constexpr int EACH = 16 / sizeof(P), PER_ROW = ROW / EACH, TOTAL = STAGE * PER_ROW;
#pragma unroll
        for (int turn = 0; turn < TOTAL; turn += 32 * WARPS) {
            const int i = turn + threadIdx.x, at_pixel = __shfl_sync(~0u, pixel, i / PER_ROW % STAGE);
            if (i < TOTAL)
                copy_async<16>(const_cast<P *>(raw) + i * EACH, at(rows, at_pixel, row_stride) + i % PER_ROW * EACH,
                               true);
        }
        load_pixels(const_cast<X *>(pixels_x), x, pixel, x_stride, existing, end - l0, lane);
        load_pixels(const_cast<G *>(pixels_dy), dy, pixel, dy_stride, existing, end - l0, lane);
        if constexpr (R == 0) load_pixels(const_cast<X *>(given), steps, pixel, x_stride, existing, end - l0, lane);
        copy_commit();
    };
    // Add the warps' cells of the stage from step l0.
    auto write_rows = [&](int l0) {
        set_pixel(l0);
#pragma unroll
        for (int turn = 0; turn < STAGE * ROW / 4; turn += 32 * WARPS) {
            const int i = turn + threadIdx.x, j = i / (ROW / 4), at_pixel = __shfl_sync(~0u, pixel, j % STAGE);
            if (i < STAGE * ROW / 4 && l0 + j < end) {
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
    // The stage's B and C as float32 and its steps, of which `inside` exist.
    auto prepare = [&](int inside) {
#pragma unroll
        for (int turn = 0; turn < STAGE * S; turn += 32 * WARPS) {
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
        float w[2][TILES][2];
        if constexpr (R == 0)
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const int ch = CW % 8 ? lane % 4 * 2 % CW : t * 8 + lane % 4 * 2;
                    const auto two = *reinterpret_cast<const Vec<X, 2> *>(given + (o * 8 + lane / 4) * WIDTH<X> + ch);
                    w[o][t][0] = two.get(0), w[o][t][1] = two.get(1);
                }
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int step = o * 8 + lane / 4, ch = t * 8 + lane % 4 * 2;
                if (CW % 8 == 0 || ch < CW) {
                    const auto two = *reinterpret_cast<const Vec<X, 2> *>(pixels_x + step * WIDTH<X> + ch);
                    Several<Step, 2> both;
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float v = step < inside ? w[o][t][e] : SOFTPLUS ? -1e30f : 0.f;   // a step of nothing
                        both.v[e].s = SOFTPLUS ? softplus2(v) : v;
                        both.v[e].sx = both.v[e].s * two.get(e);
                    }
                    *reinterpret_cast<Several<Step, 2> *>(step_rows + step * IW + ch) = both;
                }
            }
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
        const int at_pixel = __shfl_sync(~0u, pixel, step), ch = finishes ? within : 0;
        const float s = step_rows[step * IW + ch].s, x_here = to_float(pixels_x[step * WIDTH<X> + ch]);
        float d_step = (SOFTPLUS ? softplus_derivative(s) : 1.f) * fmaf(x_here, by_b, LN2 * by_a);
        if (!real) d_step = 0.f;
        if constexpr (FUSED)
            if (finishes) tile_rows[step * TILE_WIDTH + within] = from_float<bf16>(d_step);
        bias_sum += d_step;
        d_sum = fmaf(x_here, to_float(pixels_dy[step * WIDTH<G> + ch]), d_sum);
        const Y dx_here = from_float<Y>(s * by_b);   // the merge multiplies by ln 2
        if (real) *at(dx, at_pixel, dx_stride) = dx_here;
        if constexpr (!FUSED)
            if (real) *at(ddt, at_pixel, ddt_stride) = from_float<P>(d_step);
    };
    // The same for a sub-chunk: sums of channel lane / 4 at step lane % 4 * 2 and the next. Where there is no step, s
    // and x are zero, and so is all that comes of them.
    auto finish_pairs = [&](int step, int limit_step, const float *sums) {
        const unsigned x_pair = read_transposed(pixels_x + (step + lane % 8) * WIDTH<X>);
        const unsigned dy_pair = read_transposed(pixels_dy + (step + lane % 8) * WIDTH<G>);
        float d_step[2], dx_here[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float x_here = e ? upper_half(x_pair) : lower_half(x_pair);
            const float s = step_rows[(step + lane % 4 * 2 + e) * IW + lane / 4].s;
            d_step[e] = softplus_derivative(s) * fmaf(x_here, sums[e], LN2 * sums[2 + e]);
            bias_sum += d_step[e];
            d_sum = fmaf(x_here, e ? upper_half(dy_pair) : lower_half(dy_pair), d_sum);
            dx_here[e] = s * sums[e];
        }
        const int row = step + lane / 4, ch = lane % 4 * 2, at_pixel = __shfl_sync(~0u, pixel, row);
        *reinterpret_cast<unsigned *>(tile_rows + row * TILE_WIDTH + ch) = transpose(two_halves(d_step[0], d_step[1]));
        const unsigned dx_pair = transpose(two_halves(dx_here[0], dx_here[1]));
        if (row < limit_step && ch < existing) *reinterpret_cast<unsigned *>(at(dx, at_pixel, dx_stride)) = dx_pair;
    };
    float4 select[BY_MATRIX ? 4 : 1];   // matrices of reduce_by_matrix
    if constexpr (BY_MATRIX) {
        const float zero = __uint_as_float((unsigned)dim >> 31);   // unknown to the compiler, which would make it anew
#pragma unroll
        for (int i = 0; i < 4; ++i)
            select[i] = make_float4(lane / 4 == 2 * i ? 1.f : zero, zero, lane / 4 == 2 * i + 1 ? 1.f : zero, zero);
    }

    const int last_chunk = start + (end - 1 - start) / CHUNK * CHUNK;
    // Of every chunk all stages but the last are there when it begins, where it has several; of the first, those of the
    // next chunk too whose slots it leaves free.
    const int first_stages = (end - last_chunk + STAGE - 1) / STAGE;
    for (int stage = 0; stage < max(first_stages - 1, 1); ++stage) fetch(stage, last_chunk + stage * STAGE);
    if (STAGES > 1 && last_chunk > start) {
        parity = 1;
        for (int stage = 0; stage < STAGES - first_stages; ++stage) fetch(stage, last_chunk - CHUNK + stage * STAGE);
        parity = 0;
    }
    for (int c0 = last_chunk; c0 >= start; c0 -= CHUNK, parity ^= 1) {
        const int limit = min(c0 + CHUNK, end), subs = SUBS == 1 ? 1 : (limit - c0 + SUB - 1) / SUB;
        const int stages = STAGES == 1 ? 1 : (subs + HALVES - 1) / HALVES, last_part = subs * PARTS - 1;
        copy_wait<0>();
        __syncthreads();   // the rows are there, and the cells of the chunk after this one
        if constexpr (SUBS == 1)
            start_from_border();
        else
            read_border(c0 / CHUNK);
        if (STAGES > 1 && stages > 1) fetch(stages - 1, c0 + (stages - 1) * STAGE);
        if (STAGES == 1 && c0 > start) {
            parity ^= 1;
            fetch(0, c0 - CHUNK);
            parity ^= 1;
        }
        if (c0 < last_chunk) write_rows(c0 + CHUNK);
        for (int stage = 0; stage < stages; ++stage) {
            enter(stage);
            prepare(limit - c0 - stage * STAGE);
            if (STAGES > 1 && stage == stages - 2) copy_wait<0>();
            if (stage >= stages - 2) __syncthreads();   // the last rows; then B and C are there, and the cells are free
        }
        if constexpr (SUBS > 1) {
            start_from_border();
            keep_states(0);
            for (int stage = 0; stage < stages; ++stage) {
                enter(stage);
#pragma unroll
                for (int i = 0; i < HALVES * PARTS; ++i)
                    if (stage * HALVES * PARTS + i < last_part) {
                        float decay[C][NS];
#pragma unroll
                        for (int j = 0; j < PART; ++j) advance(i * PART + j, decay);
                        keep_states(stage * HALVES * PARTS + i + 1);
                    }
            }
        }

        for (int stage = stages - 1; stage >= 0; --stage) {
            const int l0 = c0 + stage * STAGE, here = min(HALVES, subs - stage * HALVES);   // sub-chunks
            enter(stage);
            set_pixel(l0);
            if constexpr (FUSED && HALVES > 1)
                if (here == 1)
                    for (int i = lane; i < SUB * TILE_WIDTH / 2; i += 32) own[TILE_AT + SUB * TILE_WIDTH / 2 + i] = 0.f;

            for (int half = here - 1; half >= 0; --half) {
                const int j0 = half * SUB;
                float sums[DIRECT ? 1 : GROUP * 2 * NSP], by_states[DIRECT ? 1 : ITEM_STEPS * C * 2];
                float by_b_matrix[(NS + 1) / 2][4] = {}, by_c_matrix[(NS + 1) / 2][4] = {}, by_states_matrix[4] = {};
                float before[PART][C][NS], decays[PART][C][NS];
#pragma unroll
                for (int j = SUB - 1; j >= 0; --j) {
                    const int p = j % PART;
                    if (p == PART - 1) {
                        if constexpr (SUBS > 1) restore_states((stage * HALVES + half) * PARTS + j / PART);
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
                    const int step = j0 + j;
                    const auto own_steps = *reinterpret_cast<const Several<Step, C> *>(step_rows + step * IW + cl * C);
                    const auto own_dy = *reinterpret_cast<const Vec<G, C> *>(pixels_dy + step * WIDTH<G> + cl * C);
                    float by_b[2] = {0.f, 0.f}, by_a[2] = {0.f, 0.f}, sx[2] = {0.f, 0.f}, dy_here[2] = {0.f, 0.f};
                    float g[2][NS + 1] = {}, after[2][NS + 1] = {};
#pragma unroll
                    for (int c = 0; c < C; ++c) {
                        const float s = own_steps.v[c].s;
                        sx[c] = own_steps.v[c].sx, dy_here[c] = own_dy.get(c);
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
                                    const int row = j0 + j + index / NSP / 2;
                                    if (n < NS)
                                        cells[row * ROW + B0 + which * NP + q * NS + n] = from_float<P>(sums[i] * LN2);
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
                if constexpr (PAIRED) finish_pairs(j0, limit - l0, by_states_matrix);
                if constexpr (DIRECT)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if constexpr (!PAIRED)
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
            if (STAGES > 1 && stage > 0) {
                __syncthreads();   // the cells are there, and nobody reads the rows any more
                if (c0 > start) {
                    parity ^= 1;
                    fetch(STAGES - 1 - stage, c0 - CHUNK + (STAGES - 1 - stage) * STAGE);
                    parity ^= 1;
                }
                write_rows(l0);
                __syncthreads();   // the cells are free
            }
        }
    }

    __syncthreads();
    write_rows(start);
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
                    if (ch < CW && first + ch < dim && r < R)
                        d_dt_weight[(slot * dim + first + ch) * R + r] = from_float<P>(sum.v[i]);
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
