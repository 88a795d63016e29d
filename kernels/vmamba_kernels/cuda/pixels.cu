// What happens before and after the scans: weights packed into padded rows, routes added, partial sums added.
#include "scan.cuh"

__device__ __forceinline__ i64 divide(i64 a, int b) {   // 64-bit division only where it is needed
    return a >> 32 ? a / b : (i64)((unsigned)a / (unsigned)b);
}

// out = ln 2 times the sum over routes + skip[channel] * x + extra; WIDE channels a thread. It serves the forward pass
// (skip: the sum of D) and the pixels' gradient (x: the output's gradient; extra: the projections' share).
template <class T, class OUT>
__device__ __forceinline__ void merge(const Y *y, const T *x, const float *skip, const P *extra, OUT *out, i64 count,
                                      int dim, int routes) {
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
        for (int c = 0; c < WIDE; ++c) sum[c] *= LN2;
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
    merge(y, x, skip, (const P *)nullptr, out, count, (int)dim, (int)routes);
}

extern "C" __global__ void merge_bwd_kernel(const Y *dx, const G *dy, const float *skip, const P *extra, X *out,
                                            i64 count, i64 dim, i64 routes) {
    merge(dx, dy, skip, extra, out, count, (int)dim, (int)routes);
}

// The rows' gradient summed over channel tiles. count: groups of four columns of all rows.
extern "C" __global__ void sum_tiles_kernel(const P *tile_rows, P *rows, i64 count, i64 tiles) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (i64 tile = 0; tile < tiles; ++tile) {
            const auto v = reinterpret_cast<const Vec<P, 4> *>(tile_rows)[tile * count + i];
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[k] += v.get(k);
        }
        Vec<P, 4> result;
        result.set(sum);
        reinterpret_cast<Vec<P, 4> *>(rows)[i] = result;
    }
}

// weight (routes, R + 2 N, dim) to packed (routes, ROW, dim), zeros between the sections; skip: the sum of D over the
// routes. count: routes * ROW * dim.
extern "C" __global__ void pack_kernel(const X *weight, X *packed, const float *D, float *skip, i64 count, i64 dim,
                                       i64 routes) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const i64 row = i / dim, ch = i - row * dim, route = row / ROW;
    const int column = (int)(row - route * ROW);
    int from = -1;
    if (column < R) from = column;
    if (column >= B0 && column < B0 + N) from = R + column - B0;
    if (column >= B0 + NP && column < B0 + NP + N) from = R + N + column - B0 - NP;
    packed[i] = from < 0 ? from_float<X>(0.f) : weight[(route * (R + 2 * N) + from) * dim + ch];
    if (skip && i < dim) {
        float sum = 0.f;
        for (i64 k = 0; k < routes; ++k) sum += D[k * dim + i];
        skip[i] = sum;
    }
}

// Every eighth of a route's partial sums (images, routes, segments, size), from one of its first.
template <class T>
__device__ __forceinline__ float sum_slice(const T *from, i64 size, int first, i64 images, i64 route, i64 routes,
                                           i64 segments) {
    float sum = 0.f;
#pragma unroll 8
    for (unsigned i = first; i < (unsigned)(images * segments); i += 8) {
        const unsigned image = i / (unsigned)segments, segment = i - image * (unsigned)segments;
        sum += to_float(from[((image * routes + route) * segments + segment) * size]);
    }
    return sum;
}

// The backward kernel's partial sums over (images, segments), into the parameters' gradients, 32 outputs a block of
// (32, 8): dA (images, routes, segments, N, dim) -> (routes, dim, N); dt_bias and D (images, routes, segments, dim) ->
// (routes, dim): with a projection D is the same for every route; dt_weight (images, routes, segments, dim, R) ->
// (routes, dim, R), if there.
extern "C" __global__ void __launch_bounds__(256) sum_parameters_kernel(
    const float *dA, const float *d_bias, const float *dD, const P *d_weight, float *dA_out, float *d_bias_out,
    float *dD_out, X *d_weight_out, i64 images, i64 routes, i64 segments, i64 dim) {
    __shared__ float sums[8][32];
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const i64 per_route = dim * (N + 2 + (d_weight ? R : 0));
    const i64 output = (i64)blockIdx.x * 32 + lane, route = divide(output, (int)per_route);
    const i64 within = output - route * per_route;
    const bool exists = route < routes;
    const i64 kind = divide(within, (int)dim);   // 0 .. N - 1: dA of a state; N: dt_bias; N + 1: D; then dt_weight
    float sum = 0.f;
    const i64 offset = within - (kind < N ? 0 : kind < N + 2 ? kind : N + 2) * dim;
    if (exists && kind < N) sum = sum_slice(dA + offset, N * dim, slice, images, route, routes, segments);
    if (exists && kind == N) sum = sum_slice(d_bias + offset, dim, slice, images, route, routes, segments);
    if (exists && kind == N + 1) sum = sum_slice(dD + offset, dim, slice, images, R ? 0 : route, routes, segments);
    if (exists && kind >= N + 2) sum = sum_slice(d_weight + offset, dim * R, slice, images, route, routes, segments);
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice || !exists) return;
    for (int i = 1; i < 8; ++i) sum += sums[i][lane];
    if (kind < N) dA_out[(route * dim + within - kind * dim) * N + kind] = sum;
    if (kind == N) d_bias_out[route * dim + offset] = sum;
    if (kind == N + 1) dD_out[route * dim + offset] = sum;
    if (kind >= N + 2) d_weight_out[route * dim * R + offset] = from_float<X>(sum);
}
