// Types, conversions and memory accesses that every kernel may use. Nothing is included, so that NVRTC alone is enough:
// the half types are their bits and two conversions.
typedef long long i64;
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#define LN2 0.693147180559945f
#define LOG2E 1.44269504088896f

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ float to_float(fp16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}
template <class T> __device__ __forceinline__ unsigned bits(T v) { return reinterpret_cast<unsigned short &>(v); }
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

__device__ __forceinline__ float upper_half(unsigned v) { return __uint_as_float(v & 0xffff0000u); }   // bfloat16s are
__device__ __forceinline__ float lower_half(unsigned v) { return __uint_as_float(v << 16); }           // half a float32
__device__ __forceinline__ unsigned two_halves(float lower, float upper) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(upper), "f"(lower));
    return both;
}

// COUNT neighbouring values, read and written at once; two half-width ones share a register.
template <class T, int COUNT> struct alignas(sizeof(T) * COUNT) Vec {
    T v[COUNT];
    __device__ __forceinline__ float get(int i) const { return to_float(v[i]); }
    __device__ __forceinline__ void set(const float *from) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) v[i] = from_float<T>(from[i]);
    }
};
template <int WORDS> struct alignas(4 * WORDS) HalfPairs {
    unsigned words[WORDS];
    __device__ __forceinline__ float get(int i) const {
        return i % 2 ? upper_half(words[i / 2]) : lower_half(words[i / 2]);
    }
    __device__ __forceinline__ void set(const float *from) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = two_halves(from[2 * i], from[2 * i + 1]);
    }
};
template <> struct Vec<bf16, 2> : HalfPairs<1> {};
template <> struct Vec<bf16, 4> : HalfPairs<2> {};
template <> struct Vec<bf16, 8> : HalfPairs<4> {};
template <> struct Vec<fp16, 2> {
    unsigned both;
    __device__ __forceinline__ float get(int i) const {
        return to_float(fp16{(unsigned short)(i ? both >> 16 : both)});
    }
    __device__ __forceinline__ void set(const float *from) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(from[1]), "f"(from[0]));
    }
};

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}

// The element at a pixel: one multiply-add for a 64-bit address, so that images may pass 2^31 elements.
template <class T> __device__ __forceinline__ T *at(T *base, int pixel, int stride_bytes) {
    return (T *)((const char *)base + (i64)pixel * stride_bytes);
}

// BYTES from global memory, or zeros where it is not to be read. Fewer than four cannot be copied asynchronously.
template <int BYTES> __device__ __forceinline__ void copy_async(void *shared, const void *global, bool read) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int count = read ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(count));
    } else if constexpr (BYTES > 2) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(global), "r"(count),
                     "n"(BYTES));
    } else {
        *(unsigned short *)shared = read ? *(const unsigned short *)global : 0;
    }
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// d (16, 8) += a (16, 8) b (8, 8), bfloat16 into float32. A lane's d: rows lane / 4 and 8 more, columns lane % 4 * 2
// and the next; a: the same rows and pairs of columns; b: the pair of rows lane % 4 * 2, column lane / 4.
__device__ __forceinline__ void matrix_multiply_add(float *d, unsigned a0, unsigned a1, unsigned b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
}
