// What happens before and after the scans: weights packed into padded rows, routes added, partial sums added.
#include "scan.cuh"

__device__ __forceinline__ i64 divide(i64 a, int b) {   // 64-bit division only where it is needed
    return a >> 32 ? a / b : (i64)((unsigned)a / (unsigned)b);
}

// out = ln 2 times the sum over routes + skip[channel] * x + extra, CHANNELS_A_THREAD at a time. It serves the forward
// pass (skip: the sum of D) and the pixels' gradient (x: the output's gradient; extra: the projections' share).
template <class T, class OUT>
__device__ __forceinline__ void merge(const RouteT *y, const T *x, const float *skip, const RowT *extra, OUT *out,
                                      i64 count, int dim, int routes) {
    using Outputs = Vec<OUT, CHANNELS_A_THREAD>;
    const int per_pixel = dim / CHANNELS_A_THREAD;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const i64 pixel = divide(i, per_pixel);
        const int ch = (int)(i - pixel * per_pixel) * CHANNELS_A_THREAD;
        float sum[CHANNELS_A_THREAD];
#pragma unroll
        for (int c = 0; c < CHANNELS_A_THREAD; ++c) sum[c] = 0.f;
#pragma unroll 4
        for (int route = 0; route < routes; ++route) {
            const RouteT *from = y + (pixel * routes + route) * dim + ch;
            const auto v = *reinterpret_cast<const Vec<RouteT, CHANNELS_A_THREAD> *>(from);
#pragma unroll
            for (int c = 0; c < CHANNELS_A_THREAD; ++c) sum[c] += v.get(c);
        }
#pragma unroll
        for (int c = 0; c < CHANNELS_A_THREAD; ++c) sum[c] *= LN2;
        if (skip) {
            const auto v = *reinterpret_cast<const Vec<T, CHANNELS_A_THREAD> *>(x + pixel * dim + ch);
#pragma unroll
            for (int c = 0; c < CHANNELS_A_THREAD; ++c) sum[c] = fmaf(skip[ch + c], v.get(c), sum[c]);
        }
        if (extra) {
            const auto v = *reinterpret_cast<const Vec<RowT, CHANNELS_A_THREAD> *>(extra + pixel * dim + ch);
#pragma unroll
            for (int c = 0; c < CHANNELS_A_THREAD; ++c) sum[c] += v.get(c);
        }
        Outputs result;
        result.set(sum);
        *reinterpret_cast<Outputs *>(out + pixel * dim + ch) = result;
    }
}

extern "C" __global__ void merge_fwd_kernel(const RouteT *y, const PixelT *x, const float *skip, OutT *out, i64 count,
                                            i64 dim, i64 routes) {
    merge(y, x, skip, (const RowT *)nullptr, out, count, (int)dim, (int)routes);
}

extern "C" __global__ void merge_bwd_kernel(const RouteT *dx, const OutT *dy, const float *skip, const RowT *extra,
                                            PixelT *out, i64 count, i64 dim, i64 routes) {
    merge(dx, dy, skip, extra, out, count, (int)dim, (int)routes);
}

// The rows' gradient summed over channel tiles. count: groups of four columns of all rows.
extern "C" __global__ void sum_tiles_kernel(const RowT *tile_rows, RowT *rows, i64 count, i64 tiles) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        for (i64 tile = 0; tile < tiles; ++tile) {
            const auto v = reinterpret_cast<const Vec<RowT, 4> *>(tile_rows)[tile * count + i];
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[k] += v.get(k);
        }
        Vec<RowT, 4> result;
        result.set(sum);
        reinterpret_cast<Vec<RowT, 4> *>(rows)[i] = result;
    }
}

// weight (routes, RANK + 2 STATES, dim) to packed (routes, ROW_WIDTH, dim), zeros between the sections; skip: the sum
// of D over the routes. count: routes * ROW_WIDTH * dim.
extern "C" __global__ void pack_kernel(const PixelT *weight, PixelT *packed, const float *D, float *skip, i64 count,
                                       i64 dim, i64 routes) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const i64 row = i / dim, ch = i - row * dim, route = row / ROW_WIDTH;
    const int column = (int)(row - route * ROW_WIDTH);
    int from = -1;
    if (column < RANK) from = column;
    if (column >= B_COLUMN && column < B_COLUMN + STATES) from = RANK + column - B_COLUMN;
    if (column >= C_COLUMN && column < C_COLUMN + STATES) from = RANK + STATES + column - C_COLUMN;
    packed[i] = from < 0 ? from_float<PixelT>(0.f) : weight[(route * (RANK + 2 * STATES) + from) * dim + ch];
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
// (32, 8), of images, routes and segments: dA (..., STATES, dim) -> (routes, dim, STATES); dt_bias and D (..., dim) ->
// (routes, dim): with a projection D is the same for every route; dt_weight (..., dim, RANK) -> (routes, dim, RANK), if
// there.
extern "C" __global__ void __launch_bounds__(256) sum_parameters_kernel(
    const float *dA, const float *d_bias, const float *dD, const RowT *d_weight, float *dA_out, float *d_bias_out,
    float *dD_out, PixelT *d_weight_out, i64 images, i64 routes, i64 segments, i64 dim) {
    __shared__ float sums[8][32];
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const i64 per_route = dim * (STATES + 2 + (d_weight ? RANK : 0));
    const i64 output = (i64)blockIdx.x * 32 + lane, route = divide(output, (int)per_route);
    const i64 within = output - route * per_route;
    const bool exists = route < routes;
    const i64 kind = divide(within, (int)dim);   // 0 .. STATES - 1: dA of one; STATES: dt_bias; + 1: D; then dt_weight
    float sum = 0.f;
    const i64 offset = within - (kind < STATES ? 0 : kind < STATES + 2 ? kind : STATES + 2) * dim;
    if (exists && kind < STATES) sum = sum_slice(dA + offset, STATES * dim, slice, images, route, routes, segments);
    if (exists && kind == STATES) sum = sum_slice(d_bias + offset, dim, slice, images, route, routes, segments);
    if (exists && kind == STATES + 1)
        sum = sum_slice(dD + offset, dim, slice, images, RANK ? 0 : route, routes, segments);
    if (exists && kind >= STATES + 2)
        sum = sum_slice(d_weight + offset, dim * RANK, slice, images, route, routes, segments);
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice || !exists) return;
    for (int i = 1; i < 8; ++i) sum += sums[i][lane];
    if (kind < STATES) dA_out[(route * dim + within - kind * dim) * STATES + kind] = sum;
    if (kind == STATES) d_bias_out[route * dim + offset] = sum;
    if (kind == STATES + 1) dD_out[route * dim + offset] = sum;
    if (kind >= STATES + 2) d_weight_out[route * dim * RANK + offset] = from_float<PixelT>(sum);
}
