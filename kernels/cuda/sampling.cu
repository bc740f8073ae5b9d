// From logits to a token, to the very token that the CPU's sampler (model/src/sampling) draws from the same logits. So every
// f32 step is rounded as there (no fused multiply-adds), sums have its order, and where they have another they are exact.
//
// Rows are cut into chunks of 128 logits, whose maxima ("peaks") let later passes skip most of them. Logits that are not
// finite count as minus infinity.
#include "elements.cuh"

constexpr unsigned CHUNK = 128;
// Sums side by side within a chunk.
constexpr unsigned LANES = 16;
// The nucleus's histogram: steps per factor e of weight, and steps in all. They reach down to e^-64.
constexpr float STEPS = 16.0f;
constexpr unsigned BUCKETS = 1024;
// Threads of a block that has a row to itself.
constexpr unsigned THREADS = 512;
// 1.5 * 2^23: adding it leaves a number's integer part in the lowest bits.
constexpr float SHIFTER = 12582912.0f;
constexpr unsigned NONE = 0xffffffffu;

typedef unsigned long long u64;

// As ops/sampling.rs writes it.
struct Request {
    // Likeliest tokens to report; NONE: no log-probabilities at all.
    unsigned logprobs;
    unsigned greedy;
    // 1 / temperature.
    float per_degree;
    // 0: all.
    unsigned top_k;
    float top_p, min_p;
    unsigned seed_low, seed_high, position;
    // Places in the list of adjustments: two words each, a token and how often it was generated, or a token and its bias.
    unsigned penalties, penalty_count, biases, bias_count;
    // Place of the bits of allowed tokens; NONE: all are.
    unsigned mask;
    float repetition, repetition_reciprocal, presence, frequency;
    unsigned unused[2];
};

// What a row's block leaves: then `logprobs` pairs of a token and its logit.
struct Result {
    unsigned token;
    // Of the model's own distribution: the token's logit, the largest one, and the sum of weights relative to that.
    float logit;
    double sum;
    float largest;
    unsigned count, unused[2];
};

// The least likely token that is still in the running; of equal logits, lower ids come first.
struct Cut {
    float logit;
    unsigned id;
};

// Turns logits into weights relative to the largest; below the floor they count as 0.
struct Weigher {
    float largest, per_degree, floor;
};

// e^x for x of at most 0; exactly 1 at 0, and 0 below -87.
__device__ float exponential(float x) {
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), SHIFTER), n = __fsub_rn(shifted, SHIFTER);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.6933594f)), __fmul_rn(n, -2.1219444e-4f));
    float series = 1.0f / 720.0f;
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 120.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 24.0f);
    series = __fadd_rn(__fmul_rn(series, r), 1.0f / 6.0f);
    series = __fadd_rn(__fmul_rn(series, r), 0.5f);
    const float power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
    const float value = __fmul_rn(__fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(series, r), r), r), 1.0f), power);
    return x < -87.0f ? 0.0f : value;
}

__device__ float distance(const Weigher& weigher, float logit) {
    return __fmul_rn(__fsub_rn(weigher.largest, logit), weigher.per_degree);
}

__device__ unsigned bucket(const Weigher& weigher, float logit) {
    const float step = fminf(__fmul_rn(distance(weigher, logit), STEPS), BUCKETS - 1.0f);
    return __float_as_uint(__fadd_rn(__fsub_rn(step, 0.5f), SHIFTER)) & 0x3fffffu;
}

__device__ float weight(const Weigher& weigher, float logit, float least) {
    const float w = exponential(-distance(weigher, logit));
    return logit < least || w < weigher.floor ? 0.0f : w;
}

__device__ float next_up(float v) {
    const unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) == 0) return __uint_as_float(1);
    return __uint_as_float(bits >> 31 ? bits - 1 : bits + 1);
}

// How many logits of a chunk lie before or at the cut's id: those are kept from the cut's logit on, the others from the next one.
__device__ unsigned before_cut(const Cut& cut, unsigned begin, unsigned length) {
    const u64 end = static_cast<u64>(cut.id) + 1;
    return end <= begin ? 0 : static_cast<unsigned>(end - begin < length ? end - begin : length);
}

// Likelier tokens, and of equal ones lower ids, have smaller keys.
__device__ u64 key_of(float logit, unsigned id) {
    const unsigned bits = __float_as_uint(logit), ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<u64>(~ascending) << 32 | id;
}
__device__ float logit_of(u64 key) {
    const unsigned ascending = ~static_cast<unsigned>(key >> 32);
    return __uint_as_float(ascending >> 31 ? ascending & 0x7fffffffu : ~ascending);
}

// Sorts `count` different keys by all threads of the block (bitonic, with endless keys beyond the end).
__device__ void sort(u64* keys, unsigned count) {
    for (unsigned size = 2; size / 2 < count; size *= 2)
        for (unsigned step = size; step > 1; step /= 2) {
            __syncthreads();
            for (unsigned at = threadIdx.x; at < count; at += blockDim.x) {
                // Each pair once, from its lower place; the first step of a size compares mirror images.
                const unsigned other = step == size ? at ^ (size - 1) : at ^ (step / 2);
                if (other <= at || other >= count) continue;
                const u64 low = keys[at], high = keys[other];
                if (low > high) keys[at] = high, keys[other] = low;
            }
        }
    __syncthreads();
}

// A row in the hands of a block.
struct Row {
    const float* logits;
    unsigned vocab, chunks;
    const float* peaks;
    // [vocab] keys and [chunks] sums in device memory, and a word in shared memory.
    u64* keys;
    double* sums;
    unsigned* counter;
};

__device__ unsigned length_of(const Row& row, unsigned chunk) {
    return min(CHUNK, row.vocab - chunk * CHUNK);
}

// The largest peak, for every thread. `partial` holds a float per warp.
__device__ float largest_peak(const Row& row, float* partial) {
    float largest = negative_infinity();
    for (unsigned i = threadIdx.x; i < row.chunks; i += blockDim.x) largest = fmaxf(largest, row.peaks[i]);
    largest = warp_max(largest);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / 32; ++i) largest = fmaxf(largest, partial[i]);
    return largest;
}

// Collects the keys of the tokens for which `wanted(logit, id)` holds, in chunks for which `worth(peak)` does, and sorts them.
template <class Worth, class Wanted>
__device__ unsigned collect(const Row& row, Worth worth, Wanted wanted) {
    __syncthreads();
    if (threadIdx.x == 0) *row.counter = 0;
    __syncthreads();
    for (unsigned chunk = threadIdx.x / 32; chunk < row.chunks; chunk += blockDim.x / 32) {
        if (!worth(row.peaks[chunk])) continue;
        const unsigned begin = chunk * CHUNK, end = begin + length_of(row, chunk);
        for (unsigned id = begin + threadIdx.x % 32; id < end; id += 32)
            if (wanted(row.logits[id], id)) row.keys[atomicAdd(row.counter, 1u)] = key_of(row.logits[id], id);
    }
    __syncthreads();
    const unsigned count = *row.counter;
    sort(row.keys, count);
    return count;
}

// Leaves the `count` likeliest tokens at the front of the keys, likeliest first; `count` is at most the vocabulary.
__device__ void likeliest(const Row& row, unsigned count) {
    float least = negative_infinity();
    if (count <= row.chunks) {
        // As many chunks reach this threshold as tokens are wanted, so as many tokens do, and hardly more.
        __syncthreads();
        for (unsigned i = threadIdx.x; i < row.chunks; i += blockDim.x) row.keys[i] = key_of(row.peaks[i], i);
        sort(row.keys, row.chunks);
        least = logit_of(row.keys[count - 1]);
        __syncthreads();
    }
    collect(row, [&](float peak) { return peak >= least; }, [&](float logit, unsigned) { return logit >= least; });
}

// The weight of each chunk, summed in f32 over sixteen lanes of each part and then in f64, by half a warp.
__device__ void sum_chunks(const Row& row, const Weigher& weigher, const Cut& cut) {
    const unsigned lane = threadIdx.x % LANES, half = threadIdx.x / LANES, halves = blockDim.x / LANES;
    __syncthreads();
    for (unsigned base = 0; base < row.chunks; base += halves) {
        const unsigned chunk = base + half, begin = chunk * CHUNK;
        const bool kept = chunk < row.chunks && row.peaks[min(chunk, row.chunks - 1)] >= cut.logit;
        const unsigned length = kept ? length_of(row, chunk) : 0, first = before_cut(cut, begin, length);
        double total = 0.0;
        for (unsigned part = 0; part < 2; ++part) {
            const unsigned from = part ? first : 0, to = part ? length : first;
            const float least = part ? next_up(cut.logit) : cut.logit;
            float sum = 0.0f;
            for (unsigned i = from + lane; i < to; i += LANES)
                sum = __fadd_rn(sum, weight(weigher, row.logits[begin + i], least));
            double of_part = 0.0;
            for (unsigned other = 0; other < LANES; ++other)
                of_part += static_cast<double>(__shfl_sync(FULL_WARP, sum, other, LANES));
            total += of_part;
        }
        if (lane == 0 && chunk < row.chunks) row.sums[chunk] = total;
    }
    __syncthreads();
}

// The cut after the shortest run of tokens, likeliest first, that holds at least `top_p` of the mass that `cut` leaves.
//
// The CPU sums each bucket in f64. Weights of a bucket differ by a factor of e^(1/16) and are at most 2^19 in number, so that
// sum is exact, and so is this one of integers: weights as multiples of one unit, split into two words that shared memory can
// add up in any order. Of the last two, whose weights have any size below e^-63, nothing could show in the sum beside the
// likeliest token's 1. `mass` holds 2 * BUCKETS words, `edge` two numbers.
__device__ Cut nucleus(const Row& row, const Weigher& weigher, const Cut& cut, float top_p, unsigned* mass, double* edge,
                       unsigned* ends) {
    const auto exponent = [](unsigned b) { return 23 + 1 + static_cast<int>(ceilf((b + 1) * 0.0901684400555602f)); };
    const auto of_bucket = [&](unsigned b) {
        const double units = static_cast<double>(static_cast<u64>(mass[2 * b + 1]) << 13) + static_cast<double>(mass[2 * b]);
        return units * static_cast<double>(__uint_as_float(static_cast<unsigned>(127 - exponent(b)) << 23));
    };
    for (unsigned i = threadIdx.x; i < 2 * BUCKETS; i += blockDim.x) mass[i] = 0;
    __syncthreads();
    for (unsigned chunk = threadIdx.x / 32; chunk < row.chunks; chunk += blockDim.x / 32) {
        if (!(row.peaks[chunk] >= cut.logit)) continue;
        const unsigned begin = chunk * CHUNK, length = length_of(row, chunk), first = before_cut(cut, begin, length);
        for (unsigned i = threadIdx.x % 32; i < length; i += 32) {
            const float logit = row.logits[begin + i];
            const float w = weight(weigher, logit, i < first ? cut.logit : next_up(cut.logit));
            const unsigned b = bucket(weigher, logit);
            if (w == 0.0f || b >= BUCKETS - 2) continue;
            const float unit = __uint_as_float(static_cast<unsigned>(127 + exponent(b)) << 23);
            const unsigned units = static_cast<unsigned>(w * unit);
            atomicAdd(&mass[2 * b], units & 0x1fffu);
            atomicAdd(&mass[2 * b + 1], units >> 13);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double all = 0.0, sum = 0.0;
        for (unsigned b = 0; b < BUCKETS - 1; ++b) all += of_bucket(b);
        const double needed = all * static_cast<double>(top_p);
        unsigned b = 0;
        double before = 0.0;
        for (; b < BUCKETS - 1; ++b) {
            before = sum;
            sum += of_bucket(b);
            if (sum >= needed) break;
        }
        edge[0] = before;
        edge[1] = needed;
        *ends = b;
    }
    __syncthreads();
    const unsigned last = *ends;
    if (last == BUCKETS - 1) return cut;
    const unsigned count = collect(
        row, [&](float peak) { return peak >= cut.logit && bucket(weigher, peak) <= last; },
        [&](float logit, unsigned id) {
            return (logit > cut.logit || (logit == cut.logit && id <= cut.id)) && bucket(weigher, logit) == last;
        });
    // In the order of likelihood, one by one.
    if (threadIdx.x == 0) {
        double before = edge[0];
        unsigned i = 0;
        for (; i + 1 < count; ++i) {
            before += static_cast<double>(weight(weigher, logit_of(row.keys[i]), negative_infinity()));
            if (before >= edge[1]) break;
        }
        *ends = i;
    }
    __syncthreads();
    if (count == 0) return cut;
    const u64 key = row.keys[*ends];
    return {logit_of(key), static_cast<unsigned>(key)};
}

// The token at `fraction` of the mass that `cut` leaves, in the order of ids. Only thread 0's answer counts.
__device__ unsigned at_fraction(const Row& row, const Weigher& weigher, const Cut& cut, double fraction) {
    sum_chunks(row, weigher, cut);
    if (threadIdx.x != 0) return 0;
    double all = 0.0, below = 0.0, start = 0.0;
    for (unsigned i = 0; i < row.chunks; ++i) all += row.sums[i];
    const double target = fraction * all;
    // The chunk that the target falls into; the last one with any mass, should rounding put it past the end.
    unsigned found = NONE;
    for (unsigned i = 0; i < row.chunks; ++i) {
        if (!(row.sums[i] > 0.0)) continue;
        found = i;
        start = below;
        if (below + row.sums[i] > target) break;
        below += row.sums[i];
    }
    if (found == NONE) return 0;
    const unsigned begin = found * CHUNK, length = length_of(row, found), first = before_cut(cut, begin, length);
    unsigned last = 0;
    for (unsigned i = 0; i < length; ++i) {
        const float w = weight(weigher, row.logits[begin + i], i < first ? cut.logit : next_up(cut.logit));
        if (!(w > 0.0f)) continue;
        last = begin + i;
        start += static_cast<double>(w);
        if (start > target) break;
    }
    return last;
}

// A uniform number in [0, 1) with 53 random bits: Philox4x32-10 keyed by the seed and counted by the position.
__device__ double uniform(unsigned seed_low, unsigned seed_high, unsigned position) {
    unsigned c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = seed_low, k1 = seed_high;
    for (int round = 0; round < 10; ++round) {
        const u64 a = static_cast<u64>(0xD2511F53u) * c0, b = static_cast<u64>(0xCD9E8D57u) * c2;
        c0 = static_cast<unsigned>(b >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(b);
        c3 = static_cast<unsigned>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<double>((static_cast<u64>(c0) << 32 | c1) >> 11) / 9007199254740992.0;
}

// The largest logit's token, the lowest id among equals.
__device__ unsigned argmax(const Row& row, float largest, unsigned* best) {
    __syncthreads();
    if (threadIdx.x == 0) *best = row.vocab - 1;
    __syncthreads();
    for (unsigned chunk = threadIdx.x / 32; chunk < row.chunks; chunk += blockDim.x / 32) {
        if (row.peaks[chunk] != largest) continue;
        const unsigned begin = chunk * CHUNK, end = begin + length_of(row, chunk);
        for (unsigned id = begin + threadIdx.x % 32; id < end; id += 32)
            if (row.logits[id] == largest) atomicMin(best, id);
    }
    __syncthreads();
    return *best;
}

// peaks[row][chunk] = the chunk's largest logit, a warp each; logits that are not finite, or (with `masked`) not allowed,
// become minus infinity. Grid: {blocks along the chunks, rows}.
extern "C" __global__ void sampling_peaks(unsigned vocab, float* logits, const Request* requests, const unsigned* masks,
                                          unsigned masked, float* peaks) {
    const unsigned chunks = (vocab + CHUNK - 1) / CHUNK, chunk = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (chunk >= chunks) return;
    logits += static_cast<u64>(blockIdx.y) * vocab;
    const unsigned mask = masked ? requests[blockIdx.y].mask : NONE;
    const unsigned end = min(vocab, (chunk + 1) * CHUNK);
    float largest = negative_infinity();
    for (unsigned id = chunk * CHUNK + threadIdx.x % 32; id < end; id += 32) {
        const float logit = logits[id];
        const bool allowed = mask == NONE || masks[mask + id / 32] >> (id % 32) & 1;
        if (allowed && (__float_as_uint(logit) & 0x7f800000u) != 0x7f800000u) largest = fmaxf(largest, logit);
        else logits[id] = negative_infinity();
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) peaks[static_cast<u64>(blockIdx.y) * chunks + chunk] = largest;
}

// One token's logit after a change: what is not finite stays out, what is finite stays finite.
template <class Change>
__device__ void adjust(float* logits, unsigned vocab, unsigned token, Change change) {
    if (token >= vocab || (__float_as_uint(logits[token]) & 0x7f800000u) == 0x7f800000u) return;
    logits[token] = fminf(fmaxf(change(logits[token]), -3.40282347e+38f), 3.40282347e+38f);
}

// Penalties on tokens seen (each listed once), then biases (of equal tokens in their order, which are neighbours). A block per
// row.
extern "C" __global__ void sampling_adjust(unsigned vocab, float* logits, const Request* requests,
                                           const unsigned* adjustments) {
    const Request request = requests[blockIdx.x];
    logits += static_cast<u64>(blockIdx.x) * vocab;
    const uint2* const penalties = reinterpret_cast<const uint2*>(adjustments) + request.penalties;
    const uint2* const biases = reinterpret_cast<const uint2*>(adjustments) + request.biases;
    for (unsigned i = threadIdx.x; i < request.penalty_count; i += blockDim.x) {
        const uint2 entry = penalties[i];
        if (request.repetition != 1.0f)
            adjust(logits, vocab, entry.x, [&](float logit) {
                return __fmul_rn(logit, logit < 0.0f ? request.repetition : request.repetition_reciprocal);
            });
        if (entry.y)
            adjust(logits, vocab, entry.x, [&](float logit) {
                const float times = __fmul_rn(static_cast<float>(entry.y), request.frequency);
                return __fsub_rn(logit, __fadd_rn(request.presence, times));
            });
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < request.bias_count; i += blockDim.x) {
        const unsigned token = biases[i].x;
        if (i && biases[i - 1].x == token) continue;
        for (unsigned j = i; j < request.bias_count && biases[j].x == token; ++j)
            adjust(logits, vocab, token, [&](float logit) { return __fadd_rn(logit, __uint_as_float(biases[j].y)); });
    }
}

struct Shared {
    double edge[2];
    unsigned mass[2 * BUCKETS];
    float partial[THREADS / 32];
    unsigned counter, ends;
};

__device__ Row row_of(unsigned vocab, const float* logits, const float* peaks, u64* keys, double* sums, unsigned* counter) {
    const unsigned chunks = (vocab + CHUNK - 1) / CHUNK;
    const u64 row = blockIdx.x;
    return {logits + row * vocab, vocab, chunks, peaks + row * chunks, keys + row * vocab, sums + row * chunks, counter};
}

// Of the model's own distribution: the sum of weights and the likeliest tokens; `raw` keeps the logits. A block per row;
// rows that do not ask do nothing. Results are `result_words` words apart.
extern "C" __global__ void sampling_report(unsigned vocab, const float* logits, const Request* requests, const float* peaks,
                                           u64* keys, double* sums, float* raw, unsigned result_words, unsigned* results) {
    RIDGE_DYNAMIC_SHARED(Shared, shared);
    const Request request = requests[blockIdx.x];
    if (request.logprobs == NONE) return;
    const Row row = row_of(vocab, logits, peaks, keys, sums, &shared->counter);
    unsigned* const words = results + static_cast<u64>(blockIdx.x) * result_words;
    Result* const result = reinterpret_cast<Result*>(words);
    uint2* const top = reinterpret_cast<uint2*>(words + sizeof(Result) / 4);
    raw += static_cast<u64>(blockIdx.x) * vocab;
    for (unsigned i = threadIdx.x; i < vocab; i += blockDim.x) raw[i] = row.logits[i];

    const float largest = largest_peak(row, shared->partial);
    const unsigned count = min(request.logprobs, vocab);
    if (largest != negative_infinity()) sum_chunks(row, {largest, 1.0f, 0.0f}, {negative_infinity(), NONE});
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (unsigned i = 0; largest != negative_infinity() && i < row.chunks; ++i) sum += row.sums[i];
        result->sum = sum;
        result->largest = largest;
        result->count = count;
    }
    if (count == 0) return;
    likeliest(row, count);
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x)
        top[i] = make_uint2(static_cast<unsigned>(row.keys[i]), __float_as_uint(logit_of(row.keys[i])));
}

// The token of each row. A block per row.
extern "C" __global__ void sampling_choose(unsigned vocab, const float* logits, const Request* requests, const float* peaks,
                                           u64* keys, double* sums, const float* raw, unsigned result_words,
                                           unsigned* results) {
    RIDGE_DYNAMIC_SHARED(Shared, shared);
    const Request request = requests[blockIdx.x];
    const Row row = row_of(vocab, logits, peaks, keys, sums, &shared->counter);
    const float largest = largest_peak(row, shared->partial);
    unsigned token = 0;
    if (largest == negative_infinity()) {
        token = 0;
    } else if (request.greedy) {
        token = argmax(row, largest, &shared->ends);
    } else {
        Cut cut = {negative_infinity(), NONE};
        if (request.top_k > 0 && request.top_k < vocab) {
            likeliest(row, request.top_k);
            const u64 key = row.keys[request.top_k - 1];
            cut = {logit_of(key), static_cast<unsigned>(key)};
        }
        // Min-p comes after top-p: it takes nothing from the mass that the nucleus is a share of.
        if (request.top_p < 1.0f)
            cut = nucleus(row, {largest, request.per_degree, 0.0f}, cut, request.top_p, shared->mass, shared->edge,
                          &shared->ends);
        const double fraction = uniform(request.seed_low, request.seed_high, request.position);
        token = at_fraction(row, {largest, request.per_degree, request.min_p}, cut, fraction);
    }
    if (threadIdx.x != 0) return;
    Result* const result = reinterpret_cast<Result*>(results + static_cast<u64>(blockIdx.x) * result_words);
    result->token = token;
    if (request.logprobs != NONE) result->logit = raw[static_cast<u64>(blockIdx.x) * vocab + token];
}
