// The 1-D operator keeps positions last, (batch, channels, length), and the scans channels last: what lies between.
// 16 lanes of a warp are neighbouring positions, its halves neighbouring channels, WIDE of them a thread: a warp's
// accesses are whole sectors on both sides, whatever the length. A block takes 64 positions of 8 WIDE channels.
#include "scan.cuh"

struct Place {
    i64 pixel, channel, first, last;   // first, last: of the thread's elements, where channels come first and last
    bool exists;

    __device__ __forceinline__ Place(i64 channels, i64 length) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const unsigned across = (unsigned)((length + 63) / 64);
        const unsigned down = (unsigned)((channels + 8 * WIDE - 1) / (8 * WIDE));
        const unsigned tile = (unsigned)blockIdx.x / across, image = tile / down;
        const i64 position = (i64)((unsigned)blockIdx.x - tile * across) * 64 + warp % 4 * 16 + lane % 16;
        channel = ((i64)(tile - image * down) * 8 + warp / 4 * 2 + lane / 16) * WIDE;
        first = (image * channels + channel) * length + position;
        last = (image * length + position) * channels + channel;
        exists = channel < channels && position < length;
    }
};

template <class T> __device__ __forceinline__ void put_channels_last(const T *in, T *out, i64 channels, i64 length) {
    const Place place(channels, length);
    if (!place.exists) return;
    float values[WIDE];
#pragma unroll
    for (int c = 0; c < WIDE; ++c) values[c] = to_float(in[place.first + c * length]);
    reinterpret_cast<Vec<T, WIDE> *>(out + place.last)->set(values);
}

// out = factor * in + skip[channel] * x; x like out.
template <class IN, class T, class OUT>
__device__ __forceinline__ void put_channels_first(const IN *in, float factor, const T *x, const float *skip, OUT *out,
                                                   i64 channels, i64 length) {
    const Place place(channels, length);
    if (!place.exists) return;
    const auto values = *reinterpret_cast<const Vec<IN, WIDE> *>(in + place.last);
#pragma unroll
    for (int c = 0; c < WIDE; ++c) {
        const i64 i = place.first + c * length;
        const float share = skip ? skip[place.channel + c] * to_float(x[i]) : 0.f;
        out[i] = from_float<OUT>(fmaf(factor, values.get(c), share));
    }
}

// u and delta; the output's gradient.
extern "C" __global__ void __launch_bounds__(512) inputs_kernel(const X *in, X *out, i64 channels, i64 length) {
    put_channels_last(in, out, channels, length);
}
extern "C" __global__ void __launch_bounds__(512) gradient_kernel(const G *in, G *out, i64 channels, i64 length) {
    put_channels_last(in, out, channels, length);
}

// The output from the routes'; the gradients of u and delta.
extern "C" __global__ void __launch_bounds__(512) output_kernel(const Y *y, const X *u, const float *skip, G *out,
                                                                i64 channels, i64 length) {
    put_channels_first(y, LN2, u, skip, out, channels, length);
}
extern "C" __global__ void __launch_bounds__(512) du_kernel(const Y *dx, const G *dy, const float *skip, X *du,
                                                            i64 channels, i64 length) {
    put_channels_first(dx, LN2, dy, skip, du, channels, length);
}
extern "C" __global__ void __launch_bounds__(512) d_delta_kernel(const P *steps, X *d_delta, i64 channels, i64 length) {
    put_channels_first(steps, 1.f, (const X *)nullptr, nullptr, d_delta, channels, length);
}

// Eight columns of a group's row at a position: what they are of B and C (batch, groups, N, length).
struct Columns {
    i64 row, sequence, position;   // row: its first element, in (batch, length, groups, ROW)
    int first;

    __device__ __forceinline__ Columns(i64 i, i64 groups, i64 length) {
        const i64 octet = i / length, pixel = octet / (ROW / 8) / groups * length + i % length;
        position = i % length;
        sequence = octet / (ROW / 8);
        first = (int)(octet % (ROW / 8)) * 8;
        row = (pixel * groups + sequence % groups) * ROW + first;
    }

    // The element of B or C that column `first + c` holds, or null.
    template <class T> __device__ __forceinline__ T *element(int c, T *B, T *C, i64 length) const {
        const int n = first + c - B0, of_C = n >= NP, state = n - (of_C ? NP : 0);
        if (n < 0 || state >= N) return nullptr;
        return (of_C ? C : B) + (sequence * N + state) * length + position;
    }
};

// B and C as rows, zeros between; count: batch * groups * ROW / 8 * length.
extern "C" __global__ void __launch_bounds__(256) rows_kernel(const X *B, const X *C, P *rows, i64 count, i64 groups,
                                                              i64 length) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Columns columns(i, groups, length);
    float values[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const X *from = columns.element(c, B, C, length);
        values[c] = from ? to_float(*from) : 0.f;
    }
    reinterpret_cast<Vec<P, 8> *>(rows + columns.row)->set(values);
}

// Their gradients from the rows'.
extern "C" __global__ void __launch_bounds__(256) d_rows_kernel(const P *rows, X *dB, X *dC, i64 count, i64 groups,
                                                                i64 length) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Columns columns(i, groups, length);
    const auto values = *reinterpret_cast<const Vec<P, 8> *>(rows + columns.row);
#pragma unroll
    for (int c = 0; c < 8; ++c)
        if (X *to = columns.element(c, dB, dC, length)) *to = from_float<X>(values.get(c));
}
