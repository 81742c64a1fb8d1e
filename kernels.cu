// The five fused kernels of NCN (paper, section 4.1.1). Device code alone: kernels.py compiles it at run time
// with NVRTC, which has no include path, so nothing is included. The tests compile this very file with g++ and
// run one CPU thread per CUDA thread.
//
// Why fuse? Each of these does a few operations per element: its time is the bytes it moves over the card's
// bandwidth. Plain PyTorch runs RMSNorm as five or six kernels, each of which reads and writes the whole tensor;
// fused, it is read once and written once. The road from naive to fast is the same in all five:
//   1. Naive: one thread per row. Right, but the 32 threads of a warp then read 32 addresses a row apart, and each
//      memory transaction of 32 bytes brings one element that anybody wants.
//   2. A THREAD GROUP per row: neighbours read neighbours, every byte fetched is used, and the row's sum goes
//      through warp shuffles (registers to registers) instead of memory.
//   3. A VECTOR of 8 elements per thread, in loads of 16 bytes, those of all operands at once: fewer instructions for
//      the same bytes, and more of these in flight. Only where the addresses are aligned to 16 bytes; rows of odd
//      width take scalar loads.
//   4. The row stays in registers between the reduction and the result. A group has at most 512 threads (so that
//      each may have 64 registers), which does for 4,096 elements; a wider row is read again, from the cache.
// Elements are float, f16 or bf16 in memory and float in registers. Indices have 64 bits, unless they are divided (4.).
//
// A block is blockDim.y groups of blockDim.x threads, a power of two. Either a group is one warp (blockDim.x == 32,
// rows up to 256 wide; several groups per block) or it is the whole block (blockDim.y == 1). Groups walk over the
// rows with a stride, so any grid does any number of rows.
typedef long long i64;
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

// ---- Conversions. cuda_fp16.h requires the toolkit; two lines of PTX do its work. On a CPU the shim around this
// file brings these three.
#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short h) {
    float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h)); return x;
}
__device__ inline unsigned short float_to_half(float x) {
    unsigned short h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x)); return h;
}
__device__ inline float exp2_approx(float x) {   // one instruction; exp2f minds subnormal numbers, and takes four
    float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
}
#endif
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(f16 x) { return half_to_float(x.bits); }
__device__ inline float to_float(bf16 x) { return __int_as_float((int)x.bits << 16); }   // a float's upper half
__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(f16& to, float x) { to.bits = float_to_half(x); }
__device__ inline void from_float(bf16& to, float x) {   // round to nearest, ties to even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
    unsigned u = (unsigned)__float_as_int(x);
    to.bits = (unsigned short)(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

// ---- One vector: elements i .. i+7 of a row that ends at n.
template <typename T> __device__ inline bool whole(const T* row, i64 i, i64 n) {
    return i + 8 <= n && ((i64)(row + i) & 15) == 0;
}

template <typename T> struct From { float (&v)[8]; const T* row; };   // a vector, and where it comes from
template <typename T> From(float (&v)[8], const T* row) -> From<T>;

template <typename T> __device__ inline void load_whole(From<T> from, i64 i) {
    alignas(16) T t[8];
    #pragma unroll
    for (int q = 0; q < (int)sizeof(T) / 2; q++) ((uint4*)t)[q] = ((const uint4*)(from.row + i))[q];
    #pragma unroll
    for (int k = 0; k < 8; k++) from.v[k] = to_float(t[k]);
}

// All that an operation reads is loaded in one branch: the loads go out back to back, and their waits overlap. In a
// branch for each, a load would wait until the one before has arrived.
template <typename... T> __device__ inline void load(i64 i, i64 n, From<T>... from) {
    if ((whole(from.row, i, n) && ...)) (load_whole(from, i), ...);
    else
        #pragma unroll
        for (int k = 0; k < 8; k++) ((from.v[k] = i + k < n ? to_float(from.row[i + k]) : 0), ...);
}

template <typename T> __device__ inline void store_whole(T* row, i64 i, const float (&v)[8]) {
    alignas(16) T t[8];
    #pragma unroll
    for (int k = 0; k < 8; k++) from_float(t[k], v[k]);
    #pragma unroll
    for (int q = 0; q < (int)sizeof(T) / 2; q++) ((uint4*)(row + i))[q] = ((const uint4*)t)[q];
}

template <typename T> __device__ inline void store(T* row, i64 i, i64 n, const float (&v)[8]) {
    if (whole(row, i, n)) store_whole(row, i, v);
    else
        #pragma unroll
        for (int k = 0; k < 8; k++) if (i + k < n) from_float(row[i + k], v[k]);
}

// ---- Which rows are this group's, and which vectors of a row are this thread's.
__device__ inline i64 first_row() { return blockIdx.x * (i64)blockDim.y + threadIdx.y; }
__device__ inline i64 row_step() { return gridDim.x * (i64)blockDim.y; }
__device__ inline i64 first_vector() { return threadIdx.x * 8LL; }
__device__ inline i64 vector_step() { return blockDim.x * 8LL; }   // also: the widest row that fits in registers

// ---- A reduction over the group; every thread gets the result. Within a warp, values go from register to
// register: after an exchange with the lane 16 away, then 8, 4, 2, 1, all 32 lanes hold the total. Between the
// warps of a group they go through shared memory, one element per warp.
struct Sum { static __device__ inline float of(float a, float b) { return a + b; } };
struct Max { static __device__ inline float of(float a, float b) { return fmaxf(a, b); } };

template <typename Op> __device__ inline float reduce(float v) {
    #pragma unroll
    for (int o = 16; o; o >>= 1) v = Op::of(v, __shfl_xor_sync(~0u, v, o));
    if (blockDim.x > 32) {
        __shared__ float of_warp[32];
        int warps = blockDim.x / 32;
        __syncthreads();   // the readers of the previous call are done, before anyone writes again
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
        __syncthreads();   // every warp has written, before anyone reads
        v = of_warp[threadIdx.x & (warps - 1)];   // each run of `warps` lanes holds every warp's value once
        for (int o = warps / 2; o; o >>= 1) v = Op::of(v, __shfl_xor_sync(~0u, v, o));
    }
    return v;
}

// ==== 1. RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
// One read of x, one write of y. rstd (rows,) is kept for the backward pass: 4 bytes per row save a reduction.
template <typename T> __global__ __launch_bounds__(512) void rms_norm_forward(
        T* __restrict__ y, float* __restrict__ rstd, const T* __restrict__ x, const float* __restrict__ weight,
        i64 rows, i64 d, double eps) {
    for (i64 row = first_row(); row < rows; row += row_step()) {
        float v[8] = {}, w[8], sum = 0;
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            load(i, d, From{v, x + row * d}, From{w, weight});
            #pragma unroll
            for (int k = 0; k < 8; k++) sum += v[k] * v[k];
        }
        float r = rsqrtf(reduce<Sum>(sum) / d + (float)eps);
        if (threadIdx.x == 0) rstd[row] = r;
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            if (d > vector_step()) load(i, d, From{v, x + row * d}, From{w, weight});   // else they are still there
            #pragma unroll
            for (int k = 0; k < 8; k++) v[k] = v[k] * r * w[k];
            store(y + row * d, i, d, v);
        }
    }
}

// With xhat = x * rstd:  dx = rstd * (dy * weight - xhat * mean(dy * weight * xhat)),  dweight = sum over rows of
// dy * xhat. The naive sum over rows is an atomic add per element: slow, and in another order every run. Here a
// thread keeps its 8 columns in registers over all rows of its group, and each block writes one row of `partial`
// (blocks, d), which torch sums. So dy and x are read once for both gradients. A row too wide for registers is added
// up in `partial` directly (no race: group = block, and a column belongs to one thread).
template <typename T> __global__ __launch_bounds__(512) void rms_norm_backward(
        T* __restrict__ dx, float* __restrict__ partial, const T* __restrict__ dy, const T* __restrict__ x,
        const float* __restrict__ weight, const float* __restrict__ rstd, i64 rows, i64 d) {
    float dw[8] = {};
    bool wide = d > vector_step();
    for (i64 row = first_row(); row < rows; row += row_step()) {
        float a[8] = {}, b[8] = {}, w[8] = {}, r = rstd[row], dot = 0;
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            load(i, d, From{a, x + row * d}, From{b, dy + row * d}, From{w, weight});
            #pragma unroll
            for (int k = 0; k < 8; k++) dot += b[k] * w[k] * (a[k] * r);
        }
        float mean = reduce<Sum>(dot) / d;
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            if (wide) load(i, d, From{a, x + row * d}, From{b, dy + row * d}, From{w, weight});
            #pragma unroll
            for (int k = 0; k < 8; k++) {
                float xhat = a[k] * r;
                i64 at = blockIdx.x * d + i + k;
                if (!wide) dw[k] += b[k] * xhat;
                else if (i + k < d) partial[at] = (row == blockIdx.x ? 0 : partial[at]) + b[k] * xhat;
                a[k] = r * (b[k] * w[k] - xhat * mean);
            }
            store(dx + row * d, i, d, a);
        }
    }
    if (wide) return;
    if (blockDim.y > 1) {   // several groups in the block: add up their columns
        __shared__ float columns[8][256];
        #pragma unroll
        for (int k = 0; k < 8; k++) columns[k][threadIdx.y * 32 + threadIdx.x] = dw[k];
        __syncthreads();    // all groups have written, before the first one reads
        if (threadIdx.y) return;
        #pragma unroll
        for (int k = 0; k < 8; k++)
            for (int t = 1; t < (int)blockDim.y; t++) dw[k] += columns[k][t * 32 + threadIdx.x];
    }
    if (first_vector() < d) store(partial + blockIdx.x * d, first_vector(), d, dw);
}

// ==== 2. Actuator: z (..., 3) -> gain 2 sigmoid(z), precision min(softplus(z) + 0.01, 4), gate sigmoid(z).
// Naive: one thread per element, which then asks which of the three it is: the threads of a warp diverge. Here a
// thread takes 24 elements (3 vectors, 8 triples), and which signal an element is, (u + k) % 3, is a compile-time
// constant. Blocks of 64 threads, for there are few elements: more blocks keep more of the card's processors busy.
__device__ inline float sigmoid(float z) { return 1 / (1 + expf(-z)); }
__device__ inline float softplus(float z) { return fmaxf(z, 0) + log1pf(expf(-fabsf(z))); }
__device__ inline float signal(float z, int which) {
    if (which != 1) return sigmoid(z) * (which == 0 ? 2 : 1);
    float p = softplus(z) + 0.01f;
    return p > 4 ? 4 : p;
}
__device__ inline float slope(float z, int which) {   // d signal / d z; flat where the precision is clamped
    float s = sigmoid(z);
    if (which != 1) return s * (1 - s) * (which == 0 ? 2 : 1);
    return softplus(z) + 0.01f > 4 ? 0 : s;
}

// z and signals (n,), n a multiple of 3.
template <typename T> __global__ __launch_bounds__(64) void actuate_forward(
        float* __restrict__ signals, const T* __restrict__ z, i64 n) {
    for (i64 i = 24 * (blockIdx.x * (i64)blockDim.x + threadIdx.x); i < n; i += 24 * (i64)gridDim.x * blockDim.x)
        #pragma unroll
        for (int u = 0; u < 24; u += 8) {
            float v[8];
            load(i + u, n, From{v, z});
            #pragma unroll
            for (int k = 0; k < 8; k++) v[k] = signal(v[k], (u + k) % 3);
            store(signals, i + u, n, v);
        }
}

// z is read again and the slope computed from it: cheaper than keeping the slope.
template <typename T> __global__ __launch_bounds__(64) void actuate_backward(
        T* __restrict__ dz, const float* __restrict__ dsignals, const T* __restrict__ z, i64 n) {
    for (i64 i = 24 * (blockIdx.x * (i64)blockDim.x + threadIdx.x); i < n; i += 24 * (i64)gridDim.x * blockDim.x)
        #pragma unroll
        for (int u = 0; u < 24; u += 8) {
            float v[8], g[8];
            load(i + u, n, From{v, z}, From{g, dsignals});
            #pragma unroll
            for (int k = 0; k < 8; k++) v[k] = g[k] * slope(v[k], (u + k) % 3);
            store(dz, i + u, n, v);
        }
}

// ==== 3. Modulation: out = residual + gain * gate * y, one gain and one gate per row (gate may be null: 1), both
// strided views of the signals. y may be narrower than the residual (autocast).
__device__ inline float factor(const float* gate, i64 stride, i64 row) { return gate ? gate[row * stride] : 1; }

template <typename Y, typename R> __global__ __launch_bounds__(512) void modulate_forward(
        R* __restrict__ out, const Y* __restrict__ y, const R* __restrict__ residual,
        const float* __restrict__ gain, const float* __restrict__ gate, i64 gain_stride, i64 gate_stride,
        i64 rows, i64 d) {
    for (i64 row = first_row(); row < rows; row += row_step()) {
        float g = gain[row * gain_stride] * factor(gate, gate_stride, row);
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            float a[8], b[8];
            load(i, d, From{a, y + row * d}, From{b, residual + row * d});
            #pragma unroll
            for (int k = 0; k < 8; k++) b[k] += g * a[k];
            store(out + row * d, i, d, b);
        }
    }
}

// The residual's gradient is dout itself. dy = gain gate dout; with dot = sum over the row of dout * y, dgain =
// gate dot and dgate = gain dot. The row is summed while it passes; eager PyTorch reads both tensors again.
template <typename Y, typename R> __global__ __launch_bounds__(512) void modulate_backward(
        Y* __restrict__ dy, float* __restrict__ dgain, float* __restrict__ dgate, const R* __restrict__ dout,
        const Y* __restrict__ y, const float* __restrict__ gain, const float* __restrict__ gate, i64 gain_stride,
        i64 gate_stride, i64 rows, i64 d) {
    for (i64 row = first_row(); row < rows; row += row_step()) {
        float first = gain[row * gain_stride], second = factor(gate, gate_stride, row), dot = 0;
        for (i64 i = first_vector(); i < d; i += vector_step()) {
            float a[8], b[8];
            load(i, d, From{a, dout + row * d}, From{b, y + row * d});
            #pragma unroll
            for (int k = 0; k < 8; k++) dot += a[k] * b[k], a[k] *= first * second;
            store(dy + row * d, i, d, a);
        }
        dot = reduce<Sum>(dot);
        if (threadIdx.x == 0) dgain[row] = second * dot;
        if (threadIdx.x == 0 && gate) dgate[row] = first * dot;
    }
}

// ==== 4. Zero-copy KV cache: cache[b, h, *position + t] = new[b, h, t], for keys (blockIdx.y 0) and values (1).
// The naive cache concatenates: it copies all the past for every token. Here only the new rows move, and the
// position is read on the device, so that a captured CUDA graph writes to a new place at every replay. A slot
// outside the cache is not written. One thread copies one vector of one row; n, below 2^31, is the number of vectors:
// which row and vector is whose takes five divisions, and one of 64 bits costs as much as ten of 32.
struct Strides { i64 batch, head, time, element; };

template <typename T> __global__ __launch_bounds__(256) void write_cache(
        T* k_cache, T* v_cache, const T* k, const T* v, const i64* position, Strides to_k, Strides to_v,
        Strides from_k, Strides from_v, i64 n_heads, i64 n_time, i64 width, i64 slots, i64 n) {
    T* cache = blockIdx.y ? v_cache : k_cache;
    const T* fresh = blockIdx.y ? v : k;
    Strides to = blockIdx.y ? to_v : to_k, from = blockIdx.y ? from_v : from_k;
    unsigned heads = n_heads, time = n_time, vectors = (width + 7) / 8;
    i64 start = *position;
    for (unsigned u = blockIdx.x * blockDim.x + threadIdx.x; u < n; u += gridDim.x * blockDim.x) {
        i64 i = u % vectors * 8;
        unsigned row = u / vectors, t = row % time, h = row / time % heads, b = row / time / heads;
        if (start + t < 0 || start + t >= slots) continue;
        T* target = cache + b * to.batch + h * to.head + (start + t) * to.time + i * to.element;
        const T* source = fresh + b * from.batch + h * from.head + t * from.time + i * from.element;
        if (to.element == 1 && from.element == 1 && whole(target - i, i, width) && whole(source - i, i, width))
            for (int q = 0; q < (int)sizeof(T) / 2; q++) ((uint4*)target)[q] = ((const uint4*)source)[q];
        else
            for (int e = 0; e < 8 && i + e < width; e++) target[e * to.element] = source[e * from.element];
    }
}

// ==== 5. Online softmax: the classifier's loss and, over the logits, their gradient.
// Naive: one pass for the maximum, one for the sum of exponentials, one for the result. The first two become one:
// keep a running maximum m and a running sum s of exp(x - m), and when a larger x comes, scale the old sum by
// exp(m_old - m_new). It is the recurrence of the salience cache in ncn.py, which carries a weighted value along
// with the sum. The second pass finds a row of 50,257 half-precision logits in the L2 cache: memory sees one read
// and one write. loss (rows,) in nats; a negative target is ignored (loss 0, gradient 0), one beyond the
// vocabulary gives NaN. logits (rows, `stride` apart) become softmax - onehot(target), unscaled: 1 / N would
// underflow in f16.
//
// Here the instructions count as much as the bytes. Whole vectors have loops without a branch. e^(x - m) is
// 2^(x log2(e) - m), one multiply-add and one ex2, with m in units of log 2; its rounding is the same in every term
// and cancels. And no element is asked whether it is the target's: the thread that passes there reads the logit
// before and takes the 1 off after; so no other thread's write is in the way.
template <typename T> __global__ __launch_bounds__(512) void softmax_loss(
        T* __restrict__ logits, float* __restrict__ loss, const i64* __restrict__ targets, i64 rows, i64 vocab,
        i64 stride, i64 want_gradient) {
    const float lowest = -3.402823466e38f, infinity = __int_as_float(0x7f800000), log2e = 1.44269504f;
    for (i64 row = first_row(); row < rows; row += row_step()) {
        T* x = logits + row * stride;
        i64 target = targets[row], end = whole(x, 0, vocab) ? vocab / 8 * 8 : 0;   // of the vectors; then elements
        bool valid = target >= 0 && target < vocab;
        bool mine = valid && ((target < end ? target / 8 : target - end) & (blockDim.x - 1)) == threadIdx.x;
        float v[8], m = lowest, s = 0, at_target = mine ? to_float(x[target]) : 0;   // not -inf: (-inf) - (-inf) is NaN
        for (i64 i = first_vector(); i < end; i += vector_step()) {
            load_whole(From{v, x}, i);
            float old = m, top = v[0];
            #pragma unroll
            for (int k = 1; k < 8; k++) top = fmaxf(top, v[k]);
            m = fmaxf(m, top * log2e);
            s *= exp2_approx(old - m);
            #pragma unroll
            for (int k = 0; k < 8; k++) s += exp2_approx(fmaf(v[k], log2e, -m));
        }
        for (i64 i = end + threadIdx.x; i < vocab; i += blockDim.x) {
            float old = m, z = to_float(x[i]);
            m = fmaxf(m, z * log2e);
            s = s * exp2_approx(old - m) + exp2_approx(fmaf(z, log2e, -m));
        }
        float top = reduce<Max>(m), total = reduce<Sum>(s * exp2_approx(m - top)), scale = valid / total;
        at_target = fmaf(at_target, log2e, -top);
        if (mine) loss[row] = (log2f(total) - at_target) * 0.693147181f;
        if (threadIdx.x == 0 && !valid) loss[row] = target < 0 ? 0 : infinity - infinity;
        if (!want_gradient) continue;
        for (i64 i = first_vector(); i < end; i += vector_step()) {
            load_whole(From{v, x}, i);
            #pragma unroll
            for (int k = 0; k < 8; k++) v[k] = exp2_approx(fmaf(v[k], log2e, -top)) * scale;
            store_whole(x, i, v);
        }
        for (i64 i = end + threadIdx.x; i < vocab; i += blockDim.x)
            from_float(x[i], exp2_approx(fmaf(to_float(x[i]), log2e, -top)) * scale);
        if (mine) from_float(x[target], exp2_approx(at_target) * scale - 1);
    }
}
