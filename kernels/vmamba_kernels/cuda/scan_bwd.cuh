// What the backward kernel is built from: its sizes, its shared memory, its sums. The macros are explained in
// scan_bwd.cu.
#include "scan.cuh"

constexpr int CW = LANES * C;                          // channels a warp
constexpr int SUBS = CHUNK / SUB;                      // sub-chunks a chunk
constexpr int PAIRS = C * NS;                          // states a lane
constexpr int NSP = NS <= 1 ? 1 : NS <= 2 ? 2 : 4;     // of a channel, a power of two (NS <= 4)
constexpr bool BY_MATRIX = CONVERT && LANES >= 4;      // dB and dC are summed over lanes by matrix instructions (tf32)
constexpr int GROUP = BY_MATRIX ? 8 / NSP : LANES > 2 * NSP ? LANES / (2 * NSP) : 1;   // steps summed together
constexpr int ITEM_STEPS = S / C > 1 ? S / C : 1;      // steps whose sums over states are reduced together
static_assert(NS <= 4 && CW <= 32 && SUB % GROUP == 0 && SUB % ITEM_STEPS == 0 && (C == 1 || C <= S), "layout");

// With bfloat16 rows the gradients of the step projection are matrix products of the steps' gradients (bfloat16, a tile
// in shared memory) on the spot; otherwise the steps' gradients are written out.
constexpr bool FUSED = CONVERT && R > 0;
constexpr int DEPTH = FUSED ? (R + 7) / 8 : 0;         // column tiles of dt_weight
constexpr int TILE_ROWS = CW < 8 ? 8 : CW, TILE_WIDTH = TILE_ROWS + 8;   // channels of the tile, halves of its rows
constexpr int WEIGHT_TILES = (CW + 15) / 16;

// What a step of a channel is made of, besides the sigmoid: s, x and dy; two half-width ones share a word.
template <bool PACKED> struct StepItem {
    float s, x_, dy_, unused;
    __device__ __forceinline__ void set(float step, Vec<X, 2> x, Vec<G, 2> dy, int e) {
        s = step, x_ = x.get(e), dy_ = dy.get(e);
    }
    __device__ __forceinline__ float x() const { return x_; }
    __device__ __forceinline__ float dy() const { return dy_; }
};
template <> struct StepItem<true> {
    float s;
    unsigned both;
    __device__ __forceinline__ void set(float step, Vec<bf16, 2> x, Vec<bf16, 2> dy, int e) {
        s = step, both = __byte_perm(x.both, dy.both, e ? 0x7632 : 0x5410);
    }
    __device__ __forceinline__ float x() const { return lower_half(both); }
    __device__ __forceinline__ float dy() const { return upper_half(both); }
};
template <class A, class B> struct Same { static constexpr bool value = false; };
template <class A> struct Same<A, A> { static constexpr bool value = true; };
constexpr bool PACKED = Same<X, bf16>::value && Same<G, bf16>::value;
using Item = StepItem<PACKED>;
template <class T> struct alignas(2 * sizeof(T)) Pair { T v[2]; };
constexpr int IW = CW < 32 ? CW : CW + 8;              // of a row of items: spreads the rows over the banks

// A warp's shared memory, in floats; layout.py adds up the same.
constexpr int RAW = SUB * ROW * sizeof(P) / 4, RAW_AT = 0;                // copied rows, now and next
constexpr int ROWS_AT = RAW_AT + 2 * RAW;                                 // B and C as float32
constexpr int STEPS_AT = ROWS_AT + (CONVERT ? SUB * RS : 0);              // [SUB][IW] of s, x, dy
constexpr int SIGMOIDS_AT = STEPS_AT + SUB * IW * (sizeof(Item) / 4);     // [SUB][IW]
constexpr int CELLS_AT = SIGMOIDS_AT + SUB * IW;                          // [SUB][ROW]: rows' gradient
constexpr int TILE_AT = CELLS_AT + SUB * ROW;                             // [SUB][TILE_WIDTH] bfloat16
constexpr int WEIGHT_AT = TILE_AT + (FUSED ? SUB * TILE_WIDTH / 2 : 0);   // [TILE_ROWS / 8][DEPTH][32] pairs
constexpr int WEIGHT_SUM_AT = WEIGHT_AT + TILE_ROWS / 8 * DEPTH * 32;     // [WEIGHT_TILES][DEPTH][32] of four
constexpr int STATES_AT = WEIGHT_SUM_AT + WEIGHT_TILES * DEPTH * 128;     // [SUBS - 1][PAIRS][32]
constexpr int OWN = STATES_AT + (SUBS - 1) * PAIRS * 32;
static_assert(OWN * 4 == WARP_SHARED, "layout.py counts another size");

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

// Sums of 16 values over the lanes of a state group, by matrices of ones and zeros that add four lanes of a value into
// a row of its own: select[i] has ones in rows 2 i (for the first of two values) and 2 i + 1. Inputs lose float32's
// last 13 bits. A lane then holds values lane / 4 (v[0]; v[1] for the next state group if LANES is 4) and lane / 4 + 8
// (v[2], v[3]), of state group lane % 4 * S / 4.
__device__ __forceinline__ void reduce_by_matrix(float *v, const uint4 *select) {
    float d[2][4] = {};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
        float *to = d[i / 8];
        const uint4 a = select[i % 8 / 2];
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(__float_as_uint(v[i])), "r"(__float_as_uint(v[i + 1])));
    }
    v[0] = d[0][0], v[1] = d[0][1], v[2] = d[1][0], v[3] = d[1][1];
    if constexpr (LANES > 4) v[0] += v[1], v[2] += v[3];
#pragma unroll
    for (int bit = 1; bit < LANES / 8; bit *= 2) {
        v[0] += __shfl_xor_sync(~0u, v[0], bit);
        v[2] += __shfl_xor_sync(~0u, v[2], bit);
    }
}

// Eight rows of eight halves, transposed: a lane gets column lane / 4 of rows lane % 4 * 2 and the next.
__device__ __forceinline__ unsigned read_transposed(const void *row_of_lane) {
    unsigned v, address = static_cast<unsigned>(__cvta_generic_to_shared(row_of_lane));
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(v) : "r"(address));
    return v;
}

#if TILED
typedef float Cell;
#else
typedef P Cell;
#endif
