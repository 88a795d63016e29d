// A 3x3 convolution of each channel of channels-last images, padded with a border of zeros, alone or with SiLU behind.
// A thread walks along a strip, ROWS rows of an image, column by column: a column is read once and its part added to
// the three columns around it.
//   DIM                channels of a pixel
//   CHANNELS_A_READ    of them that a thread convolves
//   LANES              threads of a block side by side along the channels
//   STRIPS             strips of a block, LANES threads each
//   ROWS               rows of a strip
//   SILU               whether SiLU follows
//   PixelT             type of the images and of their gradients; weight, bias and sums are float32
#include "common.cuh"

constexpr int V = CHANNELS_A_READ;
constexpr int GROUPS = DIM / V;                          // threads that a pixel takes
constexpr int TILES = (GROUPS + LANES - 1) / LANES;      // blocks that a pixel takes
typedef Vec<PixelT, V> Pixel;

struct Strip {
    i64 image;          // its first pixel
    int row;            // the first of the strip's
    int begin, end;     // the columns that it computes
};

// Strips are numbered through: columns, then rows, then images. There are fewer of them than 2^32.
__device__ __forceinline__ Strip strip_of(unsigned number, int height, int width, int columns) {
    const unsigned across = (width + columns - 1) / columns, down = (height + ROWS - 1) / ROWS;
    const unsigned line = number / across;
    Strip strip;
    strip.image = (i64)(line / down) * height * width;
    strip.row = line % down * ROWS;
    strip.begin = number % across * columns;
    strip.end = min(strip.begin + columns, width);
    return strip;
}

// The strip's rows [-BORDER, ROWS + BORDER) at a column; what lies outside the image is zero.
template <int BORDER>
__device__ __forceinline__ void read_column(Pixel (&out)[ROWS + 2 * BORDER], const PixelT *image, const Strip &strip,
                                            int column, int height, int width) {
#pragma unroll
    for (int r = 0; r < ROWS + 2 * BORDER; ++r) {
        const int row = strip.row - BORDER + r;
        out[r] = Pixel();
        if (row >= 0 && row < height && column >= 0 && column < width)
            out[r] = *reinterpret_cast<const Pixel *>(image + (strip.image + (i64)row * width + column) * DIM);
    }
}

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + exp2_fast(-LOG2E * v)); }

__device__ __forceinline__ void read_weights(float (&w)[3][3][V], const float *weight) {
#pragma unroll
    for (int i = 0; i < 9; ++i)
#pragma unroll
        for (int c = 0; c < V; ++c) w[i / 3][i % 3][c] = weight[c * 9 + i];
}

// before: what SiLU is taken of, written for the backward pass unless it is null.
extern "C" __global__ void __launch_bounds__(LANES * STRIPS)
depthwise_conv_fwd_kernel(const PixelT *x, const float *weight, const float *bias, PixelT *out, PixelT *before,
                          i64 strips, i64 height_, i64 width_, i64 columns) {
    const int height = (int)height_, width = (int)width_;
    const int group = blockIdx.x % TILES * LANES + threadIdx.x % LANES;
    const i64 number = (i64)(blockIdx.x / TILES) * STRIPS + threadIdx.x / LANES;
    if (group >= GROUPS || number >= strips) return;
    const int channel = group * V;
    const Strip strip = strip_of((unsigned)number, height, width, (int)columns);
    float w[3][3][V], start[V], sums[ROWS][3][V];
    read_weights(w, weight + channel * 9);
#pragma unroll
    for (int c = 0; c < V; ++c) start[c] = bias ? bias[channel + c] : 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < V; ++c) sums[r][0][c] = sums[r][1][c] = sums[r][2][c] = start[c];

    Pixel pixels[ROWS + 2], next[ROWS + 2];
    read_column<1>(pixels, x + channel, strip, strip.begin - 1, height, width);
#pragma unroll 2
    for (int column = strip.begin - 1; column <= strip.end; ++column) {
        read_column<1>(next, x + channel, strip, column < strip.end ? column + 1 : -1, height, width);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < 3; ++i)
#pragma unroll
                for (int c = 0; c < V; ++c) {
                    const float value = pixels[r + i].get(c);
#pragma unroll
                    for (int j = 0; j < 3; ++j) sums[r][2 - j][c] = fmaf(w[i][j][c], value, sums[r][2 - j][c]);
                }
        const int done = column - 1;      // its three columns were seen
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (done >= strip.begin && strip.row + r < height) {
                const i64 at = (strip.image + (i64)(strip.row + r) * width + done) * DIM + channel;
                Pixel result;
                result.set(sums[r][0]);
                if constexpr (SILU) {
                    if (before) *reinterpret_cast<Pixel *>(before + at) = result;
                    float values[V];
#pragma unroll
                    for (int c = 0; c < V; ++c) values[c] = result.get(c) * sigmoid(result.get(c));
                    result.set(values);
                }
                *reinterpret_cast<Pixel *>(out + at) = result;
            }
#pragma unroll
            for (int c = 0; c < V; ++c) {
                sums[r][0][c] = sums[r][1][c];
                sums[r][1][c] = sums[r][2][c];
                sums[r][2][c] = start[c];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS + 2; ++r) pixels[r] = next[r];
    }
}

// The gradient of what the convolution gave.
__device__ __forceinline__ void gradient_of(float *g, const Pixel &dy, const Pixel &before) {
#pragma unroll
    for (int c = 0; c < V; ++c) {
        g[c] = dy.get(c);
        if constexpr (SILU) {
            const float value = before.get(c), s = sigmoid(value);
            g[c] *= s * fmaf(value, 1.f - s, 1.f);
        }
    }
}

// A fixed number of blocks share the strips, so that every run adds the parameters' gradients in the same order.
// partial (blocks / TILES, 10 * DIM): what a block's strips give to weight (DIM, 3, 3) and bias (DIM).
extern "C" __global__ void __launch_bounds__(LANES * STRIPS)
depthwise_conv_bwd_kernel(const PixelT *dy, const PixelT *x, const PixelT *before, const float *weight, PixelT *dx,
                          float *partial, i64 strips, i64 height_, i64 width_, i64 columns) {
    const int height = (int)height_, width = (int)width_;
    const int lane = threadIdx.x % LANES, of_block = threadIdx.x / LANES;
    const int group = blockIdx.x % TILES * LANES + lane;
    const bool there = group < GROUPS;
    const int channel = there ? group * V : 0, block = blockIdx.x / TILES;
    float w[3][3][V], d_weight[3][3][V], d_bias[V];
    read_weights(w, weight + channel * 9);
#pragma unroll
    for (int c = 0; c < V; ++c) {
        d_bias[c] = 0.f;
#pragma unroll
        for (int i = 0; i < 9; ++i) d_weight[i / 3][i % 3][c] = 0.f;
    }
    for (i64 number = (i64)block * STRIPS + of_block; there && number < strips;
         number += (i64)(gridDim.x / TILES) * STRIPS) {
        const Strip strip = strip_of((unsigned)number, height, width, (int)columns);
        float sums[ROWS][3][V];       // of dx at the last column, this one and the next
        Pixel window[3][ROWS];        // x there; zero in columns of other strips
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            window[0][r] = window[1][r] = Pixel();
#pragma unroll
            for (int c = 0; c < V; ++c) sums[r][0][c] = sums[r][1][c] = sums[r][2][c] = 0.f;
        }
        for (int column = strip.begin - 1; column <= strip.end; ++column) {
            Pixel d[ROWS + 2], b[ROWS + 2];
            read_column<1>(d, dy + channel, strip, column, height, width);
            if constexpr (SILU) read_column<1>(b, before + channel, strip, column, height, width);
            read_column<0>(window[2], x + channel, strip, column + 1 < strip.end ? column + 1 : -1, height, width);
#pragma unroll
            for (int q = 0; q < ROWS + 2; ++q) {      // rows of the gradient
                float g[V];
                gradient_of(g, d[q], b[q]);
                const bool own = q > 0 && q <= ROWS && column >= strip.begin && column < strip.end;
#pragma unroll
                for (int c = 0; c < V; ++c)
                    if (own) d_bias[c] += g[c];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {      // of x
                    const int i = r - q + 2;
                    if (i < 0 || i > 2) continue;
#pragma unroll
                    for (int j = 0; j < 3; ++j)
#pragma unroll
                        for (int c = 0; c < V; ++c) {
                            sums[r][j][c] = fmaf(w[i][j][c], g[c], sums[r][j][c]);
                            d_weight[i][j][c] = fmaf(window[j][r].get(c), g[c], d_weight[i][j][c]);
                        }
                }
            }
            const int done = column - 1;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (done >= strip.begin && strip.row + r < height) {
                    Pixel result;
                    result.set(sums[r][0]);
                    const i64 pixel = strip.image + (i64)(strip.row + r) * width + done;
                    *reinterpret_cast<Pixel *>(dx + pixel * DIM + channel) = result;
                }
#pragma unroll
                for (int c = 0; c < V; ++c) {
                    sums[r][0][c] = sums[r][1][c];
                    sums[r][1][c] = sums[r][2][c];
                    sums[r][2][c] = 0.f;
                }
                window[0][r] = window[1][r];
                window[1][r] = window[2][r];
            }
        }
    }
    __shared__ float of_strips[STRIPS][LANES * V];
    float *const out = partial + (i64)block * 10 * DIM;
#pragma unroll
    for (int which = 0; which < 10; ++which) {
#pragma unroll
        for (int c = 0; c < V; ++c)
            of_strips[of_block][lane * V + c] = which < 9 ? d_weight[which / 3][which % 3][c] : d_bias[c];
        __syncthreads();
        if (there && of_block == 0)
#pragma unroll
            for (int c = 0; c < V; ++c) {
                float total = 0.f;
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) total += of_strips[s][lane * V + c];
                out[which < 9 ? (channel + c) * 9 + which : 9 * DIM + channel + c] = total;
            }
        __syncthreads();
    }
}
