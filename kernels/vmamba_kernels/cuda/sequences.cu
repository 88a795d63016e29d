// The 1-D operator keeps positions last, (batch, channels, length), and the scans channels last: what lies between.
// A thread has four positions of CHANNELS_A_THREAD, 16 lanes of a warp other positions, its halves other channels: a
// warp's accesses are whole sectors on both sides. A block takes 64 positions of 16 CHANNELS_A_THREAD.
#include "scan.cuh"

struct Place {
    i64 image, channel, first, last;   // first, last: of the thread's elements, where channels come first and last
    int position, count, step;         // of the thread's positions the first, how many, and between them

    __device__ __forceinline__ Place(i64 channels, i64 length) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const unsigned across = (unsigned)((length + 63) / 64);
        const unsigned down = (unsigned)((channels + 16 * CHANNELS_A_THREAD - 1) / (16 * CHANNELS_A_THREAD));
        const unsigned tile = (unsigned)blockIdx.x / across;
        const bool together = length % 4 == 0;   // then four neighbours are read and written at once
        image = tile / down;
        position = (int)((unsigned)blockIdx.x - tile * across) * 64 + lane % 16 * (together ? 4 : 1);
        step = together ? 1 : 16;
        channel = ((i64)(tile - image * down) * 16 + warp * 2 + lane / 16) * CHANNELS_A_THREAD;
        count = channel < channels ? max(0, min(4, ((int)length - position + step - 1) / step)) : 0;
        first = (image * channels + channel) * length + position;
        last = (image * length + position) * channels + channel;
    }
};

// The four positions of one channel, where channels come first.
template <class T> __device__ __forceinline__ void read_four(const T *from, const Place &place, float *values) {
    if (place.step == 1) {
        const auto four = *reinterpret_cast<const Vec<T, 4> *>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = four.get(i);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = i < place.count ? to_float(from[i * 16]) : 0.f;
    }
}
template <class T> __device__ __forceinline__ void write_four(T *to, const Place &place, const float *values) {
    if (place.step == 1) {
        Vec<T, 4> four;
        four.set(values);
        *reinterpret_cast<Vec<T, 4> *>(to) = four;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < place.count) to[i * 16] = from_float<T>(values[i]);
    }
}

// Through shared memory, so that all channels of a position are written together: sectors from several warps are slow.
template <class T> __device__ __forceinline__ void put_channels_last(const T *in, T *out, i64 channels, i64 length) {
    using Channels = Vec<T, CHANNELS_A_THREAD>;
    __shared__ Channels tile[64][16];   // positions, groups of channels: those turned by the position, for the banks
    auto turned = [](int position, int group) { return group ^ ((position ^ position >> 2) & 15); };
    const Place place(channels, length);
    const int first_position = place.position & ~63, own_group = (int)threadIdx.x / 16;
    if (place.count) {
        float values[CHANNELS_A_THREAD][4];
#pragma unroll
        for (int c = 0; c < CHANNELS_A_THREAD; ++c) read_four(in + place.first + c * length, place, values[c]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float of_position[CHANNELS_A_THREAD];
#pragma unroll
            for (int c = 0; c < CHANNELS_A_THREAD; ++c) of_position[c] = values[c][i];
            const int position = (place.position & 63) + i * place.step;
            tile[position][turned(position, own_group)].set(of_position);
        }
    }
    __syncthreads();
    const int group = (int)threadIdx.x % 16;
    const i64 channel = place.channel + (group - own_group) * CHANNELS_A_THREAD;
    if (channel >= channels) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int position = (int)threadIdx.x / 16 + i * 16;
        if (first_position + position < length)
            *reinterpret_cast<Channels *>(out + (place.image * length + first_position + position) * channels +
                                          channel) = tile[position][turned(position, group)];
    }
}

// out = factor * in + skip[channel] * x, where in and x have their channels last.
template <class IN, class T, class OUT>
__device__ __forceinline__ void put_channels_first(const IN *in, float factor, const T *x, const float *skip, OUT *out,
                                                   i64 channels, i64 length) {
    const Place place(channels, length);
    if (!place.count) return;
    float values[CHANNELS_A_THREAD][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const i64 from = place.last + min(i, place.count - 1) * place.step * channels;
        const auto v = *reinterpret_cast<const Vec<IN, CHANNELS_A_THREAD> *>(in + from);
#pragma unroll
        for (int c = 0; c < CHANNELS_A_THREAD; ++c) values[c][i] = factor * v.get(c);
        if (skip) {
            const auto w = *reinterpret_cast<const Vec<T, CHANNELS_A_THREAD> *>(x + from);
#pragma unroll
            for (int c = 0; c < CHANNELS_A_THREAD; ++c)
                values[c][i] = fmaf(skip[place.channel + c], w.get(c), values[c][i]);
        }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS_A_THREAD; ++c) write_four(out + place.first + c * length, place, values[c]);
}

// u and delta; the output's gradient.
extern "C" __global__ void __launch_bounds__(256) inputs_kernel(const PixelT *in, PixelT *out, i64 channels,
                                                                i64 length) {
    put_channels_last(in, out, channels, length);
}
extern "C" __global__ void __launch_bounds__(256) gradient_kernel(const OutT *in, OutT *out, i64 channels, i64 length) {
    put_channels_last(in, out, channels, length);
}

// The output from the routes'; the gradients of u and delta.
extern "C" __global__ void __launch_bounds__(256) output_kernel(const RouteT *y, const PixelT *u, const float *skip,
                                                                OutT *out, i64 channels, i64 length) {
    put_channels_first(y, LN2, u, skip, out, channels, length);
}
extern "C" __global__ void __launch_bounds__(256) du_kernel(const RouteT *dx, const OutT *dy, const float *skip,
                                                            PixelT *du, i64 channels, i64 length) {
    put_channels_first(dx, LN2, dy, skip, du, channels, length);
}
extern "C" __global__ void __launch_bounds__(256) d_delta_kernel(const RowT *steps, PixelT *d_delta, i64 channels,
                                                                 i64 length) {
    put_channels_first(steps, 1.f, (const PixelT *)nullptr, nullptr, d_delta, channels, length);
}

// Eight columns of a group's row at a position: what they are of B and C (batch, groups, N, length).
struct Columns {
    i64 row, sequence, position;   // row: its first element, in (batch, length, groups, ROW_WIDTH)
    int first;

    __device__ __forceinline__ Columns(i64 i, i64 groups, i64 length) {
        const i64 of_row = i / (ROW_WIDTH / 8);
        sequence = of_row / length;
        position = of_row - sequence * length;
        first = (int)(i - of_row * (ROW_WIDTH / 8)) * 8;
        row = ((sequence / groups * length + position) * groups + sequence % groups) * ROW_WIDTH + first;
    }

    // The element of B or C that column `first + c` holds, or null.
    template <class T> __device__ __forceinline__ T *element(int c, T *B, T *C, i64 length) const {
        const int n = first + c - B_COLUMN, of_C = n >= PADDED_STATES, state = n - (of_C ? PADDED_STATES : 0);
        if (n < 0 || state >= STATES) return nullptr;
        return (of_C ? C : B) + (sequence * STATES + state) * length + position;
    }
};

// B and C as rows, zeros between; count: batch * groups * ROW_WIDTH / 8 * length.
extern "C" __global__ void __launch_bounds__(256) rows_kernel(const PixelT *B, const PixelT *C, RowT *rows, i64 count,
                                                              i64 groups, i64 length) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Columns columns(i, groups, length);
    float values[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const PixelT *from = columns.element(c, B, C, length);
        values[c] = from ? to_float(*from) : 0.f;
    }
    reinterpret_cast<Vec<RowT, 8> *>(rows + columns.row)->set(values);
}

// Their gradients from the rows'.
extern "C" __global__ void __launch_bounds__(256) d_rows_kernel(const RowT *rows, PixelT *dB, PixelT *dC, i64 count,
                                                                i64 groups, i64 length) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const Columns columns(i, groups, length);
    const auto values = *reinterpret_cast<const Vec<RowT, 8> *>(rows + columns.row);
#pragma unroll
    for (int c = 0; c < 8; ++c)
        if (PixelT *to = columns.element(c, dB, dC, length)) *to = from_float<PixelT>(values.get(c));
}
