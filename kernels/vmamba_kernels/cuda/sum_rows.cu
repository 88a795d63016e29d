// Partial sums (rows, columns) added up to (columns), 32 columns a block of 32 warps, always in the same order.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(1024) sum_rows_kernel(const float *partial, float *out, i64 rows,
                                                                   i64 columns) {
    __shared__ float sums[32][33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i64 first = (i64)blockIdx.x * 32;
    float sum = 0.f;
    if (first + lane < columns) {
#pragma unroll 8
        for (i64 row = warp; row < rows; row += 32) sum += partial[row * columns + first + lane];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    sum = warp_sum(sums[lane][warp]);   // of the column that has this warp's number
    if (lane == 0 && first + warp < columns) out[first + warp] = sum;
}
