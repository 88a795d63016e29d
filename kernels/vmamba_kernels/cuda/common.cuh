// Shared by every kernel. A compilation defines these macros (see kernels.py):
//   N, R          states and rank of the step projection (R = 0: the steps themselves are given, operator selective_scan)
//   S             lanes of a warp that share a channel, each holding NS = ceil(N / S) of its states
//   X, P, Y, G    types of the pixels, of the projected rows and their gradients, of a route's output, of the output's gradient
//   SOFTPLUS      whether the step goes through softplus
// The steps are kept as s = delta / ln 2, so that exp(delta A) = 2^(s A); a state is then h / ln 2, and whoever reads a
// route's output multiplies it by ln 2 once.
// Nothing is included, so that NVRTC alone is enough: the half types are their bits and two conversions.
typedef long long i64;
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#define LN2 0.693147180559945f
#define LOG2E 1.44269504088896f

constexpr int NS = (N + S - 1) / S;          // states a lane
constexpr int NP = NS * S;                   // states of a row, zeros after N
constexpr int LANES = 32 / S;                // lanes of a warp that hold different channels
constexpr int R4 = NS % 4 ? R : (R + 3) / 4 * 4;
constexpr int B0 = R4, C0 = B0 + NP;         // columns of a projected row: steps, then B, then C
constexpr int ROW = (C0 + NP + 7) / 8 * 8;   // padded to whole 16-byte reads

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ float to_float(fp16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}
template <> __device__ __forceinline__ fp16 from_float<fp16>(float v) {
    fp16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}

template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Vec { T v[COUNT]; };

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// log2(1 + 2^w), accurate to float32's relative precision for float32 pixels and to 6e-5 for the half types: one
// exponential of -|w|, then a polynomial of log2(1 + z) / z on [0, 1] (fitted for relative error).
__device__ __forceinline__ float softplus2(float w) {
    float z = exp2_fast(-fabsf(w));
    float p;
    if constexpr (sizeof(X) == 4) {
        p = 0.00754917785525322f;
        p = fmaf(p, z, -0.042567044496536255f);
        p = fmaf(p, z, 0.11285616457462311f);
        p = fmaf(p, z, -0.19711895287036896f);
        p = fmaf(p, z, 0.27564141154289246f);
        p = fmaf(p, z, -0.35840848088264465f);
        p = fmaf(p, z, 0.48069295287132263f);
        p = fmaf(p, z, -0.7213401794433594f);
        p = fmaf(p, z, 1.4426950216293335f);
    } else {
        p = 0.05965152010321617f;
        p = fmaf(p, z, -0.22711940109729767f);
        p = fmaf(p, z, 0.44189879298210144f);
        p = fmaf(p, z, -0.7169874310493469f);
        p = fmaf(p, z, 1.4426132440567017f);
    }
    return fmaf(p, z, fmaxf(w, 0.f));
}

__device__ __forceinline__ float sigmoid2(float w) {   // 1 / (1 + 2^-w)
    float z = exp2_fast(-fabsf(w));
    float r = __fdividef(1.f, 1.f + z);
    return w >= 0.f ? r : z * r;
}

// The pixel that a route visits at a step. Routes: 0 rows, 1 columns, 2 rows reversed, 3 columns reversed.
__device__ __forceinline__ int route_pixel(int step, int route, int height, int width) {
    if (route & 2) step = height * width - 1 - step;
    if (route & 1) {
        int column = step / height;
        step = (step - column * height) * width + column;
    }
    return step;
}

__device__ __forceinline__ void copy_16_async(void *shared, const void *global) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// COUNT floats from shared memory in the widest reads that OFFSET's alignment allows; src is 16-byte aligned.
template <int OFFSET, int COUNT> __device__ __forceinline__ void read_row(float *dst, const float *src) {
    if constexpr (COUNT >= 4 && OFFSET % 4 == 0) {
        float4 v = *reinterpret_cast<const float4 *>(src + OFFSET);
        dst[0] = v.x, dst[1] = v.y, dst[2] = v.z, dst[3] = v.w;
        if constexpr (COUNT > 4) read_row<OFFSET + 4, COUNT - 4>(dst + 4, src);
    } else if constexpr (COUNT >= 2 && OFFSET % 2 == 0) {
        float2 v = *reinterpret_cast<const float2 *>(src + OFFSET);
        dst[0] = v.x, dst[1] = v.y;
        if constexpr (COUNT > 2) read_row<OFFSET + 2, COUNT - 2>(dst + 2, src);
    } else if constexpr (COUNT >= 1) {
        dst[0] = src[OFFSET];
        if constexpr (COUNT > 1) read_row<OFFSET + 1, COUNT - 1>(dst + 1, src);
    }
}

// The state group q of a lane's NS values starting at column FIRST of a row.
template <int FIRST> __device__ __forceinline__ void read_states(float *dst, const float *row, int q) {
    if constexpr (S == 1) {
        read_row<FIRST, NS>(dst, row);
    } else if constexpr (NS % 4 == 0 && FIRST % 4 == 0) {
        read_row<0, NS>(dst, row + FIRST + q * NS);
    } else {
#pragma unroll
        for (int n = 0; n < NS; ++n) dst[n] = row[FIRST + q * NS + n];
    }
}

// Start copying COUNT projected rows (16 bytes a lane and turn); pixel[j] is the row's pixel in this image.
template <int COUNT> __device__ __forceinline__ void load_rows(P *raw, const P *rows, const int *pixel, int stride, int lane) {
    constexpr int EACH = 16 / sizeof(P), PER_ROW = ROW / EACH, TOTAL = COUNT * PER_ROW;
#pragma unroll
    for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
        int v = i * 32 + lane, j = v / PER_ROW, c = v % PER_ROW;
        if (TOTAL % 32 == 0 || v < TOTAL) copy_16_async(raw + v * EACH, rows + (i64)pixel[j] * stride + c * EACH);
    }
    copy_commit();
}

// The copied rows as float32.
template <int COUNT> __device__ __forceinline__ void convert_rows(float *dst, const P *raw, int lane) {
    if constexpr (sizeof(P) == 2) {
        constexpr int TOTAL = COUNT * ROW / 8;
#pragma unroll
        for (int i = 0; i < (TOTAL + 31) / 32; ++i) {
            int v = i * 32 + lane;
            if (TOTAL % 32 == 0 || v < TOTAL) {
                uint4 w = reinterpret_cast<const uint4 *>(raw)[v];   // bfloat16 is float32's upper half
                float4 a, b;
                a.x = __uint_as_float(w.x << 16), a.y = __uint_as_float(w.x & 0xffff0000u);
                a.z = __uint_as_float(w.y << 16), a.w = __uint_as_float(w.y & 0xffff0000u);
                b.x = __uint_as_float(w.z << 16), b.y = __uint_as_float(w.z & 0xffff0000u);
                b.z = __uint_as_float(w.w << 16), b.w = __uint_as_float(w.w & 0xffff0000u);
                reinterpret_cast<float4 *>(dst)[2 * v] = a;
                reinterpret_cast<float4 *>(dst)[2 * v + 1] = b;
            }
        }
    }
}
