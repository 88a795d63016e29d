// What is kept of a lane's states in the backward kernel: in registers, between parts in shared memory, at borders in
// global memory.

struct States {
    float a_log[CHANNELS_A_LANE][STATES_A_LANE], h[CHANNELS_A_LANE][STATES_A_LANE];
    BorderT border[CHANNELS_A_LANE][STATES_A_LANE];   // at the start of a chunk: see read_border

    // Start reading the states at the start of the chunk of this number: of the one worked on, or of the next one where
    // every chunk is one sub-chunk.
    __device__ __forceinline__ void read_border(const Walk &walk, const BorderT *borders, i64 dim, int chunk) {
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
            for (int n = 0; n < STATES_A_LANE; ++n)
                border[c][n] = chunk > 0 && walk.first + walk.channel_lane * CHANNELS_A_LANE + c < dim &&
                        walk.state_lane * STATES_A_LANE + n < STATES
                    ? borders[((chunk - 1) * (i64)STATES + n) * dim + c] : from_float<BorderT>(0.f);
    }
    __device__ __forceinline__ void start_from_border() {
#pragma unroll
        for (int i = 0; i < LANE_STATES; ++i)
            h[i / STATES_A_LANE][i % STATES_A_LANE] = to_float(border[i / STATES_A_LANE][i % STATES_A_LANE]);
    }

    __device__ __forceinline__ void copy(float (*to)[STATES_A_LANE]) const {
#pragma unroll
        for (int i = 0; i < LANE_STATES; ++i)
            to[i / STATES_A_LANE][i % STATES_A_LANE] = h[i / STATES_A_LANE][i % STATES_A_LANE];
    }

    // The recurrence over one step of the stage.
    __device__ __forceinline__ void advance(const Pipeline &pipeline, int step, float (*decay)[STATES_A_LANE]) {
        float B_here[STATES_A_LANE];
        read_row<0, STATES_A_LANE>(B_here, pipeline.bc + (step * STATE_LANES + pipeline.walk.state_lane) * BC_WIDTH);
        const auto own_steps = *reinterpret_cast<const Several<Step, CHANNELS_A_LANE> *>(
            pipeline.step_rows + step * STEPS_WIDTH + pipeline.walk.channel_lane * CHANNELS_A_LANE);
#pragma unroll
        for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
            for (int n = 0; n < STATES_A_LANE; ++n) {
                decay[c][n] = exp2_fast(own_steps.v[c].s * a_log[c][n]);
                h[c][n] = fmaf(decay[c][n], h[c][n], own_steps.v[c].sx * B_here[n]);
            }
    }

    // The lane's states at the start of a part of the chunk, kept in shared memory: of an odd number the last fills two
    // halves of a word.
    using Words = Several<unsigned, STATE_WORDS % 4 == 0 ? 4 : STATE_WORDS % 2 == 0 ? 2 : 1>;
    static constexpr int EACH = sizeof(Words) / 4;

    static __device__ __forceinline__ Words *kept(const Walk &walk, int part) {
        return reinterpret_cast<Words *>(walk.own + KEPT_AT) + part * (STATE_WORDS / EACH * 32) + walk.lane;
    }
    __device__ __forceinline__ void keep(const Walk &walk, int part) {
        float *states = &h[0][0];
#pragma unroll
        for (int i = 0; i < STATE_WORDS; i += EACH) {
            Words some;
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                if constexpr (MATRIX_SUMS)
                    some.v[k] = two_halves(states[2 * (i + k)], states[min(2 * (i + k) + 1, LANE_STATES - 1)]);
                else
                    some.v[k] = __float_as_uint(states[i + k]);
            kept(walk, part)[i / EACH * 32] = some;
        }
    }
    __device__ __forceinline__ void restore(const Walk &walk, int part) {
        float *states = &h[0][0];
#pragma unroll
        for (int i = 0; i < STATE_WORDS; i += EACH) {
            const Words some = kept(walk, part)[i / EACH * 32];
#pragma unroll
            for (int k = 0; k < EACH; ++k)
                if constexpr (MATRIX_SUMS) {
                    states[2 * (i + k)] = lower_half(some.v[k]);
                    states[min(2 * (i + k) + 1, LANE_STATES - 1)] = upper_half(some.v[k]);
                } else {
                    states[i + k] = __uint_as_float(some.v[k]);
                }
        }
    }
};
