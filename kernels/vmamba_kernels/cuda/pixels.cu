// Kernels over pixels: the sum of the routes, and the gradient rows of B and C.
#include "common.cuh"

__device__ __forceinline__ i64 divide(i64 a, int b) {   // 64-bit division only where it is needed
    return a >> 32 ? a / b : (i64)((unsigned)a / (unsigned)b);
}

// out = ln 2 (scaled) or 1 times the sum over routes, + skip[channel] * x + extra; WIDE channels a thread.
// The one kernel serves the forward pass (skip = D, x) and the pixels' gradient (skip = D, the output's gradient; extra: the
// projections' share).
template <class T, class OUT>
__device__ __forceinline__ void merge(const Y *y, const T *x, const float *skip, const P *extra, OUT *out, i64 count,
                                      int dim, int routes, float scale) {
    const int per_pixel = dim / WIDE;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 pixel = divide(i, per_pixel);
        const int ch = (int)(i - pixel * per_pixel) * WIDE;
        float sum[WIDE];
#pragma unroll
        for (int c = 0; c < WIDE; ++c) sum[c] = 0.f;
#pragma unroll 4
        for (int route = 0; route < routes; ++route) {
            const auto v = *reinterpret_cast<const Vec<Y, WIDE> *>(y + (pixel * routes + route) * dim + ch);
#pragma unroll
            for (int c = 0; c < WIDE; ++c) sum[c] += v.get(c);
        }
#pragma unroll
        for (int c = 0; c < WIDE; ++c) sum[c] *= scale;
        if (skip) {
            const auto v = *reinterpret_cast<const Vec<T, WIDE> *>(x + pixel * dim + ch);
#pragma unroll
            for (int c = 0; c < WIDE; ++c) sum[c] = fmaf(skip[ch + c], v.get(c), sum[c]);
        }
        if (extra) {
            const auto v = *reinterpret_cast<const Vec<P, WIDE> *>(extra + pixel * dim + ch);
#pragma unroll
            for (int c = 0; c < WIDE; ++c) sum[c] += v.get(c);
        }
        Vec<OUT, WIDE> result;
        result.set(sum);
        *reinterpret_cast<Vec<OUT, WIDE> *>(out + pixel * dim + ch) = result;
    }
}

extern "C" __global__ void merge_fwd_kernel(const Y *y, const X *x, const float *skip, G *out, i64 count, i64 dim,
                                            i64 routes) {
    merge(y, x, skip, (const P *)nullptr, out, count, (int)dim, (int)routes, LN2);
}

extern "C" __global__ void merge_bwd_kernel(const Y *dx, const G *dy, const float *skip, const P *extra, X *out, i64 count,
                                            i64 dim, i64 routes) {
    merge(dx, dy, skip, extra, out, count, (int)dim, (int)routes, 1.f);
}

// The rows' gradient summed over channel tiles. count: groups of four columns of all rows.
extern "C" __global__ void sum_tiles_kernel(const float4 *tile_rows, P *rows, i64 count, i64 tiles) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (i64 tile = 0; tile < tiles; ++tile) {
            const float4 v = tile_rows[tile * count + i];
            sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
        Vec<P, 4> result;
        result.set(sum);
        reinterpret_cast<Vec<P, 4> *>(rows)[i] = result;
    }
}
