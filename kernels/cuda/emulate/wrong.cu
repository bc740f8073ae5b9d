// Kernels that are wrong on purpose, each in one way that the emulator must notice; and its conversions, all of them.
// For the emulator's own tests: no device ever sees this file.

extern "C" __global__ void wrong_half_a_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}

extern "C" __global__ void wrong_two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void wrong_lane_ended() {
    if (threadIdx.x == 3) return;
    __shfl_sync(0xffffffffu, 1.0f, 0);
}

extern "C" __global__ void wrong_masks() {
    __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0x0ffffffeu << 1 | 1u, 1.0f, 0);
}

extern "C" __global__ void wrong_meeting() {
    if (threadIdx.x < 16) {
        __syncwarp();
    } else {
        __shfl_sync(0xffffffffu, 1.0f, 0);
    }
}

extern "C" __global__ void wrong_shared() {
    RIDGE_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x + 1] = 0.0f;
}

extern "C" __global__ void wrong_overrun(float* out, unsigned n) {
    out[n] = 0.0f;
}

// A neighbour's value is read without a barrier.
extern "C" __global__ void wrong_race(unsigned* out) {
    __shared__ unsigned shared[64];
    shared[threadIdx.x] = 1000;
    __syncthreads();
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}

extern "C" __global__ void wrong_copies(const unsigned* x, unsigned* y) {
    alignas(16) static unsigned tile[4];
    tile[0] = tile[3] = 1;
    emulate::copy_later(tile, x, 8, 16);
    emulate::commit_copies();
    y[0] = tile[0];
    emulate::wait_copies(0);
    y[1] = tile[0];
    y[2] = tile[3];
}

extern "C" __global__ void numbers(unsigned n, const float* x, unsigned* out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned short bf16 = emulate::bf16_from_f32(x[i]), f16 = emulate::f16_from_f32(x[i]);
    const unsigned char e4m3 = emulate::e4m3_from_f32(x[i]);
    out[i] = bf16;
    out[n + i] = __float_as_uint(emulate::f32_from_bf16(bf16));
    out[2 * n + i] = f16;
    out[3 * n + i] = __float_as_uint(emulate::f32_from_f16(f16));
    out[4 * n + i] = e4m3;
    out[5 * n + i] = __float_as_uint(emulate::f32_from_e4m3(e4m3));
}
