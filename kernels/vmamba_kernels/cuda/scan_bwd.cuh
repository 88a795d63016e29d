// What the parts of the backward kernel share: sizes, what a warp works on, matrix instructions.
#include "scan.cuh"

constexpr int CHANNELS_A_WARP = CHANNEL_LANES * CHANNELS_A_LANE;
constexpr int LANE_STATES = CHANNELS_A_LANE * STATES_A_LANE;   // of all its channels
constexpr int STAGES = CHUNK / STAGE;                          // of a chunk
constexpr int SUB_CHUNKS = CHUNK / SUB_CHUNK;                  // of a chunk
constexpr int STAGE_SUB_CHUNKS = STAGE / SUB_CHUNK;            // of a stage
constexpr int SUB_CHUNK_PARTS = SUB_CHUNK / PART;              // of a sub-chunk
static_assert((STATE_LANES == 1 && CHANNELS_A_LANE == 1 && STATES_A_LANE <= 4) ||
              (STATE_LANES == 8 && CHANNELS_A_LANE <= 2 && STATES_A_LANE <= 8), "lanes");
static_assert(CHUNK % STAGE == 0 && STAGE % SUB_CHUNK == 0 && SUB_CHUNK % PART == 0, "whole stages, sub-chunks, parts");

template <class T, int COUNT> struct alignas(COUNT * sizeof(T)) Several { T v[COUNT]; };
struct alignas(8) Step { float s, sx; };   // of a channel: s and s x

// An object of this kernel holds single values or arrays of a lane's numbers, not both: NVRTC takes one that has arrays
// apart only after it has unrolled the loops over them, too late to see what its single values say (at 16 states the
// code was then 43 KB instead of 54, without a loop for either turn of the slots).

// What a warp works on: its channels of a walk.
struct Walk {
    int lane, channel_lane, state_lane;
    float *own;                   // the warp's shared memory
    int kind;                     // of the route
    int first, existing;          // of the warp's channels the first, and how many there are from it on
    int length, start, end;       // steps of the route; the walk's first, and the one behind its last

    __device__ __forceinline__ RowT *cells() const { return reinterpret_cast<RowT *>(own + CELLS_AT); }
};

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
