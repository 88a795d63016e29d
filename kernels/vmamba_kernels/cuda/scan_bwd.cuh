// What the backward kernel is built from: its sizes, its shared memory, its sums. The macros are explained in
// scan_bwd.cu.
#include "scan.cuh"

constexpr int STAGE = 16;                              // steps that are copied and prepared at once
constexpr int STAGES = CHUNK / STAGE;                  // stages a chunk
constexpr int SLOTS = STAGES < 2 ? 2 : STAGES;
constexpr int HALVES = STAGE / SUB;                    // sub-chunks a stage
constexpr int SUBS = CHUNK / SUB;                      // sub-chunks a chunk
constexpr int CW = LANES * C;                          // channels a warp
constexpr int PAIRS = C * NS;                          // states a lane
constexpr int NSP = NS <= 1 ? 1 : NS <= 2 ? 2 : NS <= 4 ? 4 : 8;   // of a channel, a power of two
constexpr bool DIRECT = CONVERT && S == 8;             // sums by matrix instructions, from where states lie
constexpr int PARTS = SUB / PART;                      // parts a sub-chunk
constexpr int FEW = S == 8 && NS % 2 == 0 ? 2 : 1;     // neighbouring states whose B or C can be read at once
constexpr int KEPT = DIRECT ? (PAIRS + 1) / 2 : PAIRS; // words of a lane's states, kept as bfloat16 or float32
constexpr bool BY_MATRIX = CONVERT && S == 1;          // sums over channels by matrix instructions that add lanes
// Without DIRECT: steps summed over channels at once, steps summed over states at once.
constexpr int GROUP = BY_MATRIX ? 8 / NSP : LANES > 2 * NSP ? LANES / (2 * NSP) : 1;
constexpr int ITEM_STEPS = S / C;
static_assert((S == 1 && C == 1 && NS <= 4) || (S == 8 && C <= 2 && NS <= 8), "layout");
static_assert(CHUNK % STAGE == 0 && STAGE % SUB == 0 && SUB % GROUP == 0 && SUB % ITEM_STEPS == 0, "layout");

// With bfloat16 rows the gradients of the step projection are matrix products of the steps' gradients (bfloat16, a tile
// in shared memory) on the spot; otherwise the steps' gradients are written out.
constexpr bool FUSED = CONVERT && R > 0;
constexpr int DEPTH = FUSED ? (R + 7) / 8 : 0;         // column tiles of dt_weight
constexpr int TILE_ROWS = CW < 8 ? 8 : CW, TILE_WIDTH = TILE_ROWS + 8;   // channels of the tile, halves of its rows
constexpr int WEIGHT_TILES = (CW + 15) / 16, WEIGHT_KEPT = CW < 16 ? 2 : 4;

// Steps' and pixels' gradients of a sub-chunk as matrices of channels and steps, which are transposed to be stored two
// channels at a time.
constexpr bool PAIRED = DIRECT && FUSED && C == 2 && sizeof(Y) == 2 && sizeof(G) == 2 && PIECE >= 4;

template <class T, int COUNT> struct alignas(COUNT * sizeof(T)) Several { T v[COUNT]; };

struct alignas(8) Step { float s, sx; };               // of a channel: s and s x
constexpr int IW = CW < 32 ? CW : CW + 8;              // of a row of steps: spreads the rows over the banks
template <class T> constexpr int WIDTH = CW < 32 ? CW : CW + 16 / sizeof(T);   // of a row of pixels, likewise

// Shared memory, in floats; layout.py adds up the same. What is copied from global memory has a slot for every stage of
// a chunk, and at least two; what is made of it, a place for every stage of a chunk. A block's: rows,
// [SLOTS][STAGE][ROW]; B and C as float32, a lane's together, [STAGES][STAGE][S][BC].
constexpr int BC = NS == 1 ? 2 : (2 * NS + 3) / 4 * 4;
constexpr int RAW = STAGE * ROW * sizeof(P) / 4;
constexpr int BC_AT = SLOTS * RAW, BLOCK = BC_AT + CHUNK * S * BC;
// A warp's:
constexpr int X_AT = 0;                                                        // [SLOTS][STAGE][WIDTH] of x
constexpr int DY_AT = X_AT + SLOTS * STAGE * WIDTH<X> * sizeof(X) / 4;         // of dy
constexpr int GIVEN_AT = DY_AT + SLOTS * STAGE * WIDTH<G> * sizeof(G) / 4;     // of the steps, if given
constexpr int STEPS_AT = GIVEN_AT + (R ? 0 : SLOTS * STAGE * WIDTH<X> * sizeof(X) / 4);   // [STAGES][STAGE][IW] of Step
constexpr int CELLS_AT = STEPS_AT + CHUNK * IW * 2;                            // [STAGE][ROW]: rows' gradient
constexpr int TILE_AT = CELLS_AT + STAGE * ROW * sizeof(P) / 4;                // [STAGE][TILE_WIDTH] bfloat16
// [WEIGHT_TILES][DEPTH][32][WEIGHT_KEPT] of dt_weight's gradient, then [CHUNK / PART][32][KEPT] of states.
constexpr int WEIGHT_SUM_AT = TILE_AT + (FUSED ? STAGE * TILE_WIDTH / 2 : 0);
constexpr int STATES_AT = WEIGHT_SUM_AT + WEIGHT_TILES * DEPTH * 32 * WEIGHT_KEPT;
constexpr int OWN = STATES_AT + (SUBS > 1 ? CHUNK / PART * 32 * KEPT : 0);
static_assert(BLOCK * 4 == BLOCK_SHARED && OWN * 4 == WARP_SHARED, "layout.py counts another size");

// Sums of COUNT values over the lanes that differ in bits FIRST .. FIRST * LANES_ - 1 of their number, by exchanging
// halves: afterwards a lane holds COUNT / LANES_ of the sums, starting at (its index) * COUNT / LANES_.
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

// Start copying the warp's channels of a stage's pixels, zeros where there is no channel or step. pixel: of step
// lane % STAGE.
template <class T>
__device__ __forceinline__ void load_pixels(T *to, const T *from, int pixel, int stride_bytes, int channels, int steps,
                                            int lane) {
    constexpr int MOST = CW * sizeof(T) < PIECE ? CW * sizeof(T) : PIECE;
    constexpr int EACH = MOST < sizeof(T) ? 1 : MOST / sizeof(T);
    constexpr int PER_ROW = CW / EACH;
#pragma unroll
    for (int turn = 0; turn < STAGE * PER_ROW; turn += 32) {
        const int i = turn + lane, j = i / PER_ROW, ch = i % PER_ROW * EACH;
        const int at_pixel = __shfl_sync(~0u, pixel, j % STAGE);
        if (STAGE * PER_ROW % 32 == 0 || j < STAGE)
            copy_async<EACH * sizeof(T)>(to + j * WIDTH<T> + ch, at(from, at_pixel, stride_bytes) + ch,
                                         ch < channels && j < steps);
    }
}

// d (16, 8) += a (16, 8) b (8, 8), the inputs without their last 13 bits (tf32). A lane's d: rows lane / 4 and 8 more,
// columns lane % 4 * 2 and the next; a: those rows, first of column lane % 4, then of 4 more; b: rows lane % 4 and 4
// more, column lane / 4.
__device__ __forceinline__ void multiply_add_tf32(float *d, float a0, float a1, float a2, float a3, float b0,
                                                  float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
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

// Eight rows of eight halves, of which a lane has two in row lane / 4, columns lane % 4 * 2 and the next, transposed.
__device__ __forceinline__ unsigned transpose(unsigned two) {
    unsigned r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(two));
    return r;
}

// Eight rows of eight halves, transposed: a lane gets column lane / 4 of rows lane % 4 * 2 and the next.
__device__ __forceinline__ unsigned read_transposed(const void *row_of_lane) {
    unsigned v, address = static_cast<unsigned>(__cvta_generic_to_shared(row_of_lane));
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(v) : "r"(address));
    return v;
}
