// The gradients of the step projection (FUSED_PROJECTION): matrix products of a tile, the steps' gradients of a stage
// for the warp's channels, [STAGE][TILE_WIDTH] bfloat16 in shared memory.

struct ProjectionGradient {
    using Words = Several<float, WEIGHT_WORDS>;

    const Pipeline &pipeline;

    __device__ __forceinline__ bf16 *tile() const { return reinterpret_cast<bf16 *>(pipeline.walk.own + TILE_AT); }
    __device__ __forceinline__ Words *weight_sums() const {
        return reinterpret_cast<Words *>(pipeline.walk.own + WEIGHT_SUMS_AT);
    }

    __device__ __forceinline__ void clear() const {
        const int lane = pipeline.walk.lane;
        for (int i = lane; i < STAGE * TILE_WIDTH / 2; i += 32) pipeline.walk.own[TILE_AT + i] = 0.f;
        for (int i = lane; i < WEIGHT_TILES * RANK_TILES * 32 * WEIGHT_WORDS; i += 32)
            pipeline.walk.own[WEIGHT_SUMS_AT + i] = 0.f;
    }
    // Of a stage that has no second sub-chunk.
    __device__ __forceinline__ void clear_second_sub_chunk() const {
        const int lane = pipeline.walk.lane;
        for (int i = lane; i < SUB_CHUNK * TILE_WIDTH / 2; i += 32)
            pipeline.walk.own[TILE_AT + SUB_CHUNK * TILE_WIDTH / 2 + i] = 0.f;
    }

    // The rows' cells of the numbers of the steps: (steps, channels) by (channels, ranks).
    __device__ __forceinline__ void write_cells(const Projection &projection) const {
        const int lane = pipeline.walk.lane;
        RowT *cells = pipeline.walk.cells();
#pragma unroll
        for (int k = 0; k < RANK_TILES; ++k) {
            float d[4] = {0.f, 0.f, 0.f, 0.f};
            const bf16 *from = tile() + lane / 4 * TILE_WIDTH + lane % 4 * 2;
#pragma unroll
            for (int t = 0; t < TILE_ROWS / 8; ++t)
                matrix_multiply_add(d, *reinterpret_cast<const unsigned *>(from + t * 8),
                                    *reinterpret_cast<const unsigned *>(from + t * 8 + 8 * TILE_WIDTH),
                                    transpose(projection.weight[t][k]));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                RowT *to = cells + (i * 8 + lane / 4) * ROW_WIDTH + k * 8 + lane % 4 * 2;
                if (k * 8 + 8 <= RANK) {
                    Vec<RowT, 2> rounded;
                    rounded.set(d + 2 * i);
                    *reinterpret_cast<Vec<RowT, 2> *>(to) = rounded;
                } else {
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (k * 8 + lane % 4 * 2 + e < RANK) to[e] = from_float<RowT>(d[2 * i + e]);
                }
            }
        }
    }

    // dt_weight's share of a stage: (channels, steps) by (steps, ranks).
    __device__ __forceinline__ void add_weight() const {
        const int lane = pipeline.walk.lane;
#pragma unroll
        for (int k = 0; k < RANK_TILES; ++k)
#pragma unroll
            for (int t = 0; t < WEIGHT_TILES; ++t) {
                Words *sum = weight_sums() + (t * RANK_TILES + k) * 32 + lane;
                Words old = *sum;
                float d[4] = {old.v[0], old.v[1], WEIGHT_WORDS > 2 ? old.v[WEIGHT_WORDS - 2] : 0.f,
                              WEIGHT_WORDS > 2 ? old.v[WEIGHT_WORDS - 1] : 0.f};
#pragma unroll
                for (int o = 0; o < 2; ++o) {
                    const int row = o * 8 + lane % 8;
                    const bf16 *from = tile() + row * TILE_WIDTH + t * 16;
                    matrix_multiply_add(d, read_transposed(from),
                                        t * 16 + 8 < TILE_ROWS ? read_transposed(from + 8) : 0,
                                        read_transposed(pipeline.raw + row * ROW_WIDTH + k * 8));
                }
#pragma unroll
                for (int i = 0; i < WEIGHT_WORDS; ++i) old.v[i] = d[i];
                *sum = old;
            }
    }

    // to: (walks * dim, RANK), the warp's channels from row `at` on.
    __device__ __forceinline__ void write_weight(RowT *to, i64 at, i64 dim) const {
        const Walk &walk = pipeline.walk;
#pragma unroll
        for (int k = 0; k < RANK_TILES; ++k)
#pragma unroll
            for (int t = 0; t < WEIGHT_TILES; ++t) {
                const Words sum = weight_sums()[(t * RANK_TILES + k) * 32 + walk.lane];
#pragma unroll
                for (int i = 0; i < WEIGHT_WORDS; ++i) {
                    const int ch = t * 16 + i / 2 * 8 + walk.lane / 4, r = k * 8 + walk.lane % 4 * 2 + i % 2;
                    if (ch < CHANNELS_A_WARP && walk.first + ch < dim && r < RANK)
                        to[(at + ch) * RANK + r] = from_float<RowT>(sum.v[i]);
                }
            }
    }
};
