// What the backward kernel copies and makes of a chunk, stage by stage, in shared memory: rows and pixels in slots; B,
// C and steps in places; and the rows' gradient on its way out.

// Start copying the warp's channels of a stage's pixels, zeros where there is no channel or step. pixel: of step
// lane % STAGE.
template <int WIDTH, class T>
__device__ __forceinline__ void load_pixels(T *to, const T *from, int pixel, int stride_bytes, int channels, int steps,
                                            int lane) {
    constexpr int MOST = CHANNELS_A_WARP * sizeof(T) < PIECE ? CHANNELS_A_WARP * sizeof(T) : PIECE;
    constexpr int EACH = MOST < sizeof(T) ? 1 : MOST / sizeof(T);
    constexpr int PER_ROW = CHANNELS_A_WARP / EACH;
#pragma unroll
    for (int turn = 0; turn < STAGE * PER_ROW; turn += 32) {
        const int i = turn + lane, j = i / PER_ROW, ch = i % PER_ROW * EACH;
        const int at_pixel = __shfl_sync(~0u, pixel, j % STAGE);
        if (STAGE * PER_ROW % 32 == 0 || j < STAGE)
            copy_async<EACH * sizeof(T)>(to + j * WIDTH + ch, at(from, at_pixel, stride_bytes) + ch,
                                         ch < channels && j < steps);
    }
}

using Projection = StepProjection<STAGE, CHANNELS_A_WARP>;

struct Pipeline {
    const Walk &walk;
    float *shared;                    // the block's memory
    const PixelT *x, *steps;
    const OutT *dy;
    const RowT *rows;
    RowT *d_rows;
    int x_stride, dy_stride, row_stride;   // bytes between pixels
    i64 height, width, division;

    // The chunks take turns in the order of their slots, so that the next chunk's first stage is copied to where this
    // chunk's last one was: which of the two orders, of the chunk that `enter` and `fetch` mean.
    int turn = 0;

    // The stage that is worked on.
    int pixel;                        // the number of the pixel at step lane % STAGE
    const RowT *raw;                  // its rows
    const PixelT *pixels_x, *given;
    const OutT *pixels_dy;
    Step *step_rows;
    float *bc;                        // B and C as float32, a lane's together

    // Work on stage `stage`.
    __device__ __forceinline__ void enter(int stage) {
        const int slot = STAGES == 1 ? stage + turn : turn ? STAGES - 1 - stage : stage;
        const int place = STAGES == 1 ? 0 : slot;
        raw = reinterpret_cast<RowT *>(shared + ROWS_AT) + slot * STAGE * ROW_WIDTH;
        pixels_x = reinterpret_cast<PixelT *>(walk.own + X_AT) + slot * STAGE * X_WIDTH;
        pixels_dy = reinterpret_cast<OutT *>(walk.own + DY_AT) + slot * STAGE * DY_WIDTH;
        given = reinterpret_cast<PixelT *>(walk.own + GIVEN_AT) + slot * STAGE * X_WIDTH;
        step_rows = reinterpret_cast<Step *>(walk.own + STEPS_AT) + place * STAGE * STEPS_WIDTH;
        bc = shared + BC_AT + place * STAGE * STATE_LANES * BC_WIDTH;
    }

    // The pixels of the stage from step l0.
    __device__ __forceinline__ void set_pixel(int l0) {
        pixel = route_pixel(min(l0 + walk.lane % STAGE, walk.end - 1), walk.kind, (int)height, (int)width, walk.length,
                            division);
    }

    // Start copying stage `stage`, of the chunk whose turn it is, from step l0: the block's rows, the warp's pixels.
    __device__ __forceinline__ void fetch(int stage, int l0) {
        enter(stage);
        set_pixel(l0);
        constexpr int EACH = 16 / sizeof(RowT), PER_ROW = ROW_WIDTH / EACH, TOTAL = STAGE * PER_ROW;
#pragma unroll
        for (int first = 0; first < TOTAL; first += 32 * WARPS_A_BLOCK) {
            const int i = first + threadIdx.x, at_pixel = __shfl_sync(~0u, pixel, i / PER_ROW % STAGE);
            if (i < TOTAL)
                copy_async<16>(const_cast<RowT *>(raw) + i * EACH,
                               at(rows, at_pixel, row_stride) + i % PER_ROW * EACH, true);
        }
        const int inside = walk.end - l0;
        load_pixels<X_WIDTH>(const_cast<PixelT *>(pixels_x), x, pixel, x_stride, walk.existing, inside, walk.lane);
        load_pixels<DY_WIDTH>(const_cast<OutT *>(pixels_dy), dy, pixel, dy_stride, walk.existing, inside, walk.lane);
        if constexpr (RANK == 0)
            load_pixels<X_WIDTH>(const_cast<PixelT *>(given), steps, pixel, x_stride, walk.existing, inside, walk.lane);
        copy_commit();
    }

    // The same of the chunk whose turn comes next.
    __device__ __forceinline__ void fetch_next(int stage, int l0) {
        turn ^= 1;
        fetch(stage, l0);
        turn ^= 1;
    }

    // Make B and C as float32 and the steps, of which `inside` exist.
    __device__ __forceinline__ void prepare(Projection &projection, int inside) {
        constexpr int TOGETHER = STATE_LANES == 8 && STATES_A_LANE % 2 == 0 ? 2 : 1;   // neighbours read at once
        const int lane = walk.lane;
#pragma unroll
        for (int first = 0; first < STAGE * STATE_LANES; first += 32 * WARPS_A_BLOCK) {
            const int i = first + threadIdx.x;
            const RowT *from = raw + i / STATE_LANES * ROW_WIDTH + B_COLUMN + i % STATE_LANES * STATES_A_LANE;
            if (i < STAGE * STATE_LANES)
#pragma unroll
                for (int n = 0; n < STATES_A_LANE; n += TOGETHER) {
                    const auto b = *reinterpret_cast<const Vec<RowT, TOGETHER> *>(from + n);
                    const auto c = *reinterpret_cast<const Vec<RowT, TOGETHER> *>(from + PADDED_STATES + n);
                    Several<float, TOGETHER> b_floats, c_floats;
#pragma unroll
                    for (int k = 0; k < TOGETHER; ++k) b_floats.v[k] = b.get(k), c_floats.v[k] = c.get(k);
                    *reinterpret_cast<Several<float, TOGETHER> *>(bc + i * BC_WIDTH + n) = b_floats;
                    *reinterpret_cast<Several<float, TOGETHER> *>(bc + i * BC_WIDTH + STATES_A_LANE + n) = c_floats;
                }
        }
        constexpr int TILES = Projection::TILES;
        float w[2][TILES][2];
        if constexpr (RANK == 0)
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
                for (int t = 0; t < TILES; ++t) {
                    const int ch = CHANNELS_A_WARP % 8 ? lane % 4 * 2 % CHANNELS_A_WARP : t * 8 + lane % 4 * 2;
                    const PixelT *from = given + (o * 8 + lane / 4) * X_WIDTH + ch;
                    const auto two = *reinterpret_cast<const Vec<PixelT, 2> *>(from);
                    w[o][t][0] = two.get(0), w[o][t][1] = two.get(1);
                }
        projection.project(w, raw, w, lane);
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                const int step = o * 8 + lane / 4, ch = t * 8 + lane % 4 * 2;
                if (CHANNELS_A_WARP % 8 == 0 || ch < CHANNELS_A_WARP) {
                    const auto two = *reinterpret_cast<const Vec<PixelT, 2> *>(pixels_x + step * X_WIDTH + ch);
                    Several<Step, 2> both;
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float v = step < inside ? w[o][t][e] : SOFTPLUS ? -1e30f : 0.f;   // a step of nothing
                        both.v[e].s = SOFTPLUS ? softplus2(v) : v;
                        both.v[e].sx = both.v[e].s * two.get(e);
                    }
                    *reinterpret_cast<Several<Step, 2> *>(step_rows + step * STEPS_WIDTH + ch) = both;
                }
            }
    }

    // Add the warps' cells of the stage from step l0.
    __device__ __forceinline__ void write_rows(int l0) {
        set_pixel(l0);
#pragma unroll
        for (int first = 0; first < STAGE * ROW_WIDTH / 4; first += 32 * WARPS_A_BLOCK) {
            const int i = first + threadIdx.x, j = i / (ROW_WIDTH / 4);
            const int at_pixel = __shfl_sync(~0u, pixel, j % STAGE);
            if (i < STAGE * ROW_WIDTH / 4 && l0 + j < walk.end) {
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int other = 0; other < WARPS_A_BLOCK; ++other) {
                    const float *from = shared + BLOCK_SHARED + other * WARP_SHARED + CELLS_AT;
                    const auto v = reinterpret_cast<const Vec<RowT, 4> *>(from)[i];
#pragma unroll
                    for (int k = 0; k < 4; ++k) sum[k] += v.get(k);
                }
                Vec<RowT, 4> result;
                result.set(sum);
                reinterpret_cast<Vec<RowT, 4> *>(at(d_rows, at_pixel, row_stride))[i % (ROW_WIDTH / 4)] = result;
            }
        }
    }
};
