// What a device, or the emulator, must be able to do before anything else is tried: launches, indices, shared memory,
// barriers and shuffles. Run by the tests and first of all by `cluster gpu-check`.

#ifndef RIDGE_EMULATED
#define RIDGE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

// y[i] = a * x[i] + y[i]. Grid: blocks of any size that cover n.
extern "C" __global__ void selftest_axpy(unsigned n, float a, const float* x, float* y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

// sums[b] = the sum of the block's blockDim.x elements of x, up to n. Blocks of whole warps; dynamic shared memory: one float
// per warp.
extern "C" __global__ void selftest_sum(unsigned n, const float* x, float* sums) {
    RIDGE_DYNAMIC_SHARED(float, partial);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float sum = i < n ? x[i] : 0.0f;
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (lane == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned warp = 1; warp < warps; ++warp) sum += partial[warp];
        sums[blockIdx.x] = sum;
    }
}

// Turns a matrix x[rows, cols] over into y[cols, rows] through tiles of 32 x 32 in shared memory. Blocks of 32 x 8 threads.
extern "C" __global__ void selftest_transpose(unsigned rows, unsigned cols, const float* x, float* y) {
    __shared__ float tile[32][33];
    const unsigned row = blockIdx.y * 32, col = blockIdx.x * 32;
    for (unsigned i = threadIdx.y; i < 32; i += 8)
        if (row + i < rows && col + threadIdx.x < cols)
            tile[i][threadIdx.x] = x[(unsigned long long)(row + i) * cols + col + threadIdx.x];
    __syncthreads();
    for (unsigned i = threadIdx.y; i < 32; i += 8)
        if (col + i < cols && row + threadIdx.x < rows)
            y[(unsigned long long)(col + i) * rows + row + threadIdx.x] = tile[threadIdx.x][i];
}
