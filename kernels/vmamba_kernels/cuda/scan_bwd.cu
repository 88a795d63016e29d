// The gradient of a walk for a block's channels, chunk by chunk from the end, as docs/kernels-design.md draws it: each
// chunk's states are made again from its border, first in passing (A), then part by part from the end (B), where the
// gradient goes back over them (C). The words are explained in layout.py.
#include "scan_bwd.cuh"
#include "scan_bwd_pipeline.cuh"
#include "scan_bwd_states.cuh"
#include "scan_bwd_projection.cuh"
#include "scan_bwd_sums.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS_A_BLOCK, MIN_BLOCKS) scan_bwd_kernel(
    const PixelT *__restrict__ x, const PixelT *__restrict__ steps, const RowT *__restrict__ rows,
    const PixelT *__restrict__ dt_weight, const float *__restrict__ dt_bias, const float *__restrict__ A,
    const OutT *__restrict__ dy, const BorderT *__restrict__ borders, const float *__restrict__ exits,
    RouteT *__restrict__ dx, RowT *__restrict__ ddt, RowT *__restrict__ d_rows, RowT *__restrict__ d_dt_weight,
    float *__restrict__ dA, float *__restrict__ dbias, float *__restrict__ dD, i64 pixels, i64 height, i64 width,
    i64 dim, i64 routes, i64 route_kinds, i64 x_pixel, i64 x_route, i64 division, i64 segment_length, i64 segments) {
    extern __shared__ __align__(16) float shared[];

    // What this warp works on.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel_lane = lane % CHANNEL_LANES, state_lane = lane / CHANNEL_LANES;
    float *own = shared + BLOCK_SHARED + warp * WARP_SHARED;
    const int tiles = (int)((dim + WARPS_A_BLOCK * CHANNELS_A_WARP - 1) / (WARPS_A_BLOCK * CHANNELS_A_WARP));
    const int tile = blockIdx.x % tiles;
    const i64 number = blockIdx.x / tiles;   // of the walk: (image, route, segment)
    const int segment = (int)(number % segments);
    const i64 sequence = number / segments, image = sequence / routes;
    const int route = (int)(sequence % routes), kind = (int)(route_kinds >> (2 * route)) & 3;
    const int first = (tile * WARPS_A_BLOCK + warp) * CHANNELS_A_WARP;
    const int length = (int)(height * width), start = (int)(segment * segment_length);
    const int end = min(start + (int)segment_length, length);
    const int x_stride = (int)(x_pixel * sizeof(PixelT)), dy_stride = (int)(x_pixel * sizeof(OutT));
    const int row_stride = (int)(routes * ROW_WIDTH * sizeof(RowT));
    const int dx_stride = (int)(routes * dim * sizeof(RouteT)), ddt_stride = (int)(routes * dim * sizeof(RowT));
    x += image * length * x_pixel + route * x_route + first;
    if constexpr (RANK == 0) steps += image * length * x_pixel + route * x_route + first;
    dy += image * length * x_pixel + route * x_route + first;
    rows += (image * length * routes + route) * ROW_WIDTH;
    borders += (sequence * ((length + CHUNK - 1) / CHUNK - 1) * STATES + state_lane * STATES_A_LANE) * dim + first +
        channel_lane * CHANNELS_A_LANE;
    const int within = ChannelGradients::channel(channel_lane, state_lane), existing = (int)dim - first;
    dx += (image * length * routes + route) * dim + first + (ChannelGradients::PAIRED ? lane % 4 * 2 : within);
    ddt += (image * length * routes + route) * dim + first + within;
    d_rows += ((tile * pixels + image * length) * routes + route) * ROW_WIDTH;

    const Walk walk{lane, channel_lane, state_lane, own, kind, first, existing, length, start, end};
    Pipeline pipeline{walk,     shared,    x,          steps,  dy,    rows,    d_rows,
                      x_stride, dy_stride, row_stride, height, width, division};
    const ProjectionGradient d_projection{pipeline};
    ChannelGradients channels{pipeline, d_projection, within,    ChannelGradients::finishes(state_lane),
                              dx,       ddt,          dx_stride, ddt_stride};
    Projection projection;
    projection.init(dt_weight, dt_bias, route * dim + first, route * dim + dim - 1, lane);
    States states;
    float carry[CHANNELS_A_LANE][STATES_A_LANE], da[CHANNELS_A_LANE][STATES_A_LANE];
#pragma unroll
    for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
        for (int n = 0; n < STATES_A_LANE; ++n) {
            const int ch = first + channel_lane * CHANNELS_A_LANE + c, state = state_lane * STATES_A_LANE + n;
            const bool real = ch < dim && state < STATES;
            states.a_log[c][n] = real ? A[(route * dim + ch) * STATES + state] : 0.f;
            carry[c][n] = real && segment < segments - 1 ? exits[(number * STATES + state) * dim + ch] : 0.f;
            da[c][n] = 0.f;
        }
    for (int i = lane; i < STAGE * ROW_WIDTH; i += 32)
        walk.cells()[i] = from_float<RowT>(0.f);   // some columns are never written
    if constexpr (FUSED_PROJECTION) d_projection.clear();
    const Sums::Constants constants(lane, dim);

    // Of every chunk all stages but the last are there when it begins, where it has several; of the first, those of the
    // next chunk too whose slots it leaves free.
    const int last_chunk = start + (end - 1 - start) / CHUNK * CHUNK;
    const int first_stages = (end - last_chunk + STAGE - 1) / STAGE;
    for (int stage = 0; stage < max(first_stages - 1, 1); ++stage) {
        if constexpr (SUB_CHUNKS == 1) states.read_border(walk, borders, dim, last_chunk / CHUNK);
        pipeline.fetch(stage, last_chunk + stage * STAGE);
    }
    if (STAGES > 1 && last_chunk > start)
        for (int stage = 0; stage < STAGES - first_stages; ++stage)
            pipeline.fetch_next(stage, last_chunk - CHUNK + stage * STAGE);

    for (int chunk = last_chunk; chunk >= start; chunk -= CHUNK, pipeline.turn ^= 1) {
        const int limit = min(chunk + CHUNK, end);
        const int sub_chunks = SUB_CHUNKS == 1 ? 1 : (limit - chunk + SUB_CHUNK - 1) / SUB_CHUNK;
        const int stages = STAGES == 1 ? 1 : (sub_chunks + STAGE_SUB_CHUNKS - 1) / STAGE_SUB_CHUNKS;
        copy_wait<0>();
        __syncthreads();   // the rows are there, and the cells of the chunk after this one
        if constexpr (SUB_CHUNKS == 1)
            states.start_from_border();
        else
            states.read_border(walk, borders, dim, chunk / CHUNK);
        if (STAGES > 1 && stages > 1) pipeline.fetch(stages - 1, chunk + (stages - 1) * STAGE);
        if (STAGES == 1 && chunk > start) {
            if constexpr (SUB_CHUNKS == 1) states.read_border(walk, borders, dim, (chunk - CHUNK) / CHUNK);
            pipeline.fetch_next(0, chunk - CHUNK);
        }
        if (chunk < last_chunk) pipeline.write_rows(chunk + CHUNK);

        for (int stage = 0; stage < stages; ++stage) {
            pipeline.enter(stage);
            pipeline.prepare(projection, limit - chunk - stage * STAGE);
            if (STAGES > 1 && stage == stages - 2) copy_wait<0>();
            if (stage >= stages - 2) __syncthreads();   // the last rows; then B and C are there, and the cells are free
        }

        if constexpr (SUB_CHUNKS > 1) {   // A: forwards, keeping the state at the start of every part
            constexpr int PARTS = STAGE_SUB_CHUNKS * SUB_CHUNK_PARTS;
            const int last_part = sub_chunks * SUB_CHUNK_PARTS - 1;
            states.start_from_border();
            states.keep(walk, 0);
            for (int stage = 0; stage < stages; ++stage) {
                pipeline.enter(stage);
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    if (stage * PARTS + part < last_part) {
                        float decay[CHANNELS_A_LANE][STATES_A_LANE];
#pragma unroll
                        for (int j = 0; j < PART; ++j) states.advance(pipeline, part * PART + j, decay);
                        states.keep(walk, stage * PARTS + part + 1);
                    }
            }
        }

        for (int stage = stages - 1; stage >= 0; --stage) {
            const int l0 = chunk + stage * STAGE, here = min(STAGE_SUB_CHUNKS, sub_chunks - stage * STAGE_SUB_CHUNKS);
            pipeline.enter(stage);
            pipeline.set_pixel(l0);
            if constexpr (FUSED_PROJECTION && STAGE_SUB_CHUNKS > 1)
                if (here == 1) d_projection.clear_second_sub_chunk();

            for (int sub_chunk = here - 1; sub_chunk >= 0; --sub_chunk) {
                const int j0 = sub_chunk * SUB_CHUNK;
                channels.first = j0, channels.inside = limit - l0;
                Sums sums;
                float before[PART][CHANNELS_A_LANE][STATES_A_LANE], decays[PART][CHANNELS_A_LANE][STATES_A_LANE];
#pragma unroll
                for (int j = SUB_CHUNK - 1; j >= 0; --j) {
                    const int p = j % PART;
                    if (p == PART - 1) {   // B: forwards again over the part that j ends, its states in registers
                        if constexpr (SUB_CHUNKS > 1)
                            states.restore(walk, (stage * STAGE_SUB_CHUNKS + sub_chunk) * SUB_CHUNK_PARTS + j / PART);
#pragma unroll
                        for (int i = 0; i < PART; ++i) {
                            states.copy(before[i]);
                            states.advance(pipeline, j0 + j - p + i, decays[i]);
                        }
                        if constexpr (!MATRIX_SUMS) __syncwarp();   // so that no decays are kept, which would spill
                    }
                    // C: backwards over j
                    const auto &after = p + 1 < PART ? before[p + 1 < PART ? p + 1 : 0] : states.h;
                    AtStep at;
                    at.go_back(pipeline, j0 + j, states.a_log, before[p], after, decays[p], carry, da);
                    sums.add(constants, channels, j, at);
                }
                sums.finish(channels);
            }

            if constexpr (FUSED_PROJECTION) {
                __syncwarp();
                d_projection.write_cells(projection);
                d_projection.add_weight();
            }
            if (STAGES > 1 && stage > 0) {
                __syncthreads();   // the cells are there, and nobody reads the rows any more
                if (chunk > start)
                    pipeline.fetch_next(STAGES - 1 - stage, chunk - CHUNK + (STAGES - 1 - stage) * STAGE);
                pipeline.write_rows(l0);
                __syncthreads();   // the cells are free
            }
        }
    }

    __syncthreads();
    pipeline.write_rows(start);
#pragma unroll
    for (int c = 0; c < CHANNELS_A_LANE; ++c)
#pragma unroll
        for (int n = 0; n < STATES_A_LANE; ++n) {
            const int ch = first + channel_lane * CHANNELS_A_LANE + c, state = state_lane * STATES_A_LANE + n;
            if (ch < dim && state < STATES) dA[(number * STATES + state) * dim + ch] = da[c][n] * (LN2 * LN2);
        }
    if constexpr (FUSED_PROJECTION) d_projection.write_weight(d_dt_weight, number * dim + first, dim);
    channels.write_sums(dbias + number * dim + first, dD + number * dim + first);
}
