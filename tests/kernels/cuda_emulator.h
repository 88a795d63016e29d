// Enough of CUDA C++ for a CPU to run the kernels, block by block, a fiber a thread: slow, and only for their numbers.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index { long long x; };
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned v) { float r; memcpy(&r, &v, 4); return r; }
inline float __int_as_float(int v) { float r; memcpy(&r, &v, 4); return r; }
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline unsigned __float_as_uint(float v) { unsigned r; memcpy(&r, &v, 4); return r; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned char bytes[8], out[4];
    memcpy(bytes, &a, 4), memcpy(bytes + 4, &b, 4);
    for (int i = 0; i < 4; ++i) out[i] = bytes[selector >> (4 * i) & 7];
    unsigned r;
    memcpy(&r, out, 4);
    return r;
}

// Threads: each runs until it waits for others, then the next one.
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};
struct Barrier { int arrived = 0, generation = 0; };
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<unsigned> exchange;   // eight words a thread
static Barrier everyone;
static ucontext_t scheduler;
static long long (*kernel)(...);
static const long long *arguments;
static int argument_count;

static void yield() {
    const Index here = threadIdx;
    swapcontext(&fibers[here.x].context, &scheduler);
    threadIdx = here;
}
static void wait(Barrier &barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count)
        barrier.arrived = 0, ++barrier.generation;
    else
        while (barrier.generation == generation) yield();
}
static void __syncthreads() { wait(everyone, (int)blockDim.x); }
static void __syncwarp() { wait(warps[threadIdx.x / 32], 32); }

// All lanes give words; then every lane may read every lane's.
template <class Read> static void together(const unsigned *words, int count, Read read) {
    unsigned *mine = &exchange[threadIdx.x * 8];
    memcpy(mine, words, 4 * count);
    __syncwarp();
    const long long first = threadIdx.x / 32 * 32;
    read([&](int lane, int word) { return exchange[(first + lane) * 8 + word]; });
    __syncwarp();
}
static int __shfl_sync(unsigned, int v, int from) {
    const unsigned word = (unsigned)v;
    int result;
    together(&word, 1, [&](auto of) { result = (int)of(from & 31, 0); });
    return result;
}
static float __shfl_xor_sync(unsigned, float v, int bit) {
    const unsigned word = __float_as_uint(v);
    float result;
    together(&word, 1, [&](auto of) { result = __uint_as_float(of((int)threadIdx.x % 32 ^ bit, 0)); });
    return result;
}

// Instructions.
inline unsigned short to_bf16_bits(float v) {
    unsigned u = __float_as_uint(v);
    return (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float bf16_half(unsigned word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }
inline unsigned short to_fp16_bits(float v) { _Float16 h = (_Float16)v; unsigned short r; memcpy(&r, &h, 2); return r; }
inline float from_fp16_bits(unsigned short v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
inline float exp2_flushed(float v) { return v < -126.f ? 0.f : exp2f(v); }

static void multiply_bf16(float *d, unsigned a0, unsigned a1, unsigned b) {
    const unsigned words[3] = {a0, a1, b};
    const int lane = (int)threadIdx.x % 32;
    together(words, 3, [&](auto of) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k)
                d[i] += bf16_half(of(row * 4 + k / 2, i / 2), k % 2) * bf16_half(of(column * 4 + k / 2, 2), k % 2);
        }
    });
}
struct Inputs { float v[6]; };
static void multiply_tf32(float *d, Inputs inputs) {
    unsigned words[6];
    memcpy(words, inputs.v, sizeof words);
    const int lane = (int)threadIdx.x % 32;
    together(words, 6, [&](auto of) {
        auto value = [&](int from, int word) { return __uint_as_float(of(from, word) & 0xffffe000u); };
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k)
                d[i] += value(row * 4 + k % 4, i / 2 + k / 4 * 2) * value(column * 4 + k % 4, 4 + k / 4);
        }
    });
}
static unsigned transposed_lanes(unsigned two) {
    const int lane = (int)threadIdx.x % 32;
    unsigned result = 0;
    together(&two, 1, [&](auto of) {
        for (int i = 0; i < 2; ++i)
            result |= (of((lane % 4 * 2 + i) * 4 + lane / 8, 0) >> lane / 4 % 2 * 16 & 0xffffu) << 16 * i;
    });
    return result;
}
static unsigned transposed(const void *row_of_lane) {
    const uintptr_t address = (uintptr_t)row_of_lane;
    const unsigned words[2] = {(unsigned)address, (unsigned)(address >> 32)};
    const int lane = (int)threadIdx.x % 32;
    unsigned result = 0;
    together(words, 2, [&](auto of) {
        for (int i = 0; i < 2; ++i) {
            const int row = lane % 4 * 2 + i;
            const unsigned short *values = (const unsigned short *)(of(row, 0) | (uintptr_t)of(row, 1) << 32);
            result |= (unsigned)values[lane / 4] << 16 * i;
        }
    });
    return result;
}

template <int... I> static void call(std::integer_sequence<int, I...>) { ((void (*)(decltype((long long)I)...))kernel)(arguments[I]...); }
template <int COUNT> static void call_with() {
    if (argument_count == COUNT)
        call(std::make_integer_sequence<int, COUNT>());
    else if constexpr (COUNT < 40)
        call_with<COUNT + 1>();
}
static void enter(int thread) {
    threadIdx.x = thread;
    call_with<1>();
    fibers[thread].done = true;
}

alignas(16) static float dynamic_shared[256 * 1024 / 4];

extern "C" void emulate(void *function, int count, const long long *values, long long blocks, int threads) {
    kernel = (long long (*)(...))function, arguments = values, argument_count = count;
    blockDim.x = threads, gridDim.x = blocks;
    fibers.resize(threads), warps.assign((threads + 31) / 32, Barrier()), exchange.assign(threads * 8, 0);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (float &v : dynamic_shared) v = NAN;
        everyone = Barrier();
        for (int t = 0; t < threads; ++t) {
            Fiber &fiber = fibers[t];
            fiber.done = false, fiber.stack.resize(128 * 1024);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, (void (*)())enter, 1, t);
        }
        for (bool running = true; running;) {
            running = false;
            for (int t = 0; t < threads; ++t)
                if (!fibers[t].done) {
                    threadIdx.x = t, running = true;
                    swapcontext(&scheduler, &fibers[t].context);
                }
        }
    }
}
