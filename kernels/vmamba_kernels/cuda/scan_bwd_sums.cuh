// The sums of the backward kernel: over channels, which are dB and dC, and over states, of which the gradients of
// pixels and steps are made. One of two accumulators takes a sub-chunk's steps, from its last to its first:
//
//     Sums sums;
//     sums.add(constants, channels, j, at);      what step j of the sub-chunk gives
//     sums.finish(channels);                     after the last
//
// MatrixSums where the states lie as a matrix instruction wants them (MATRIX_SUMS), LaneSums otherwise. dB and dC go to
// the warp's cells, the sums over states to `channels`.

// What one step gives, in a lane. The second of two channels is zero where a lane has one; so is a state too many.
struct AtStep {
    float g[2][STATES_A_LANE + 1] = {}, after[2][STATES_A_LANE + 1] = {};   // the state's gradient, the state behind it
    float sx[2] = {0.f, 0.f}, dy[2] = {0.f, 0.f};
    float by_b[2] = {0.f, 0.f}, by_a[2] = {0.f, 0.f};   // sums over the lane's states: see ChannelGradients::finish

    // The gradient's recurrence over a step of the stage, from the states before and after it: g = C dy + carry, and
    // then carry = decay g. da: A's gradient so far.
    using Numbers = float[CHANNELS_A_LANE][STATES_A_LANE];   // one of each state of the lane
    __device__ __forceinline__ void go_back(const Pipeline &pipeline, int step, const Numbers &a_log,
                                            const Numbers &before, const Numbers &state_after, const Numbers &decay,
                                            Numbers &carry, Numbers &da) {
        const int ch = pipeline.walk.channel_lane * CHANNELS_A_LANE;
        float row[2 * STATES_A_LANE], *B_here = row, *C_here = row + STATES_A_LANE;
        read_row<0, 2 * STATES_A_LANE>(row, pipeline.bc + (step * STATE_LANES + pipeline.walk.state_lane) * BC_WIDTH);
        const auto own_steps =
            *reinterpret_cast<const Several<Step, CHANNELS_A_LANE> *>(pipeline.step_rows + step * STEPS_WIDTH + ch);
        const auto own_dy =
            *reinterpret_cast<const Vec<OutT, CHANNELS_A_LANE> *>(pipeline.pixels_dy + step * DY_WIDTH + ch);
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c) {
            const float s = own_steps.v[c].s;
            sx[c] = own_steps.v[c].sx, dy[c] = own_dy.get(c);
#pragma unroll
            for (int n = 0; n < STATES_A_LANE; ++n) {
                after[c][n] = state_after[c][n];
                g[c][n] = fmaf(C_here[n], dy[c], carry[c][n]);
                by_b[c] = fmaf(g[c][n], B_here[n], by_b[c]);
                carry[c][n] = (MATRIX_SUMS ? decay[c][n] : exp2_fast(s * a_log[c][n])) * g[c][n];
                const float ga = carry[c][n] * before[c][n];
                by_a[c] = fmaf(ga, a_log[c][n], by_a[c]);
                da[c][n] = fmaf(ga, s, da[c][n]);
            }
        }
    }
};

// The gradients of a walk's pixels and steps, and what they sum up to: of the step bias and D.
struct ChannelGradients {
    // After the sums over states a lane finishes one of its own channels, or, where matrices made them, the one of its
    // row.
    static constexpr bool PAIRED = MATRIX_SUMS && FUSED_PROJECTION && CHANNELS_A_LANE == 2 && sizeof(RouteT) == 2 &&
        sizeof(OutT) == 2 && PIECE >= 4;   // as matrices of channels and steps, stored two channels at a time

    const Pipeline &pipeline;
    const ProjectionGradient &projection;
    int within;                   // the channel of the warp that the lane finishes,
    bool mine;                    // if it does
    RouteT *dx;
    RowT *ddt;
    int dx_stride, ddt_stride;    // bytes between pixels
    float bias_sum = 0.f, d_sum = 0.f;
    int first = 0, inside = 0;    // of the stage's steps the sub-chunk's first, and how many exist

    static __device__ __forceinline__ int channel(int channel_lane, int state_lane) {
        return MATRIX_SUMS ? state_lane * CHANNELS_A_LANE / 2
                           : channel_lane * CHANNELS_A_LANE + state_lane % CHANNELS_A_LANE;
    }
    static __device__ __forceinline__ bool finishes(int state_lane) {
        return !MATRIX_SUMS || CHANNELS_A_LANE == 2 || state_lane % 2 == 0;
    }

    // The lane's channel at one step, from sums over states: of g B, and of A times g, the decay and the state before.
    __device__ __forceinline__ void finish(int step, float by_b, float by_a) {
        const bool real = mine && within < pipeline.walk.existing && step < inside;
        const int at_pixel = __shfl_sync(~0u, pipeline.pixel, step), ch = mine ? within : 0;
        const float s = pipeline.step_rows[step * STEPS_WIDTH + ch].s;
        const float x_here = to_float(pipeline.pixels_x[step * X_WIDTH + ch]);
        float d_step = (SOFTPLUS ? softplus_derivative(s) : 1.f) * fmaf(x_here, by_b, LN2 * by_a);
        if (!real) d_step = 0.f;
        if constexpr (FUSED_PROJECTION)
            if (mine) projection.tile()[step * TILE_WIDTH + within] = from_float<bf16>(d_step);
        bias_sum += d_step;
        d_sum = fmaf(x_here, to_float(pipeline.pixels_dy[step * DY_WIDTH + ch]), d_sum);
        const RouteT dx_here = from_float<RouteT>(s * by_b);   // the merge multiplies by ln 2
        if (real) *at(dx, at_pixel, dx_stride) = dx_here;
        if constexpr (!FUSED_PROJECTION)
            if (real) *at(ddt, at_pixel, ddt_stride) = from_float<RowT>(d_step);
    }

    // The same for a sub-chunk: sums of channel lane / 4 at step lane % 4 * 2 and the next. Where there is no step, s
    // and x are zero, and so is all that comes of them.
    __device__ __forceinline__ void finish_pairs(const float *sums) {
        const int lane = pipeline.walk.lane;
        const unsigned x_pair = read_transposed(pipeline.pixels_x + (first + lane % 8) * X_WIDTH);
        const unsigned dy_pair = read_transposed(pipeline.pixels_dy + (first + lane % 8) * DY_WIDTH);
        float d_step[2], dx_here[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float x_here = e ? upper_half(x_pair) : lower_half(x_pair);
            const float s = pipeline.step_rows[(first + lane % 4 * 2 + e) * STEPS_WIDTH + lane / 4].s;
            d_step[e] = softplus_derivative(s) * fmaf(x_here, sums[e], LN2 * sums[2 + e]);
            bias_sum += d_step[e];
            d_sum = fmaf(x_here, e ? upper_half(dy_pair) : lower_half(dy_pair), d_sum);
            dx_here[e] = s * sums[e];
        }
        const int row = first + lane / 4, ch = lane % 4 * 2, at_pixel = __shfl_sync(~0u, pipeline.pixel, row);
        *reinterpret_cast<unsigned *>(projection.tile() + row * TILE_WIDTH + ch) =
            transpose(two_halves(d_step[0], d_step[1]));
        const unsigned dx_pair = transpose(two_halves(dx_here[0], dx_here[1]));
        if (row < inside && ch < pipeline.walk.existing)
            *reinterpret_cast<unsigned *>(at(dx, at_pixel, dx_stride)) = dx_pair;
    }

    // dbias, dD: from the warp's first channel on. The lanes that finished other steps of the same channel are added.
    __device__ __forceinline__ void write_sums(float *dbias, float *dD) {
        constexpr int FROM = MATRIX_SUMS ? 1 : CHANNEL_LANES * CHANNELS_A_LANE, TO = MATRIX_SUMS ? 4 : 32;
#pragma unroll
        for (int offset = FROM; offset < TO; offset *= 2) {
            bias_sum += __shfl_xor_sync(~0u, bias_sum, offset);
            d_sum += __shfl_xor_sync(~0u, d_sum, offset);
        }
        const Walk &walk = pipeline.walk;
        const bool first = MATRIX_SUMS ? mine && walk.lane % 4 == 0 : walk.state_lane < CHANNELS_A_LANE;
        if (first && within < walk.existing) dbias[within] = bias_sum, dD[within] = d_sum;
    }
};

// Sums by matrix instructions: in a lane, g and the states are already their first matrix, (states, channels).
struct MatrixSums {
    float by_b_matrix[(STATES_A_LANE + 1) / 2][4] = {}, by_c_matrix[(STATES_A_LANE + 1) / 2][4] = {};
    float by_states_matrix[4] = {};

    struct Constants { __device__ __forceinline__ Constants(int, i64) {} };

    __device__ __forceinline__ void add(const Constants &, const ChannelGradients &channels, int j, const AtStep &at) {
        const Walk &walk = channels.pipeline.walk;
        // dB and dC: states by channels times channels by steps, of which this step has column j.
        const bool mine = walk.lane / 4 == j;
        const float sx0 = mine ? at.sx[0] : 0.f, sx1 = mine ? at.sx[1] : 0.f;
        const float dy0 = mine ? at.dy[0] : 0.f, dy1 = mine ? at.dy[1] : 0.f;
#pragma unroll
        for (int n = 0; n < STATES_A_LANE; n += 2) {
            multiply_add_tf32(by_b_matrix[n / 2], at.g[0][n], at.g[0][n + 1], at.g[1][n], at.g[1][n + 1], sx0, sx1);
            multiply_add_tf32(by_c_matrix[n / 2], at.after[0][n], at.after[0][n + 1], at.after[1][n],
                              at.after[1][n + 1], dy0, dy1);
        }
        // Sums over states: of (states, channels), transposed, the columns are added into column j; by_b's rows first,
        // then by_a's.
        matrix_multiply_add(by_states_matrix, transpose(two_halves(at.by_b[0], at.by_b[1])),
                            transpose(two_halves(at.by_a[0], at.by_a[1])), mine ? 0x3f803f80 : 0);
    }

    __device__ __forceinline__ void finish(ChannelGradients &channels) {
        constexpr int TOGETHER = STATES_A_LANE % 2 == 0 ? 2 : 1;   // neighbouring states, written at once
        const Walk &walk = channels.pipeline.walk;
        const int lane = walk.lane;
        RowT *cells = walk.cells();
        if constexpr (ChannelGradients::PAIRED) channels.finish_pairs(by_states_matrix);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int step = channels.first + lane % 4 * 2 + e;
            if constexpr (!ChannelGradients::PAIRED)
                channels.finish(step, by_states_matrix[e], by_states_matrix[2 + e]);
            RowT *to = cells + step * ROW_WIDTH + B_COLUMN + walk.state_lane * STATES_A_LANE;
#pragma unroll
            for (int n = 0; n < STATES_A_LANE; n += TOGETHER) {
                float b[TOGETHER], c[TOGETHER];
#pragma unroll
                for (int k = 0; k < TOGETHER; ++k) {
                    b[k] = by_b_matrix[n / 2][(n + k) % 2 * 2 + e] * LN2;
                    c[k] = by_c_matrix[n / 2][(n + k) % 2 * 2 + e] * LN2;
                }
                Vec<RowT, TOGETHER> rounded;
                rounded.set(b);
                *reinterpret_cast<Vec<RowT, TOGETHER> *>(to + n) = rounded;
                rounded.set(c);
                *reinterpret_cast<Vec<RowT, TOGETHER> *>(to + PADDED_STATES + n) = rounded;
            }
        }
    }
};

// Sums of COUNT values over the lanes that differ in bits FIRST .. FIRST * LANES - 1 of their number, by exchanging
// halves: afterwards a lane holds COUNT / LANES of the sums, starting at (its index) * COUNT / LANES.
template <int COUNT, int FIRST, int LANES> __device__ __forceinline__ void reduce_scatter(float *v, int lane) {
    if constexpr (LANES > 1) {
        static_assert(COUNT % 2 == 0, "halves");
        constexpr int HALF = COUNT / 2, BIT = FIRST * LANES / 2;
        const bool upper = lane & BIT;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const float give = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
            v[i] = keep + __shfl_xor_sync(~0u, give, BIT);
        }
        reduce_scatter<HALF, FIRST, LANES / 2>(v, lane);
    }
}

// Sums of 16 values over the lanes of a warp, by matrices of ones and zeros that add four lanes of a value into a row
// of its own: select[i] has ones in rows 2 i (for the first of two values) and 2 i + 1. A lane then holds values
// lane / 4 (v[0]) and lane / 4 + 8 (v[2]).
__device__ __forceinline__ void reduce_by_matrix(float *v, const float4 *select) {
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        const float4 a = select[i % 8 / 2];
        multiply_add_tf32(d[i / 8], a.x, a.y, a.z, a.w, v[i], v[i + 1]);
    }
    v[0] = d[0][0] + d[0][1], v[2] = d[1][0] + d[1][1];
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        v[0] += __shfl_xor_sync(~0u, v[0], bit);
        v[2] += __shfl_xor_sync(~0u, v[2], bit);
    }
}

// Sums over lanes: of a group of steps over channels, by exchanges of halves or (bfloat16 rows, few states) by matrices
// that add lanes; over states by exchanges of halves, as soon as there is a value for every lane.
struct LaneSums {
    static constexpr bool BY_MATRIX = HALF_ROWS && STATE_LANES == 1;
    static constexpr int SUM_STATES =
        STATES_A_LANE <= 1 ? 1 : STATES_A_LANE <= 2 ? 2 : STATES_A_LANE <= 4 ? 4 : 8;   // a power of two
    static constexpr int GROUP =                                                      // steps summed over channels
        BY_MATRIX ? 8 / SUM_STATES : CHANNEL_LANES > 2 * SUM_STATES ? CHANNEL_LANES / (2 * SUM_STATES) : 1;
    static constexpr int STATE_GROUP = STATE_LANES / CHANNELS_A_LANE;                  // steps summed over states
    static_assert(SUB_CHUNK % GROUP == 0 && SUB_CHUNK % STATE_GROUP == 0, "whole groups");

    // The matrices of reduce_by_matrix.
    struct Constants {
        float4 select[BY_MATRIX ? 4 : 1];

        __device__ __forceinline__ Constants(int lane, i64 dim) {
            if constexpr (BY_MATRIX) {
                const float zero = __uint_as_float((unsigned)dim >> 31);   // unknown to the compiler, to be kept
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    select[i] = make_float4(lane / 4 == 2 * i ? 1.f : zero, zero, lane / 4 == 2 * i + 1 ? 1.f : zero,
                                            zero);
            }
        }
    };

    float sums[GROUP * 2 * SUM_STATES], by_states[STATE_GROUP * CHANNELS_A_LANE * 2];

    __device__ __forceinline__ void add(const Constants &constants, ChannelGradients &channels, int j,
                                        const AtStep &at) {
        const Walk &walk = channels.pipeline.walk;
        float *sum = sums + j % GROUP * 2 * SUM_STATES;
#pragma unroll
        for (int n = 0; n < SUM_STATES; ++n) {
            sum[n] = sum[SUM_STATES + n] = 0.f;
#pragma unroll
            for (int c = 0; c < CHANNELS_A_LANE; ++c)
                if (n < STATES_A_LANE) {
                    sum[n] = fmaf(at.g[c][n], at.sx[c], sum[n]);
                    sum[SUM_STATES + n] = fmaf(at.after[c][n], at.dy[c], sum[SUM_STATES + n]);
                }
        }
        if (j % GROUP == 0) finish_group(constants, walk, walk.cells(), channels.first + j);
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c) {
            by_states[(j % STATE_GROUP * CHANNELS_A_LANE + c) * 2] = at.by_b[c];
            by_states[(j % STATE_GROUP * CHANNELS_A_LANE + c) * 2 + 1] = at.by_a[c];
        }
        if (j % STATE_GROUP == 0) {
            reduce_scatter<STATE_GROUP * CHANNELS_A_LANE * 2, CHANNEL_LANES, STATE_LANES>(by_states, walk.lane);
            channels.finish(channels.first + j + walk.state_lane / CHANNELS_A_LANE, by_states[0], by_states[1]);
        }
    }

    // dB and dC of the group of steps from this one on.
    __device__ __forceinline__ void finish_group(const Constants &constants, const Walk &walk, RowT *cells, int step) {
        const int lane = walk.lane;
        if constexpr (BY_MATRIX) {
            reduce_by_matrix(sums, constants.select);
            if (lane % 4 == 0 && lane / 4 % SUM_STATES < STATES_A_LANE) {
                RowT *to = cells + (step + lane / 4 / (2 * SUM_STATES)) * ROW_WIDTH + B_COLUMN +
                    lane / 4 / SUM_STATES % 2 * PADDED_STATES + lane / 4 % SUM_STATES;
                to[0] = from_float<RowT>(sums[0] * LN2);
                to[GROUP / 2 * ROW_WIDTH] = from_float<RowT>(sums[2] * LN2);
            }
        } else {
            reduce_scatter<GROUP * 2 * SUM_STATES, 1, CHANNEL_LANES>(sums, lane);
            constexpr int HELD = GROUP * 2 * SUM_STATES / CHANNEL_LANES;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int index = walk.channel_lane * HELD + i, n = index % SUM_STATES, which = index / SUM_STATES % 2;
                const int row = step + index / SUM_STATES / 2;
                if (n < STATES_A_LANE)
                    cells[row * ROW_WIDTH + B_COLUMN + which * PADDED_STATES + walk.state_lane * STATES_A_LANE + n] =
                        from_float<RowT>(sums[i] * LN2);
            }
        }
    }

    __device__ __forceinline__ void finish(ChannelGradients &) {}   // every group is finished where it is whole
};

template <bool BY_MATRICES> struct Choose { using Sums = LaneSums; };
template <> struct Choose<true> { using Sums = MatrixSums; };
using Sums = Choose<MATRIX_SUMS>::Sums;
